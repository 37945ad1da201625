"""Latte: what its weights are, what changes nothing, the window under one distribution, streaming in constant memory, and its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import linear, masks
from attnx.catalogue import stream
from attnx.linear.latent_states import LatteWindow

B, T, N, L, H, V, W = 2, 9, 2, 4, 6, 3, 4
latte = jax.jit(linear.latte, static_argnames=("is_causal", "implementation", "return_state"))


def inputs(*sizes, seed=0):
    return [jax.random.normal(jax.random.key(seed + i), (B, T, N, size)) for i, size in enumerate(sizes)]


def test_first_token_and_one_latent():
    """The first token finds itself; one latent pools the past whatever the query."""
    q, k, v = inputs(L, L, V)
    out = latte(q, k, v)
    np.testing.assert_allclose(out[:, 0], v[:, 0], atol=1e-6)
    one = latte(q[..., :1], k[..., :1], v)
    e = jnp.exp(k[..., :1])
    np.testing.assert_allclose(one, jnp.cumsum(e * v, 1) / jnp.cumsum(e, 1), atol=1e-5)
    np.testing.assert_allclose(latte(7 - q[..., :1], k[..., :1], v), one, atol=1e-6)


def test_constants_change_nothing():
    """One number more for a latent's logits of all tokens, or for a query's of all latents; nor does the future."""
    q, k, v = inputs(L, L, V)
    out = latte(q, k, v)
    np.testing.assert_allclose(latte(q + jnp.arange(T)[:, None, None], k + 10 * jnp.arange(L), v), out, atol=2e-5)
    later = jnp.arange(T)[:, None, None] >= 5
    np.testing.assert_allclose(latte(q, jnp.where(later, 3 - k, k), jnp.where(later, -v, v))[:, :5], out[:, :5], atol=1e-6)


def test_both_ways_is_efficient_attention():
    """With a latent for a channel; and the last causal row sees as much."""
    q, k, v = inputs(L, L, V)
    both = latte(q, k, v, is_causal=False)
    np.testing.assert_allclose(both, linear.efficient_attention(q, k, v), atol=1e-6)
    np.testing.assert_allclose(latte(q, k, v)[:, -1], both[:, -1], atol=1e-6)


def test_recurrence():
    """The paper's: sums rescaled by a running maximum, token by token."""
    q, k, v = inputs(L, L, V)
    k = k + jnp.array([-80.0, 0, 40, 80])
    top, z, s, outs = jnp.full((B, N, L), -jnp.inf), jnp.zeros((B, N, L)), jnp.zeros((B, N, L, V)), []
    for t in range(T):
        now = jnp.maximum(top, k[:, t])
        keep, new = jnp.exp(top - now), jnp.exp(k[:, t] - now)
        z, s, top = z * keep + new, s * keep[..., None] + new[..., None] * v[:, t, :, None], now
        outs.append(jnp.einsum("bnl,bnlv->bnv", jax.nn.softmax(q[:, t], -1), s / z[..., None]))
    np.testing.assert_allclose(latte(q, k, v), jnp.stack(outs, 1), atol=2e-5)


def test_state_does_not_grow():
    """Bytes of the state are those of any length, of latents alone and with a window."""
    bytes_of = lambda mechanism, length: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(
        jax.eval_shape(lambda: mechanism.init(1, length, N, H, V, jnp.float32))))
    for mechanism in (linear.position_softmax(), LatteWindow(W, L)):
        assert bytes_of(mechanism, 64) == bytes_of(mechanism, 8192)


def test_window():
    """The probability of latent 0 is that of softmax attention nearby: written out, and at both ends."""
    p, k, q, key, v = inputs(L + 1, L, H, H, V)
    run = jax.jit(linear.latte_window, static_argnames=("window", "implementation"))
    near = attnx.attention(q, key, v, mask=masks.sliding_window(W))
    weights = jax.nn.softmax(p, -1)
    allowed = jnp.tril(jnp.ones((T, T), bool))[None, :, :, None, None]
    e = jnp.where(allowed, jnp.exp(k[:, None]), 0)
    far = jnp.einsum("btnl,btsnl,bsnv->btnv", weights[..., 1:], e / e.sum(2, keepdims=True), v)
    np.testing.assert_allclose(run(p, k, q, key, v, window=W), weights[..., :1] * near + far, atol=1e-5)
    np.testing.assert_allclose(run(p.at[..., 0].set(60.0), k, q, key, v, window=W), near, atol=1e-5)
    np.testing.assert_allclose(run(p.at[..., 0].set(-60.0), k, q, key, v, window=W), latte(p[..., 1:], k, v), atol=1e-5)
    ids = jnp.broadcast_to(jnp.arange(T) >= 4, (B, T)).astype(jnp.int32)
    packed = run(p, k, q, key, v, window=W, segment_ids=ids)
    np.testing.assert_allclose(packed[:, 4:], run(*(x[:, 4:] for x in (p, k, q, key, v)), window=W), atol=1e-5)


LAYERS = {"latents": lambda rngs: linear.LatteAttention(16, 2, latents=8, rngs=rngs),
          "window": lambda rngs: linear.LatteWindowAttention(16, 2, latents=8, window=3, num_kv_heads=1, rngs=rngs)}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    """Prefill and steps find what the call finds, padding is skipped, and every parameter has a gradient."""
    graph, params, rest = nnx.split(LAYERS[name](nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (2, T, 16))

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        state, first = layer.step(layer.init_state(batch=2, max_length=T), x[:, :5])
        others = stream(layer.step, state, x[:, 5:])
        return layer(x, positions=jnp.arange(T)), jnp.concatenate([first, others], axis=1), layer(x, positions=jnp.where(jnp.arange(T) < 6, jnp.arange(T), -1))

    whole, stepped, padded = both(params, x)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    np.testing.assert_allclose(padded[:, :6], whole[:, :6], atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params, rest)(x) ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_sizes():
    """Latents are over all heads; a window's queries have one latent more."""
    layer = linear.LatteAttention(16, 2, latents=8, rngs=nnx.Rngs(0))
    assert layer.query.kernel.shape == (16, 2, 4) and layer.value.kernel.shape == (16, 2, 8)
    with pytest.raises(ValueError, match="latents: expected a multiple"):
        linear.LatteAttention(16, 2, latents=7, rngs=nnx.Rngs(0))
    p, k, q, key, v = inputs(L, L, H, H, V)
    with pytest.raises(ValueError, match="query_logits: expected shape"):
        linear.latte_window(p, k, q, key, v, window=W)
