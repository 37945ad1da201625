"""SageAttention3: against an emulation by casts, smoothing without rounding, what each step is good for, executions, gradients, refusals."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import attnx
from attnx import masks, products
from attnx.core import fused
from pallas_kernels.quantised.microscaling import rounded

N, H = 512, 64


def cosine(a, b):
    a, b = (np.ravel(x).astype(np.float64) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def normal(seed, *shapes, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def nvfp4(x, axis):
    """Rounded by casts, in groups of 16 along an axis of a matrix whose length 16 divides."""
    x = x if axis == 1 else x.T
    grouped = x.reshape(len(x), -1, 16)
    scale = (np.abs(grouped).max(-1, keepdims=True) / np.float32(6)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.where(scale > 0, grouped / np.where(scale > 0, scale, 1), 0).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    x = (codes * scale).reshape(x.shape)
    return x if axis == 1 else x.T


def emulated(q, k, v, value_axis=0):
    """One head, causal, in tiles of 128 by 128, as the paper and the released kernels have it."""
    n, h = q.shape
    k = k - k.mean(0)
    out = np.zeros_like(v)
    for i in range(0, n, 128):
        rows = q[i:i + 128]
        mean = rows.mean(0)
        m, total, acc = np.full((128, 1), -np.inf, np.float32), np.zeros((128, 1), np.float32), np.zeros((128, v.shape[1]), np.float32)
        for j in range(0, i + 128, 128):
            keys = k[j:j + 128]
            s = (nvfp4(rows - mean, 1) @ nvfp4(keys, 1).T + mean @ keys.T) / np.float32(np.sqrt(h))
            s = np.where(np.arange(i, i + 128)[:, None] >= np.arange(j, j + 128), s, -np.inf)
            new = np.maximum(m, s.max(1, keepdims=True))
            p = np.exp(s - new) * np.float32(448 * 6)
            total = total * np.exp(m - new) + p.sum(1, keepdims=True)
            acc = acc * np.exp(m - new) + nvfp4(p, 1) @ nvfp4(v[j:j + 128], value_axis)
            m = new
        out[i:i + 128] = acc / total
    return out


def test_is_the_emulation():
    """By casts, tile by tile; groups of values along features would be something else."""
    q, k, v = normal(0, *[(1, 256, 1, H)] * 3)
    k = k.at[..., :4].add(10)
    out = np.asarray(products.sage3_attention(q, k, v, is_causal=True))[0, :, 0]
    q, k, v = (np.asarray(x)[0, :, 0] for x in (q, k, v))
    difference = np.abs(out - emulated(q, k, v))
    assert np.quantile(difference, 0.99) < 2e-6 and difference.max() < 0.02  # a sum in another order may tip a code
    assert np.abs(out - emulated(q, k, v, value_axis=1)).mean() > 0.01


def test_smoothing_alone_is_exact():
    """Scores without means and what means add, by hand, are the scores up to a number a row."""
    q, k = normal(1, (2, 300, 4, 16), (2, 150, 2, 16))
    k = k + 5
    rest, means = products.smooth_q(q)
    smooth, mean = products.smooth_k(k)
    scores = lambda q, k: jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, -1, 2, 2, 16), k).reshape(2, 4, -1, 150)
    delta = jnp.repeat(products.delta_scores(means, smooth), 128, axis=2)[:, :, :300]
    assert means.shape == (2, 3, 4, 16) and mean.shape == (2, 1, 2, 16)
    np.testing.assert_allclose(jax.nn.softmax(scores(rest, smooth) + delta), jax.nn.softmax(scores(q, k)), atol=1e-5)
    np.testing.assert_allclose(delta, np.repeat(scores(q - rest, smooth)[:, :, ::128], 128, axis=2)[:, :, :300], atol=1e-4)


@pytest.mark.parametrize("per_block_mean", [True, False])
def test_without_rounding_is_attention(per_block_mean, x64):
    """Output, residual and gradients, with grouped heads, a mask, odd lengths and rows without a key."""
    q, k, v = normal(2, (2, 150, 4, 16), (2, 140, 2, 16), (2, 140, 2, 8), dtype=np.float64)
    mask = masks.lengths(key_lengths=jnp.asarray([140, 0])) & masks.sliding_window(70)

    def run(attend):
        def loss(args):
            out, r = attend(*args)
            return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(r), r, 0) ** 2), (out, r)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k + 3, v))

    got = run(lambda *args: products.sage3_attention(*args, mask=mask, fmt=None, per_block_mean=per_block_mean, return_residual=True))
    expected = run(lambda *args: attnx.attention(*args, mask=mask, return_residual=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), got, expected)
    assert not got[0][1][0][1].any() and np.isneginf(got[0][1][1][1]).all()


def test_two_levels():
    """Weights as multiples of 1 / (448 * 6) lose less than as they are, in every seed and the more so the sharper they are (values need no rounding here)."""
    s, v = normal(0, (3, N, N), (3, N, H))

    @jax.jit
    def errors(sigma, s, v):
        v = rounded(v, "nvfp4", 0).astype(jnp.float32)
        p = jnp.exp(sigma * (s - s.max(1, keepdims=True)))
        lost = lambda two_level: (products.FP4(two_level=two_level).product("values", p, v, (1, 0)) - p @ v) / p.sum(1, keepdims=True)
        return jnp.sqrt(jnp.mean(lost(False) ** 2) / jnp.mean(lost(True) ** 2))

    for sigma, ratio in ((1.0, 1.01), (3.0, 1.55), (6.0, 2.5)):
        for seed in range(3):
            got = float(errors(sigma, s[seed], v[seed]))
            assert got > 1 and got == pytest.approx(ratio, rel=0.12)


def test_both_factors_are_needed():
    """6 makes the largest weight exact, 448 keeps small ones from vanishing: of a row that has one large weight and a long tail each alone loses either."""
    p = jnp.concatenate([jnp.ones((1, 1)), jnp.full((1, 4095), jnp.exp(-8.0))], axis=1)
    p = p * (1 + 0.1 * normal(0, p.shape)[0]).at[0, 0].set(1)
    lost = {}
    for factor in (448 * 6, 448, 6, 1):
        kept = rounded(p * factor, "nvfp4", 1).astype(jnp.float32) / factor
        lost[factor] = abs(float(kept[0, 0]) - 1), abs(1 - float(kept[0, 16:].sum() / p[0, 16:].sum()))
    assert lost[448 * 6][0] == 0 and lost[448 * 6][1] < 0.02
    assert lost[448][0] > 0.02 and lost[448][1] < 0.02 and lost[6] == (0, 1) and lost[1][0] > 0.02 and lost[1][1] == 1


def test_smoothing_is_worth_it():
    """Keys with large channels in common, three seeds."""
    q, k, v = normal(7, *[(3, N, 1, H)] * 3)
    k = k.at[..., :4].add(10)
    exact = attnx.attention(q, k, v, implementation="reference")
    smooth = products.sage3_attention(q, k, v, implementation="reference")
    plain = products.sage3_attention(q, k, v, smooth_k=False, per_block_mean=None, implementation="reference")
    for seed in range(3):
        assert cosine(smooth[seed], exact[seed]) >= 0.97 and cosine(plain[seed], exact[seed]) <= 0.96


def test_executions_agree():
    """In one tile, where weights are rounded alike; and the formats are not the same."""
    args = normal(4, (1, 200, 4, 32), (1, 170, 2, 32), (1, 170, 2, 16))
    run = lambda **options: jax.jit(lambda *args: products.sage3_attention(*args, is_causal=True, tile_sizes=(256, 256), return_residual=True, **options))(*args)
    expected = run(implementation="reference")
    close = lambda got: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
    close(run(implementation="blockwise"))
    for platform in ("tpu", "gpu"):
        with fused.forced(platform=platform):
            close(run(implementation="pallas"))
    assert 0.95 < cosine(run(fmt="mxfp4", implementation="reference")[0], expected[0]) < 0.995


def test_around_a_ring():
    """Over two devices, each with whole blocks of queries: without rounding exact, with it as good as on one device."""
    q, k, v = normal(8, *[(1, 512, 2, 32)] * 3)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    exact, single = (products.sage3_attention(q, k, v, is_causal=True, fmt=fmt) for fmt in (None, "nvfp4"))
    with jax.set_mesh(mesh):
        same, ring = (jax.jit(lambda *args, fmt=fmt: products.sage3_attention(*args, is_causal=True, fmt=fmt, implementation="ring"))(q, k, v) for fmt in (None, "nvfp4"))
        with pytest.raises(ValueError, match="expected multiples of the blocks"):
            products.sage3_attention(q[:, :100], k[:, :100], v[:, :100], implementation="ring")
    np.testing.assert_allclose(same, exact, atol=1e-5)
    assert 0.9 < float(jnp.abs(ring - exact).mean() / jnp.abs(single - exact).mean()) < 1.1


def test_hidden_and_later_keys_matter_by_rounding_alone():
    """What is hidden changes the output by about what rounding does."""
    q, k, v = normal(5, *[(1, N, 1, H)] * 3)
    there = jnp.arange(N)[:, None, None] < 300
    attend = lambda k, v, fmt: products.sage3_attention(q, k, v, is_causal=True, fmt=fmt, implementation="reference")[:, :300]
    other = [jnp.where(there, x, -x) for x in (k, v)]
    exact, out = attend(k, v, None), attend(k, v, "nvfp4")
    np.testing.assert_allclose(attend(*other, None), exact, atol=1e-5)
    assert 0 < jnp.abs(attend(*other, "nvfp4") - out).mean() < 1.5 * jnp.abs(out - exact).mean()


def test_refusals():
    q, k, v = normal(6, *[(1, 40, 2, 16)] * 3)
    with pytest.raises(ValueError, match="fmt: expected one of 'nvfp4', 'mxfp4'"):
        products.sage3_attention(q, k, v, fmt="fp4")
    with pytest.raises(ValueError, match="per_block_mean: expected"):
        products.sage3_attention(q, k, v, per_block_mean="yes")
    with pytest.raises(NotImplementedError, match="two_level is for weights up to 1"):
        attnx.attention(q, k, v, weights=attnx.weights.sigmoid(), products=products.nvfp4())
    assert jnp.isfinite(attnx.attention(q, k, v, weights=attnx.weights.sigmoid(), products=products.nvfp4(two_level=False))).all()
    with pytest.raises(ValueError, match="key: expected"):
        products.delta_scores(q, k[..., :8])
    assert products.sage3_attention(*(x.astype(jnp.bfloat16) for x in (q, k, v))).dtype == jnp.bfloat16
