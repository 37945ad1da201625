"""Rounding to few bits: its error, its gradient, weights and whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import analysis, masks
from attnx.nn import Attention


@pytest.mark.parametrize("symmetric", (False, True))
def test_fake_quantize(x64, symmetric):
    """Off by half a step at the most, the same when rounded again, and 2^bits values at the most."""
    x = jax.random.normal(jax.random.key(0), (1000,)) + 0.5
    for bits in (2, 8):
        y = analysis.fake_quantize(x, bits, symmetric=symmetric)
        step = jnp.abs(x).max() / (2 ** (bits - 1) - 1) if symmetric else (x.max() - x.min()) / (2**bits - 1)
        assert jnp.abs(y - x).max() <= step / 2 * (1 + 1e-9) and len(np.unique(y)) <= 2**bits
        np.testing.assert_allclose(analysis.fake_quantize(y, bits, symmetric=symmetric), y, atol=1e-12)
    assert analysis.fake_quantize(jnp.zeros(3)).tolist() == [0, 0, 0]
    inside = jnp.abs(x) < 0.9
    np.testing.assert_array_equal(jax.grad(lambda x: analysis.fake_quantize(x, 4, range=(-1, 1), symmetric=symmetric).sum())(x)[inside], 1)


def test_percentile():
    """An outlier beyond the percentile is clipped, and the rest keeps small steps."""
    x = jnp.append(jnp.linspace(-1, 1, 9999), 1000.0)
    y = analysis.fake_quantize(x, 8, range="percentile", percentile=99.9)
    assert y[-1] < 1.1 and jnp.abs(y - x)[:-1].max() < 0.01
    with pytest.raises(ValueError, match="range: expected"):
        analysis.fake_quantize(x, range="most")


def test_measures():
    """Kurtosis of normal numbers; the largest activation of each sequence."""
    assert abs(analysis.activation_kurtosis(jax.random.normal(jax.random.key(0), (100_000,))) - 3) < 0.1
    x = jax.random.normal(jax.random.key(1), (3, 5, 7))
    np.testing.assert_allclose(analysis.max_inf_norm(x), np.mean([np.abs(y).max() for y in x]), rtol=1e-6)


def test_model_by_hand():
    """Operands and results of products are rounded in their ranges, weights in their own, and the last product not at all."""
    def model(w, x):
        return jax.nn.relu(x @ w["in"]) @ w["out"]

    w = {"in": jax.random.normal(jax.random.key(0), (4, 8)), "out": jax.random.normal(jax.random.key(1), (8, 3))}
    x = jax.random.normal(jax.random.key(2), (2, 5, 4))
    ranges = analysis.calibrate(model, w, x, momentum=0.75)
    average = lambda f: 0.75 * f(x[0]) + 0.25 * f(x[1])
    wanted = average(jnp.min), average(jnp.max)
    np.testing.assert_allclose(ranges.products[0][0], wanted, rtol=1e-6)
    hidden = x[0] @ w["in"]
    y = analysis.fake_quantize(x[0], 5, range=wanted) @ analysis.fake_quantize(w["in"], 4, symmetric=True)
    y = analysis.fake_quantize(y, 5, range=(average(lambda x: (x @ w["in"]).min()), average(lambda x: (x @ w["in"]).max())))
    got = analysis.quantized(model, ranges, bits=5, weight_bits=4)(w, x[0])
    np.testing.assert_allclose(got, jax.nn.relu(y) @ w["out"], atol=1e-5)
    assert jnp.abs(y - hidden).max() > 1e-2


def test_attention():
    """A layer of attention: more bits cost less, many cost nothing; products in loops are refused."""
    def layer(implementation):
        graph, params, rest = nnx.split(Attention(16, 4, mechanism=attnx.pairs(mask=masks.causal(), implementation=implementation), rngs=nnx.Rngs(0)),
                                        nnx.Param, ...)
        return params, lambda params, x: nnx.merge(graph, params, rest)(x)

    params, call = layer("reference")
    x = jax.random.normal(jax.random.key(0), (1, 9, 16))
    ranges = analysis.calibrate(call, params, [x])
    assert len(ranges.products) == 6  # query, key, value, scores, values, out
    error = [jnp.abs(jax.jit(analysis.quantized(call, ranges, bits=bits, weight_bits=bits))(params, x) - call(params, x)).max() for bits in (4, 8, 20)]
    assert error[2] < 1e-4 < error[1] < error[0] / 4
    params, call = layer("blockwise")
    with pytest.raises(NotImplementedError, match="outside of loops"):
        analysis.calibrate(call, params, [x])


def test_weights():
    """Matrices are rounded, vectors not."""
    tree = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jax.random.normal(jax.random.key(1), (8,))}
    rounded = analysis.quantize_weights(tree, 4)
    assert (rounded["bias"] == tree["bias"]).all() and len(np.unique(rounded["kernel"])) <= 16
