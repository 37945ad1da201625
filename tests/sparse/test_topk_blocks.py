"""The choice of blocks against its definition written out, and the streaming form against the parallel one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks
from attnx.nn import Attention
from attnx.positions import Rotary
from attnx.sparse import topk_blocks

B, T, N, K, H = 2, 26, 4, 2, 8


def inputs(length=T):
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, H)
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def definition(query, key, value, block_size, num_blocks, query_block_size):
    """Every query with its list of blocks, as a mask."""
    q, k = np.asarray(query), np.asarray(key)
    allowed = np.zeros((B, N, T, T), bool)
    for b, n, i in np.ndindex(B, N, T):
        first, own, head = i // query_block_size * query_block_size, i // block_size, n // (N // K)
        router = q[b, first, head * (N // K):(head + 1) * (N // K)].mean(0)
        liked = sorted(range(own), key=lambda c: -router @ k[b, c * block_size:(c + 1) * block_size, head].mean(0))
        for c in [own, *liked[:num_blocks - 1]]:
            allowed[b, n, i, c * block_size:(c + 1) * block_size] = True
    return attnx.attention(query, key, value, mask=masks.explicit(allowed) & masks.causal(), implementation="reference")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("query_block_size", [1, 2])
def test_parallel_and_streaming_forms_are_the_definition(query_block_size):
    mechanism = topk_blocks(4, 3, query_block_size=query_block_size)
    operands = inputs()
    expected = definition(*operands, 4, 3, query_block_size)
    np.testing.assert_allclose(jax.jit(mechanism)(*operands), expected, atol=1e-12)

    state, outs, step = mechanism.init(B, T + 3, K, H, H, jnp.float64), [], jax.jit(mechanism.step)
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 16), (16, 17), (17, 18), (18, 25), (25, 26)):  # prefills begin inside blocks and across them
        state, out = step(state, *(x[:, start:end] for x in operands))
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, atol=1e-12)


def test_all_blocks_is_causal_attention_and_one_is_local():
    operands = inputs()
    local = attnx.attention(*operands, mask=masks.causal() & masks.within_blocks(4), implementation="reference")
    np.testing.assert_allclose(jax.jit(topk_blocks(4, 1, query_block_size=2))(*operands), local, atol=1e-5)
    full = attnx.attention(*operands, mask=masks.causal(), implementation="reference")
    np.testing.assert_allclose(jax.jit(topk_blocks(4, 9, query_block_size=2))(*operands), full, atol=1e-5)


def test_no_output_or_choice_depends_on_the_future():
    attend = jax.jit(topk_blocks(4, 2, query_block_size=2))
    query, key, value = inputs()
    before = attend(query, key, value)
    for t in (8, 10, 11, 13):  # at the beginning of blocks and inside them
        after = attend(*(x.at[:, t:].set(-3 * x[:, t:]) for x in (query, key, value)))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any()


@pytest.mark.parametrize("start", [8, 11])
def test_documents_and_padding_do_not_change_each_other(start):
    attend = jax.jit(topk_blocks(4, 2, query_block_size=2))
    query, key, value = inputs()
    segments = jnp.broadcast_to((jnp.arange(T) >= start).astype(jnp.int32), (B, T))
    positions = jnp.where(jnp.arange(T) >= start, jnp.arange(T), -1)
    for options in (dict(segment_ids=segments), dict(query_positions=positions, key_positions=positions)):
        out = attend(query, key, value, **options)
        moved = attend(*(x.at[:, :start].set(5 - 2 * x[:, :start]) for x in (query, key, value)), **options)
        np.testing.assert_array_equal(out[:, start:], moved[:, start:])
    alone = attend(*(x[:, 8:] for x in (query, key, value)))
    if start == 8:  # a document that begins with a block is attended to as if it were alone
        np.testing.assert_allclose(attend(query, key, value, segment_ids=segments)[:, 8:], alone, atol=1e-6)


def test_a_layer_decodes_what_it_computes_in_parallel():
    layer = Attention(16, N, num_kv_heads=K, mechanism=topk_blocks(4, 2, query_block_size=2), position=Rotary(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(3), (B, 12, 16))
    state, first = nnx.jit(lambda layer, x: layer.step(layer.init_state(B, 12), x))(layer, x[:, :11])
    _, last = nnx.jit(lambda layer, state, x: layer.step(state, x))(layer, state, x[:, 11:])
    np.testing.assert_allclose(jnp.concatenate([first, last], axis=1), nnx.jit(lambda layer, x: layer(x))(layer, x), atol=1e-5)


WRONG = {
    "block_size: expected an integer of at least 1, got 0": dict(block_size=0),
    "num_blocks: expected an integer": dict(num_blocks=1.5),
    "query_block_size: expected a divisor of block_size = 4, got 3": dict(block_size=4, query_block_size=3),
    "scores: expected a score": dict(scores=1.0),
    "implementation: expected one of": dict(implementation="blockwise"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((ValueError, TypeError), match=message):
        topk_blocks(**WRONG[message])


def test_cross_attention_is_refused():
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"key: expected the length 26 of query"):
        topk_blocks()(query, key[:, :8], value[:, :8])
