"""MoBA against its definition written out, its limits, packed documents, and switching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks
from attnx.nn import Attention, Stack, TransformerBlock, set_mechanism
from attnx.positions import Rotary
from attnx.sparse import moba, moba_attention, moba_dispatch, moba_gate, moba_layers

B, T, N, K, H, BLOCK, CHOSEN = 2, 38, 4, 2, 8, 8, 3


def inputs(length=T, dtype=jnp.float64):
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, H)
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def allowed(query, key, block, chosen):
    """The choice of every query and head, in loops."""
    q, k = np.asarray(query), np.asarray(key)
    out = np.zeros((B, N, q.shape[1], q.shape[1]), bool)
    for b, n, i in np.ndindex(B, N, q.shape[1]):
        own, head = i // block, n // (N // K)
        liked = sorted(range(own), key=lambda c: -q[b, i, n] @ k[b, c * block:(c + 1) * block, head].mean(0))
        for c in [own, *liked[:chosen - 1]]:
            out[b, n, i, c * block:(c + 1) * block] = True
    return jnp.asarray(out & np.tri(q.shape[1], dtype=bool))


def definition(query, key, value, seen):
    return attnx.attention(query, key, value, mask=masks.explicit(seen), implementation="reference")


def results(f, args):
    """Value and gradients."""
    return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2)))(*args)


@pytest.mark.usefixtures("x64")
def test_definition():
    """Sorting queries by block changes nothing, forward and backward; neither does reading token by token or in pieces."""
    args = inputs()
    seen = allowed(*args[:2], BLOCK, CHOSEN)
    expected = results(lambda *args: definition(*args, seen), args)
    for implementation in ("reference", "gathered"):
        got = results(lambda *args: moba_attention(*args, block_size=BLOCK, num_blocks=CHOSEN, implementation=implementation), args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, expected)
    mechanism = moba(BLOCK, CHOSEN)
    state, outs, step = mechanism.init(B, T + 3, K, H, H, jnp.float64), [], jax.jit(mechanism.step)
    for start, end in ((0, 10), (10, 20), (20, 21), (21, 22), (22, 32), (32, 35), (35, 38)):
        state, out = step(state, *(x[:, start:end] for x in args))
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), definition(*args, seen), atol=1e-11)


def test_choice():
    """min(M, own + 1) blocks a query, none of the future, its own besides; each pair once where it is said to be."""
    query, key, _ = inputs(dtype=jnp.float32)
    chosen = np.asarray(moba_gate(query, key, block_size=BLOCK, num_blocks=CHOSEN))
    own = np.arange(T) // BLOCK
    assert ((chosen >= 0).sum(-1) == np.minimum(CHOSEN - 1, own)).all() and (chosen < np.maximum(own, 0)[:, None]).all()
    assert (chosen[..., 0] != chosen[..., 1])[:, :, BLOCK:].all()
    tile = 4
    pairs = jax.tree.map(np.asarray, moba_dispatch(jnp.asarray(chosen), T // BLOCK, tile))
    for b, n in np.ndindex(B, N):
        listed = {(int(q), int(pairs.block[b, n, place // tile])) for place, q in enumerate(pairs.query[b, n]) if q >= 0}
        assert listed == {(i, int(c)) for i in range(T) for c in chosen[b, n, i] if c >= 0}
        assert (pairs.query[b, n] >= 0).sum() == len(listed)
        for i, j in np.argwhere(chosen[b, n] >= 0):
            place = pairs.place[b, n, i, j]
            assert pairs.query[b, n, place] == i and pairs.block[b, n, place // tile] == chosen[b, n, i, j]


def test_limits():
    """All blocks are causal attention; one is attention within blocks (where released code attends to everything)."""
    args = inputs(dtype=jnp.float32)
    full = attnx.attention(*args, mask=masks.causal(), implementation="reference")
    np.testing.assert_allclose(moba_attention(*args, block_size=BLOCK, num_blocks=9), full, atol=1e-5)
    local = attnx.attention(*args, mask=masks.causal() & masks.within_blocks(BLOCK), implementation="reference")
    np.testing.assert_allclose(moba_attention(*args, block_size=BLOCK, num_blocks=1), local, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_documents():
    """Packed documents are as if they were apart, wherever they begin; so is what padding lies between."""
    args, attend = inputs(), jax.jit(moba_attention, static_argnames=("block_size", "num_blocks", "implementation"))
    bounds = (0, 3, 20, 21, T)
    apart, some = (np.zeros((B, N, T, T), bool) for _ in range(2))
    for a, b in zip(bounds, bounds[1:]):
        apart[:, :, a:b, a:b] = allowed(*(x[:, a:b] for x in args[:2]), 4, 2)
    real = np.array([i not in (0, 1, 9, 30) for i in range(T)])
    some[np.ix_(range(B), range(N), real, real)] = allowed(*(x[:, real] for x in args[:2]), 4, 2)
    ids = jnp.broadcast_to(jnp.repeat(jnp.array([5, 2, 7, 2]), np.diff(bounds), total_repeat_length=T), (B, T))
    for seen, options in ((apart, dict(segment_ids=ids)), (some, dict(key_positions=jnp.where(real, jnp.arange(T), -1)))):
        for implementation in ("reference", "gathered"):
            out = attend(*args, block_size=4, num_blocks=2, implementation=implementation, **options)
            np.testing.assert_allclose(out, definition(*args, seen), atol=1e-12)


def test_causality():
    """No output depends on what follows, not by the mean of its own block either."""
    attend = jax.jit(lambda *args: moba_attention(*args, block_size=BLOCK, num_blocks=2))
    args = inputs(dtype=jnp.float32)
    before = attend(*args)
    for t in (16, 19, 23):
        after = attend(*(x.at[:, t:].set(-3 * x[:, t:]) for x in args))
        np.testing.assert_allclose(before[:, :t], after[:, :t], atol=1e-6)


def test_switching():
    """Layers change mechanism and keep their weights, in lists and in stacks; the last of a hybrid are full."""
    x = jax.random.normal(jax.random.key(0), (1, 20, 16))
    make = lambda mechanism: lambda *, rngs: TransformerBlock(16, attention=Attention(16, 2, mechanism=mechanism, position=Rotary(), rngs=rngs), rngs=rngs)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(*(make(mechanism)(rngs=rngs) for mechanism in moba_layers(3, full_last=1, block_size=4, num_blocks=2)))
    sparse = model(x)
    assert set_mechanism(model, attnx.pairs(mask=masks.causal())) == 3
    full = model(x)
    assert jnp.abs(full - sparse).max() > 1e-3
    set_mechanism(model, moba_layers(3, full_last=1, block_size=4, num_blocks=2))
    np.testing.assert_allclose(model(x), sparse, atol=1e-6)
    set_mechanism(model, moba(4, 5))
    np.testing.assert_allclose(model(x), full, atol=1e-5)
    stack = Stack(make(moba(4, 5)), 2, rngs=nnx.Rngs(0))
    every = stack(x)
    assert set_mechanism(stack, moba(4, 1)) == 1 and jnp.abs(stack(x) - every).max() > 1e-3
    with pytest.raises(ValueError, match="mechanism: expected one, or one for each of the 3"):
        set_mechanism(model, moba_layers(2))


def test_errors():
    query, key, value = inputs(dtype=jnp.float32)
    with pytest.raises(ValueError, match="key: expected the length 38"):
        moba_attention(query, key[:, 1:], value[:, 1:])
    with pytest.raises(ValueError, match="block_size: expected an integer"):
        moba(0)
    with pytest.raises(ValueError, match="segment_ids: expected shape"):
        moba_attention(query, key, value, segment_ids=jnp.zeros((1, 3), int))
