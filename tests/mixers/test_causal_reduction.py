"""Causal reduction: written out, its reach, its symmetries, ties, the future refused, and the mixer in a block."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import mixers
from attnx.mixers.causal_reduction import MODES, PAIRS
from attnx.nn import TransformerBlock

B, T, D = 2, 9, 3
X = jax.random.normal(jax.random.key(0), (B, T, D))
reduce = jax.jit(mixers.causal_reduce, static_argnames=("mode", "first"))


def written_out(x, mode, first="self", ids=(0,) * T):
    """Token by token."""
    x, out = np.asarray(x), []
    for t in range(T):
        start = list(ids).index(ids[t])
        before = x[:, t - 1] if t > start else x[:, t] if first == "self" else np.zeros((B, D))
        pair = {"min": np.minimum, "max": np.maximum, "mean": lambda a, b: (a + b) / 2}[mode.partition("_")[0]](x[:, t], before)
        seen = x[:, start:t + 1]
        out.append((pair + seen.mean(1)) / 2 if mode.endswith("+mean") else np.minimum(pair, seen.min(1)) if mode.endswith("+min") else pair)
    return np.stack(out, 1)


@pytest.mark.parametrize("mode", MODES)
def test_written_out(mode):
    """All modes, both first tokens, documents and padding before, between and after."""
    np.testing.assert_allclose(reduce(X, mode), written_out(X, mode), atol=1e-6)
    ids = np.arange(T) // 4
    np.testing.assert_allclose(reduce(X, mode, first="zero", segment_ids=jnp.broadcast_to(ids, (B, T))), written_out(X, mode, "zero", ids), atol=1e-6)
    padded = jnp.concatenate([jnp.full((B, 2, D), 50.0), X, jnp.full((B, 1, D), -50.0)], axis=1)
    out = reduce(padded, mode, positions=jnp.array([-1, -1, *range(T), -1]))
    np.testing.assert_allclose(out[:, 2:-1], written_out(X, mode), atol=1e-6)
    assert not out[:, :2].any() and not out[:, -1].any()


def test_stream():
    """Any cut; the state is as large for long texts as for short ones."""
    @partial(jax.jit, static_argnames=("mode", "first"))
    def read(x, mode, first):
        state, out = mixers.causal_reduce_init(B, D, mode), []
        for begin, end in ((0, 3), (3, 4), (4, T)):
            state, y = mixers.causal_reduce_step(state, x[:, begin:end], mode, first=first)
            out.append(y)
        return jnp.concatenate(out, axis=1)

    for mode in MODES:
        np.testing.assert_allclose(read(X, mode, "zero"), reduce(X, mode, first="zero"), atol=1e-6)
    np.testing.assert_allclose(read(X, "min_prev", "self"), reduce(X), atol=1e-6)
    mixer = mixers.CausalReductionMixer(D, rngs=nnx.Rngs(0))
    assert jax.eval_shape(lambda: mixer.init_state(B, 8)) == jax.eval_shape(lambda: mixer.init_state(B, 4096))


def test_reach():
    """Of a pair {t - 1, t}; with the running mean everything so far with weight 1 / (2 t); n layers reach n tokens back."""
    x = X[:1, :, :1]
    slope = lambda f: jax.jit(jax.jacobian(lambda x: f(x)[0, :, 0]))(x)[:, 0, :, 0]
    at = np.arange(T)
    pair = (at[:, None] - at <= 1) & (at[:, None] >= at)
    for mode in PAIRS:
        assert (slope(partial(mixers.causal_reduce, mode=mode))[~pair] == 0).all()
    assert (slope(partial(mixers.causal_reduce, mode="mean_prev"))[pair] > 0).all()
    own = slope(partial(mixers.causal_reduce, mode="min_prev"))
    with_mean = slope(partial(mixers.causal_reduce, mode="min_prev+mean"))
    np.testing.assert_allclose(with_mean - own / 2, np.tril(np.ones((T, T))) / (2 * (at[:, None] + 1)), atol=1e-6)
    three = slope(lambda x: mixers.causal_reduce(mixers.causal_reduce(mixers.causal_reduce(x, "mean_prev"), "mean_prev"), "mean_prev"))
    assert ((three != 0) == ((at[:, None] - at <= 3) & (at[:, None] >= at))).all()


def test_symmetries():
    """The maximum is the minimum turned round; constants stay; the minimum is monotone and moves no output further than the tokens; a tie shares the gradient."""
    np.testing.assert_allclose(reduce(X, "max_prev"), -reduce(-X, "min_prev"))
    for mode in MODES:
        np.testing.assert_allclose(reduce(jnp.full((B, T, D), 2.5), mode), 2.5, atol=1e-6)
    change = jnp.abs(jax.random.normal(jax.random.key(1), X.shape))
    moved = reduce(X + change) - reduce(X)
    assert (moved >= -1e-6).all() and moved.max() <= change.max() + 1e-6
    np.testing.assert_allclose(jax.grad(lambda x: mixers.causal_reduce(x)[0, 1, 0])(jnp.ones((1, 2, 1)))[0, :, 0], [0.5, 0.5])


def test_future():
    """A mean of everything is refused where causality is asked for, and is the mean of each document where it is not."""
    with pytest.raises(ValueError, match="sees the future"):
        mixers.context_vector(X, "global_mean")
    with pytest.raises(ValueError, match="sees the future"):
        mixers.CausalReductionMixer(D, "min_prev+mean", context="global_mean", rngs=nnx.Rngs(0))
    ids = jnp.broadcast_to(jnp.arange(T) // 4, (B, T))
    positions = jnp.where(jnp.arange(T) == 1, -1, jnp.arange(T))
    out = jax.jit(lambda x: mixers.context_vector(x, "global_mean", causal=False, segment_ids=ids, positions=positions))(X)
    np.testing.assert_allclose(out[:, 3], X[:, jnp.array([0, 2, 3])].mean(1), atol=1e-6)
    np.testing.assert_allclose(out[:, 4], X[:, 4:8].mean(1), atol=1e-6)
    mixer = mixers.CausalReductionMixer(D, "min_prev+mean", context="global_mean", causal=False, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda mixer, x: mixer(x))
    assert (call(mixer, X.at[:, -1].set(9.0)) != call(mixer, X))[:, 0].any()
    with pytest.raises(NotImplementedError, match="no streaming form"):
        mixer.init_state(B, T)


@pytest.mark.parametrize("where", ["attention", "no maps", "mlp", "alone"])
def test_in_a_block(where):
    """In place of attention, with and without maps, and in place of the MLP's activation beside it or alone: streams find what calls find."""
    rngs = nnx.Rngs(0)
    mixer = partial(mixers.CausalReductionMixer, D, rngs=rngs)
    attention = mixer("max_prev", place="activation") if where == "alone" else mixer("min_prev+mean", project_in=where != "no maps", project_out=where != "no maps")
    mlp = mixer("min_prev", place="activation", hidden_features=5) if where == "mlp" else None
    block = TransformerBlock(D, attention=attention, mlp=mlp, rngs=rngs)

    @nnx.jit
    def both(block, x, ids):
        state, out = block.init_state(B, T), []
        for begin, end in ((0, 4), (4, 5), (5, T)):
            state, y = block.step(state, x[:, begin:end])
            out.append(y)
        return block(x), jnp.concatenate(out, axis=1), block(x, segment_ids=ids)

    whole, streamed, packed = both(block, X, jnp.broadcast_to(jnp.arange(T) // 4, (B, T)))
    np.testing.assert_allclose(whole, streamed, atol=1e-5)
    np.testing.assert_allclose(packed[:, :4], whole[:, :4], atol=1e-5)
    assert np.abs(packed[:, 4] - whole[:, 4]).max() > 1e-3


def test_refusals():
    """Names that do not exist."""
    with pytest.raises(ValueError, match="mode: expected one of"):
        mixers.causal_reduce(X, "min")
    with pytest.raises(ValueError, match="first: expected"):
        mixers.causal_reduce(X, first="one")
    with pytest.raises(ValueError, match="kind: expected one of"):
        mixers.context_vector(X, "mean")
    with pytest.raises(ValueError, match="place: expected"):
        mixers.CausalReductionMixer(D, place="mlp", rngs=nnx.Rngs(0))
