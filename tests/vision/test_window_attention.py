"""Windows of an image: layer and block against dense masked attention, shifts, padding, kernels, dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import vision
from attnx.core import fused


def dense(layer, x):
    """The layer with all pairs of an image: who shares a window and a side of the borders is worked out pixel by pixel."""
    _, height, width, features = x.shape
    heads, (w, _), (s, _) = layer.num_heads, layer.window, layer.shift
    q, k, v = np.asarray(layer.project(x)).reshape(-1, height * width, 3, heads, features // heads).transpose(2, 0, 3, 1, 4)
    table, sides = np.asarray(layer.bias[...]), [-(-n // w) * w for n in (height, width)]
    rolled = [[((p[axis] - s) % sides[axis], p[axis] < s) for axis in range(2)] for p in np.ndindex(height, width)]
    bias = np.full((heads, height * width, height * width), -np.inf)
    for i, a in enumerate(rolled):
        for j, b in enumerate(rolled):
            if all(m // w == n // w and side == other for (m, side), (n, other) in zip(a, b)):
                down, right = (m - n + w - 1 for (m, _), (n, _) in zip(a, b))
                bias[:, i, j] = table[down * (2 * w - 1) + right]
    p = np.exp(q @ np.swapaxes(k, 2, 3) / np.sqrt(q.shape[-1]) + bias)
    out = (p / p.sum(-1, keepdims=True)) @ v
    return layer.out(jnp.asarray(out.transpose(0, 2, 1, 3).reshape(x.shape)))


def block(features=12, heads=3, window=7, shift=3, **options):
    made = vision.SwinBlock(features, heads, window, shift=shift, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    made.attention.bias[...] = jnp.sin(jnp.arange(float(made.attention.bias[...].size))).reshape(made.attention.bias[...].shape)
    return made


def run(module, x):
    """Compiled, as what is static in a module may have changed."""
    graph, state = nnx.split(module)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def image(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape))


@pytest.mark.parametrize("shift", [0, 3])
def test_block_is_dense_masked_attention(shift, x64):
    """On a map of 14 x 14, with windows of 7 x 7; materialised, in blocks, and by the kernels of both platforms."""
    x, made = image(1, 14, 14, 12), block(shift=shift)
    seen = dense(made.attention, made.attention_norm(x))
    y = x + seen
    expected = y + made.down(jax.nn.gelu(made.up(made.mlp_norm(y)), approximate=False))
    np.testing.assert_allclose(run(made, x), expected, atol=1e-12)
    made.attention.implementation = "blockwise"
    np.testing.assert_allclose(run(made, x), expected, atol=1e-12)
    made.attention.implementation = "pallas"
    for platform in fused.PLATFORMS if shift else ():
        with fused.forced(platform=platform):
            np.testing.assert_allclose(run(made, x), expected, atol=1e-12)


def test_padding_is_not_seen(x64):
    """A map that windows do not tile, shifted."""
    x, layer = image(2, 5, 6, 12), block(window=4, shift=1).attention
    np.testing.assert_allclose(run(layer, x), dense(layer, x), atol=1e-12)


def test_other_dimensions_and_small_grids():
    for grid, window, shift in (((10,), 4, 2), ((3, 5, 4), (2, 4, 3), (1, 2, 0)), ((3, 3), 4, 2)):
        layer = vision.WindowAttention(8, 2, window, shift=shift, dimensions=len(grid), rngs=nnx.Rngs(0))
        x = image(2, *grid, 8).astype(jnp.float32)
        assert run(layer, x).shape == x.shape
    far = x.at[:, 0, 0].add(1.0)
    assert jnp.abs(run(layer, far) - run(layer, x))[:, 2, 2].max() > 1e-6  # one window holds a grid that is no larger, shifted or not


def test_bias_table_learns():
    """Its gradient reaches every row that a pair of the window has, which are all."""
    layer = vision.WindowAttention(8, 2, 3, rngs=nnx.Rngs(0))
    x = image(1, 6, 6, 8).astype(jnp.float32)
    gradient = nnx.jit(nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x)))))(layer).bias[...]
    assert gradient.shape == (25, 2) and jnp.all(gradient != 0)


def test_says_what_is_wrong():
    make = lambda *args, **options: vision.WindowAttention(8, *args, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        make(3, 4)
    with pytest.raises(ValueError, match="window: expected an integer or one for each of 2"):
        make(2, (4, 4, 4))
    with pytest.raises(ValueError, match="shift: expected less than the window"):
        make(2, 4, shift=4)
    with pytest.raises(ValueError, match=r"x: expected \[B, \*grid, 8\]"):
        make(2, 4)(jnp.ones((1, 4, 8)))
