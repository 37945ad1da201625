"""Masks: which pairs they allow, what they claim of tiles, how many keys they show, how far they see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import masks
from attnx.core import reference
from attnx.core.attention import prepare
from attnx.core.tiling import Tiling, cover, pad_to_blocks
from pallas_kernels.parts import Range

B, T, S, N, BLOCKS = 2, 13, 11, 2, (4, 3)
PLAIN = np.broadcast_to(np.arange(T), (B, T)), np.broadcast_to(np.arange(S), (B, S))


def draw(seed, shape, low, high):
    return np.random.default_rng(seed).integers(low, high, shape)


IDS, KEY_IDS = np.sort(draw(0, (B, T), 0, 4)), np.sort(draw(1, (B, S), 0, 4))
GIVEN = draw(2, (B, N, T, S), 0, 4) == 0
LENGTHS, KEY_LENGTHS = np.array([T, 5]), np.array([0, 7])


def window(at, size):
    return abs(at.query - at.key) < size


def window_cover(query, key, size):
    apart = jnp.maximum(key.low - query.high, query.low - key.high)
    return apart < size.high, jnp.maximum(key.high - query.low, query.high - key.low) < size.low


# name: (mask, its definition over b, n, i, j: batch, head, logical positions, and t, s: storage indices)
MASKS = {
    "causal": (masks.causal(), lambda b, n, i, j, t, s: j <= i),
    "sliding_window": (masks.sliding_window(4), lambda b, n, i, j, t, s: (i - 4 < j) & (j <= i)),
    "local": (masks.local(2, 3), lambda b, n, i, j, t, s: (i - 2 <= j) & (j <= i + 3)),
    "local to the left": (masks.local(2), lambda b, n, i, j, t, s: i - 2 <= j),
    "prefix": (masks.prefix(jnp.array([4, 0])), lambda b, n, i, j, t, s: j < np.array([4, 0])[b]),
    "documents": (masks.documents(jnp.array(IDS), jnp.array(KEY_IDS)), lambda b, n, i, j, t, s: IDS[b, t] == KEY_IDS[b, s]),
    "lengths": (masks.lengths(jnp.array(LENGTHS), jnp.array(KEY_LENGTHS)), lambda b, n, i, j, t, s: (i < LENGTHS[b]) & (j < KEY_LENGTHS[b])),
    "key lengths": (masks.lengths(key_lengths=6), lambda b, n, i, j, t, s: (j < 6) & (i == i)),
    "explicit": (masks.explicit(jnp.array(GIVEN)), lambda b, n, i, j, t, s: GIVEN[b, n, t, s]),
    "explicit columns": (masks.explicit(jnp.array(GIVEN[0, :, :1])), lambda b, n, i, j, t, s: GIVEN[0, n, 0, s]),
    "dilated": (masks.dilated(3), lambda b, n, i, j, t, s: (i - j) % 3 == 0),
    "strided_columns": (masks.strided_columns(4, 2), lambda b, n, i, j, t, s: (j % 4 >= 2) & (i == i)),
    "within_blocks": (masks.within_blocks(5), lambda b, n, i, j, t, s: i // 5 == j // 5),
    "predicate": (masks.predicate(window, jnp.asarray(3)), lambda b, n, i, j, t, s: abs(i - j) < 3),
    "predicate with cover": (masks.predicate(window, jnp.asarray(3), cover=window_cover), lambda b, n, i, j, t, s: abs(i - j) < 3),
}
# Where positions are consecutive these know their tiles exactly, not only safely.
EXACT = ["causal", "sliding_window", "local", "local to the left", "prefix", "documents", "lengths", "key lengths", "within_blocks", "predicate with cover"]


@jax.jit
def evaluate(mask, query_positions, key_positions):
    """Which pairs are allowed [B, N, T, S], and the tile table broadcast to [B, N, tiles, tiles]."""
    arrays = jnp.zeros((B, T, N, 1)), jnp.zeros((B, S, N, 1))
    _, program, data = prepare(*arrays, None, mask=mask, query_positions=query_positions, key_positions=key_positions)
    tiling = Tiling(*BLOCKS, 1)
    table = cover(program, pad_to_blocks(program, data, tiling), tiling)
    _, ok = reference.scores(program, data)
    shape = (B, N, 1, -(-T // BLOCKS[0]), -(-S // BLOCKS[1]))
    return ok[:, :, 0], *(jnp.broadcast_to(x, shape)[:, :, 0] for x in table)


def by_tile(allowed, reduce):
    padded = np.pad(allowed, [(0, 0), (0, 0), (0, -T % BLOCKS[0]), (0, -S % BLOCKS[1])])
    return reduce(padded.reshape(B, N, -1, BLOCKS[0], padded.shape[3] // BLOCKS[1], BLOCKS[1]), axis=(3, 5))


def definition(name, query, key):
    b, n, t, s = np.ogrid[:B, :N, :T, :S]
    i, j = query[b, t], key[b, s]
    return MASKS[name][1](b, n, i, j, t, s) & (i >= 0) & (j >= 0)


@pytest.mark.parametrize("name", MASKS)
def test_pairs_and_tiles(name):
    """The pairs are those of the definition, in positions; no tile is called empty or full that is not."""
    positions = [PLAIN] + [(draw(seed, (B, T), -1, 20), draw(seed + 9, (B, S), -1, 20)) for seed in range(3)]
    positions.append((np.where(PLAIN[0] < 8, -1, PLAIN[0]), np.full((B, S), -1)))
    for query, key in positions:
        allowed, some, every = map(np.asarray, evaluate(MASKS[name][0], query, key))
        np.testing.assert_array_equal(allowed, np.broadcast_to(definition(name, query, key), allowed.shape))
        assert (some >= by_tile(allowed, np.any)).all()
        assert (every <= by_tile(allowed, np.all)).all()
        if name in EXACT and query is PLAIN[0]:
            np.testing.assert_array_equal(some, by_tile(allowed, np.any))
            np.testing.assert_array_equal(every, by_tile(allowed, np.all))


def test_composition():
    """Operators combine pairs, operands and tile claims; data stays with its own mask, in any order."""
    a, b, c = (MASKS[name][0] for name in ("documents", "lengths", "explicit"))
    A, B_, C = (definition(name, *PLAIN) for name in ("documents", "lengths", "explicit"))
    real = np.ones((B, N, T, S), bool)
    for mask, expected in ((a & b & c, A & B_ & C), (c & (b | a), C & (B_ | A)), (~(a & b) | ~c, (~(A & B_) | ~C) & real), (~(a | ~b), ~(A | ~B_))):
        allowed, some, every = map(np.asarray, evaluate(mask, *PLAIN))
        np.testing.assert_array_equal(allowed, np.broadcast_to(expected, allowed.shape))
        assert (some >= by_tile(allowed, np.any)).all() and (every <= by_tile(allowed, np.all)).all()
    assert ~~a is a and (a & None) is a


def test_parts_are_pytrees():
    """A mask is an argument like any other: arrays are leaves, the rest is static; equal statics and the same arrays key compilation."""
    documents = MASKS["documents"][0]
    assert [x.shape for x in jax.tree.leaves(documents & masks.causal())] == [(B, T), (B, S)]
    for one, same, other in ((masks.sliding_window(4), masks.local(3, 0), masks.sliding_window(5)),
                             (documents & masks.causal(), documents & masks.causal(), masks.documents(documents.query_ids + 1) & masks.causal())):
        assert one == same != other and hash(one) == hash(same)


@pytest.mark.parametrize("name", MASKS)
def test_count(name):
    """Where a mask knows how many keys each query sees, it is right; so is its negation."""
    mask, query, key = MASKS[name][0], np.arange(-0, 20), Range(3, 9)
    for chosen in (mask, ~mask):
        counted = chosen.count(query, key)
        if counted is None:
            assert name not in ("causal", "sliding_window", "local", "local to the left")
            continue
        seen = MASKS[name][1](0, 0, query[:, None], np.arange(3, 10), None, None)
        np.testing.assert_array_equal(counted, (seen if chosen is mask else ~seen).sum(1))


SPANS = {
    "causal": (masks.causal(), (None, 0)),
    "window": (masks.sliding_window(4), (3, 0)),
    "local": (masks.local(2), (2, None)),
    "prefix": (masks.prefix(3), (None, None)),
    "negation": (~masks.sliding_window(4), (None, None)),
    "narrower": (masks.local(5, 2) & masks.local(3, 7), (3, 2)),
    "wider": (masks.local(5, 2) | masks.local(3, 7), (5, 7)),
    "window or anything": (masks.sliding_window(4) | masks.dilated(3), (None, None)),
    "window of documents": (masks.sliding_window(4) & MASKS["documents"][0], (3, 0)),
}


@pytest.mark.parametrize("name", SPANS)
def test_span(name):
    """How far a query sees to each side."""
    mask, expected = SPANS[name]
    assert mask.span() == expected


def test_the_same_mask_by_other_names():
    """One pattern said in four ways gives the same weights."""
    q = k = jnp.ones((1, 6, 1, 4))
    same = [masks.sliding_window(3), masks.local(2, 0), masks.causal() & masks.local(2), masks.explicit(jnp.tril(jnp.ones((6, 6), bool)) & ~jnp.tril(
        jnp.ones((6, 6), bool), -3))]
    first, *others = jax.jit(lambda: [attnx.attention_weights(q, k, mask=mask) for mask in same])()
    for other in others:
        np.testing.assert_array_equal(first, other)
