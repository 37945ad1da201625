"""The tile table at run time: empty tiles are not visited, full ones not masked, partial ones masked, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import arrays, assert_agree, blockwise, reference

import attnx
from attnx import masks, scores, weights

LENGTH, BLOCK = 24, 4
IDS = jnp.repeat(jnp.arange(4), jnp.array([5, 3, 9, 7]), total_repeat_length=LENGTH)
ORDER = jnp.array([4, 0, 5, 2, 1, 3])  # of whole blocks

VISITED, MASKED = [], []


def _record(log, at):
    jax.debug.callback(lambda i, j: log.append((int(i), int(j))), at.query[0, 0] // BLOCK, at.key[0, 0] // BLOCK)


def noting_visits(s, at):
    _record(VISITED, at)
    return s


def noting_masks(at):
    _record(MASKED, at)
    return jnp.ones((), bool)


def always(query, key):
    return True, True


MASKS = {
    "none": (None, None),
    "causal, traced documents": (masks.causal() & masks.documents(IDS), None),
    "window, blocks permuted": (masks.sliding_window(6), (jnp.arange(LENGTH).reshape(-1, BLOCK)[ORDER]).reshape(-1)),
    "prefix or causal, padding": ((masks.prefix(jnp.asarray(6)) | masks.causal()) & masks.lengths(jnp.asarray(18), jnp.asarray(14)), None),
}


@pytest.mark.parametrize("name", MASKS)
def test_tiles_visited_and_masked(name):
    """The tiles in which user functions ran are those with an allowed pair, and masks ran on those with a forbidden one besides."""
    mask, positions = MASKS[name]
    q, k, v, cotangent = arrays(jnp.float32, batch=1, queries=LENGTH, keys=LENGTH, heads=1, kv_heads=1)
    allowed = np.asarray(attnx.attention_weights(q, k, mask=mask))[0, 0] > 0  # by logical position
    tiles = allowed.reshape(LENGTH // BLOCK, BLOCK, -1, BLOCK)
    some, every = np.argwhere(tiles.any((1, 3))).tolist(), np.argwhere(tiles.all((1, 3))).tolist()
    partial = [tile for tile in some if tile not in every]
    noting = masks.predicate(noting_masks, cover=always)

    def attend(q, k, v):
        return attnx.attention(q, k, v, scores=scores.elementwise(noting_visits), mask=noting if mask is None else mask & noting,
                               query_positions=positions, key_positions=positions, implementation="blockwise", block_sizes=(BLOCK, BLOCK))

    def run(function, times):
        VISITED.clear(), MASKED.clear()
        jax.block_until_ready(jax.jit(function)(q, k, v))
        jax.effects_barrier()
        assert sorted(map(list, VISITED)) == sorted(some * times)
        assert sorted(map(list, MASKED)) == sorted(partial * times)

    run(attend, 1)
    run(lambda *x: jax.vjp(attend, *x)[1](cotangent), 2)


def test_skipped_tiles_are_not_read():
    """Infinities in keys and values that no query of a window sees reach neither results nor gradients."""
    q, k, v, cotangent = arrays(jnp.float32, batch=1, queries=8, keys=LENGTH, heads=2, kv_heads=1)
    positions = jnp.arange(12, 20)

    @jax.jit
    def run(k, v):
        def attend(q, k, v):
            return attnx.attention(q, k, v, mask=masks.sliding_window(4), query_positions=positions, implementation="blockwise", block_sizes=(4, 4))
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(cotangent)

    far = jnp.array([*range(8), *range(20, 24)])
    usual, loud = run(k, v), run(k.at[:, far].set(jnp.nan), v.at[:, far].set(jnp.nan))
    for a, b in zip(usual, loud):
        np.testing.assert_array_equal(a, b)


QUERIES, KEYS = 300, 330  # more than two blocks of tiles that slide, and no whole number of them
SLIDING = {
    "window, T5, sink": lambda: dict(mask=masks.sliding_window(40), scores=scores.t5_bias(jnp.sin(jnp.arange(32.0).reshape(8, 4)), max_distance=9),
                                     weights=weights.softmax(sink=jnp.arange(4.0))),
    "both sides, documents, dropout, full bias": lambda: dict(
        mask=masks.local(30, 70) & ~masks.documents(jnp.arange(QUERIES) // 9, jnp.arange(KEYS) // 7), dropout_rate=0.2, dropout_key=jax.random.key(1),
        scores=scores.bias(jnp.sin(jnp.arange(4.0 * QUERIES * KEYS).reshape(4, QUERIES, KEYS)))),
    "keys ahead alone, entmax": lambda: dict(mask=masks.local(0, 20) & ~masks.local(0, 3), weights=weights.entmax15()),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SLIDING)
def test_tiles_that_slide(name):
    """Where a mask limits how far a query sees, tiles that follow the blocks hold all that these see, queries without any key included."""
    call, inputs = SLIDING[name](), arrays(queries=QUERIES, keys=KEYS)
    assert_agree(blockwise(*inputs, block_sizes=None, **call), reference(*inputs, **call))


def test_one_tile_a_block_slides():
    """A block of queries visits one tile, at the keys that it sees; so does a block of keys."""
    q, k, v, cotangent = arrays(jnp.float32, batch=1, queries=QUERIES, keys=KEYS, heads=1, kv_heads=1)
    seen = []

    def noting(s, at):
        jax.debug.callback(lambda *x: seen.append(tuple(map(int, x))), at.query[0, 0], at.key[0, 0])
        return s

    def attend(q, k, v):
        return attnx.attention(q, k, v, scores=scores.elementwise(noting), mask=masks.sliding_window(40), implementation="blockwise")

    jax.block_until_ready(jax.jit(lambda *x: jax.vjp(attend, *x)[1](cotangent))(q, k, v))
    jax.effects_barrier()
    end = 3 * 128 - (128 + 64)
    assert sorted(seen) == sorted([(0, 0), (128, 128 - 39), (256, end), (0, 0), (128, 128), (end, 256)])
