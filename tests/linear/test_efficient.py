"""Efficient attention: the weights that it implies, what changes nothing, padding, the causal form, and the module for feature maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import linear

B, T, S, N, H, V = 2, 7, 9, 2, 4, 3
attend = jax.jit(linear.efficient_attention, static_argnames=("norm", "implementation"))


def inputs(queries=T, dtype=jnp.float32):
    shapes = ((B, queries, N, H), (B, S, N, H), (B, S, N, V))
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def test_weights():
    """The product of both softmaxes, whose rows sum to 1; and with norm='scale' the dot products over their number."""
    q, k, v = inputs()
    weights = jnp.einsum("btnh,bsnh->bnts", jax.nn.softmax(q, -1), jax.nn.softmax(k, 1))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v), jnp.einsum("bnts,bsnv->btnv", weights, v), atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, norm="scale"), jnp.einsum("btnh,bsnh,bsnv->btnv", q, k, v) / S, atol=1e-6)


def test_what_changes_nothing():
    """A constant for a query's channels, one for a channel of all keys, the order of tokens."""
    q, k, v = inputs()
    out = attend(q, k, v)
    np.testing.assert_allclose(attend(q + jnp.arange(T)[:, None, None], k + 10 * jnp.arange(H), v), out, atol=1e-5)
    order = jnp.array([3, 1, 0, 2, 8, 5, 7, 6, 4])
    np.testing.assert_allclose(attend(q, k[:, order], v[:, order]), out, atol=1e-6)
    np.testing.assert_allclose(attend(q[:, order[:T] % T], k, v), out[:, order[:T] % T], atol=1e-6)


@pytest.mark.parametrize("norm", ["softmax", "scale"])
def test_padding(norm):
    """Keys at -1 do not count, neither in sums nor in their number; with none there are zeros, and gradients are finite."""
    q, k, v = inputs()
    positions = jnp.where(jnp.arange(S) < 6, jnp.arange(S), -1)
    np.testing.assert_allclose(attend(q, k, v, norm=norm, key_positions=positions), attend(q, k[:, :6], v[:, :6], norm=norm), atol=1e-6)
    loss = lambda *args: jnp.sum(attend(*args, norm=norm, key_positions=jnp.full(S, -1)) ** 2)
    out, slopes = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert out == 0 and all(jnp.isfinite(x).all() for x in slopes)


def test_causal():
    """Its last row is the row of all tokens; it is Latte with a latent for a channel; steps find the same."""
    q, k, v = inputs(queries=S)
    out = jax.jit(linear.efficient_attention_causal)(q, k, v)
    np.testing.assert_allclose(out[:, -1], attend(q, k, v)[:, -1], atol=1e-6)
    np.testing.assert_allclose(out, jax.jit(linear.latte)(q, k, v), atol=1e-6)
    step = jax.jit(linear.efficient_step)
    state, first = step(linear.efficient_init(B, N, H, V), *(x[:, :5] for x in (q, k, v)))
    _, rest = step(state, *(x[:, 5:] for x in (q, k, v)))
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), out, atol=1e-5)


@pytest.mark.parametrize("norm", ["softmax", "scale"])
def test_maps(norm):
    """The module written out with 1x1 convolutions, in torch's terms."""
    layer = linear.EfficientAttention2d(6, key_channels=8, value_channels=4, num_heads=2, norm=norm, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, 5, 6))
    pixels = x.reshape(15, 6)
    project = lambda p, size: (pixels @ p.kernel[...].reshape(6, -1) + p.bias[...].reshape(-1)).reshape(15, 2, size)
    q, k, v = project(layer.query, 4), project(layer.key, 4), project(layer.value, 2)
    q, k = (jax.nn.softmax(q, 2), jax.nn.softmax(k, 0)) if norm == "softmax" else (q / 15**0.5, k / 15**0.5)
    found = jnp.einsum("tnh,nhv->tnv", q, jnp.einsum("snh,snv->nhv", k, v)).reshape(15, 4)
    expected = x + (found @ layer.out.kernel[...].reshape(4, 6) + layer.out.bias[...]).reshape(x.shape)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_errors():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="norm: expected"):
        linear.efficient_attention(q, k, v, norm="row")
    with pytest.raises(ValueError, match="key_channels: expected a multiple"):
        linear.EfficientAttention2d(6, key_channels=5, num_heads=2, rngs=nnx.Rngs(0))
