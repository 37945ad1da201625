"""SageBwd: against an emulation in NumPy, gradients near those in float32, what keys' mean is to them, which product is not rounded, executions, kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import masks, products
from attnx.core import fused
from pallas_kernels.products import multiply

QUERIES, KEYS = 128, 64


def cosine(a, b):
    a, b = (np.ravel(x).astype(np.float64) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def normal(seed, *shapes, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def int8(x, rows, columns):
    """Rounded to 8 bits at a scale for each block of a matrix."""
    out = np.zeros_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i:i + rows, j:j + columns]
            scale = np.abs(part).max() / 127 or 1
            out[i:i + rows, j:j + columns] = np.trunc(part / scale + np.copysign(0.5, part)) * scale
    return out


def emulated(q, k, v, do):
    """Output and gradients of one head, causal, all keys in one tile."""
    (n, h), width = q.shape, v.shape[1]
    k = k - k.mean(0)
    q8, k8 = int8(q, QUERIES, h), int8(k, KEYS, h)
    s = np.where(np.tri(n, dtype=bool), q8 @ k8.T / np.sqrt(h), -np.inf)
    m = s.max(1, keepdims=True)
    p = np.exp(s - m)
    total = p.sum(1, keepdims=True)
    out = int8(p, 1, KEYS) @ int8(v, KEYS, width) / total
    p = p / total
    ds = p * (do @ v.T - (do * out).sum(1, keepdims=True)) / np.sqrt(h)
    ds8 = int8(ds, QUERIES, KEYS)
    return out, ds8 @ k8, ds8.T @ q8, int8(p, QUERIES, KEYS).T @ int8(do, QUERIES, width)


@functools.cache
def run(attend, **options):
    """``(q, k, v, cotangent) -> (out, dq, dk, dv)``."""
    def both(*args):
        out, pull = jax.vjp(lambda *args: attend(*args, **options), *args[:3])
        return out, *pull(args[3])

    return jax.jit(both)


def test_is_the_emulation(x64):
    """In float64, so that no sum in another order tips a code."""
    q, k, v, do = normal(0, *[(1, 200, 1, 32)] * 3, (1, 200, 1, 32), dtype=np.float64)
    k = k.at[..., :2].add(6)
    got = run(products.sagebwd_attention, is_causal=True, implementation="blockwise")(q, k, v, do)
    expected = emulated(*(np.asarray(x)[0, :, 0] for x in (q, k, v, do)))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a[0, :, 0], b, atol=1e-9)


def test_gradients_are_near_those_in_float32():
    """All of them, with grouped heads, in several tiles."""
    args = normal(1, (1, 500, 2, 64), (1, 500, 1, 64), (1, 500, 1, 64), (1, 500, 2, 64))
    got = run(products.sagebwd_attention, is_causal=True, tile_sizes=(256, 256))(*args)
    expected = run(attnx.attention, mask=masks.causal(), implementation="reference")(*args)
    for a, b in zip(got, expected):
        assert 0.99 <= cosine(a, b) < 1 - 1e-6


def test_smoothed_keys_serve_the_gradient_of_queries():
    """Rows of ds sum to zero, so the keys' mean adds nothing to ds k; where it is large, keys with it are worse to round."""
    q, k, v, do = normal(2, *[(1, 200, 1, 32)] * 4)
    k = k + 8
    s = jax.nn.softmax((q[0, :, 0] @ k[0, :, 0].T) / np.sqrt(32))
    dp = do[0, :, 0] @ v[0, :, 0].T
    ds = s * (dp - jnp.sum(s * dp, 1, keepdims=True))
    np.testing.assert_allclose(ds @ (k[0, :, 0] - k[0, :, 0].mean(0)), ds @ k[0, :, 0], atol=1e-5)
    whole = run(products.sagebwd_attention, products=products.Products(), smooth_k=False)(q, k, v, do)
    same = run(products.sagebwd_attention, products=products.Products())(q, k, v, do)
    for a, b in zip(same, whole):
        np.testing.assert_allclose(a, b, atol=1e-5)
    smooth, plain = (run(products.sagebwd_attention, smooth_k=flag)(q, k, v, do)[1] for flag in (True, False))
    assert 1 - cosine(plain, whole[1]) > 10 * (1 - cosine(smooth, whole[1]))


def test_dp_is_not_rounded():
    """It is the product of the operands as they are; the others are not."""
    chosen = products.sagebwd_products()
    p, v, k, do = normal(3, (128, 64), (64, 32), (64, 32), (128, 32))
    same = lambda name, a, b, contract: bool((chosen.dot(name, a, b, contract) == multiply(a, b, contract)).all())
    assert same("dp", do, v, (1, 1))
    assert not any([same("scores", do, k, (1, 1)), same("values", p, v, (1, 0)), same("dv", p, do, (0, 0)), same("dq", p, k, (1, 0)), same("dk", p, do, (0, 0))])


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_executions_agree(platform, x64):
    """Output and gradients of the definition and of kernels, emulated: all keys in one tile, in float64, so that no sum in another order tips a code."""
    args = normal(6, (1, 150, 4, 32), (1, 140, 2, 32), (1, 140, 2, 16), (1, 150, 4, 16), dtype=np.float64)
    expected = run(products.sagebwd_attention, is_causal=True, implementation="reference")(*args)
    with fused.forced(platform=platform):
        got = jax.jit(lambda *args: run.__wrapped__(products.sagebwd_attention, is_causal=True, implementation="pallas", tile_sizes=(256, 256))(*args))(*args)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_rows_without_a_key():
    q, k, v, do = normal(7, *[(1, 40, 2, 16)] * 4)
    mask = masks.lengths(key_lengths=jnp.zeros(1, int))
    for x in run(products.sagebwd_attention, mask=mask)(q, k, v, do):
        assert not x.any()
    out, r = products.sagebwd_attention(q, k + 2, v, return_residual=True)
    expected, exact = attnx.attention(q, k + 2, v, return_residual=True)
    assert cosine(out, expected) > 0.999 and float(jnp.abs(r - exact).max()) < 0.05
    with pytest.raises(TypeError, match="products: expected"):
        products.sagebwd_attention(q, k, v, products="int8")
