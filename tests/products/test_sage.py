"""SageAttention: smoothing is exact, rounding what it says, in every execution; what outliers cost; what each layer of a model can take."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import masks, products
from attnx.core import fused
from attnx.products import sage_attention
from pallas_kernels.quantised import formats

LENGTH, TILE = 300, (128, 64)
SIZES = dict(batch=1, queries=LENGTH, keys=LENGTH, heads=4, kv_heads=2, size=24, value_size=16)
OPTIONS = ({}, {"scores": "token"}, {"values": "int8"}, {"values": "float8"}, {"values": "float16 sums"})


def run(options, query, key, value, mask=None, **more):
    return jax.jit(lambda *args: sage_attention(*args[:3], mask=args[3], return_residual=True, **{"is_causal": True, **options, **more}))(query, key, value, mask)


def smoothed(options, query, key, value, **more):
    """The same by the engine, rounding inside tiles."""
    rounded = products.int8(options.get("scores", "block"), options.get("values"))
    return attnx.attention(query, formats.smooth_k(key)[0], value, mask=masks.causal(), products=rounded, **more)


def test_formats(x64):
    """Codes are within half a scale, halves away from zero; scales are shared as said; zeros stay zeros."""
    x = jax.random.normal(jax.random.key(0), (2, 300, 3, 8))
    for granularity, shape in (("token", (2, 300, 3, 1)), ("block", (2, 300, 3, 1)), ("channel", (2, 1, 3, 8)), ("tensor", (1, 1, 1, 1))):
        codes, scale = formats.quant_int8(x, granularity, 128)
        assert codes.dtype == jnp.int8 and codes.shape == x.shape and scale.shape == shape
        assert (jnp.abs(formats.dequantise(codes, scale) - x) <= scale / 2 * (1 + 1e-12)).all()
    scale = formats.quant_int8(x, "block", 128)[1][..., 0]
    for start, stop in ((0, 128), (128, 256), (256, 300)):
        np.testing.assert_allclose(scale[:, start:stop], jnp.broadcast_to(jnp.abs(x[:, start:stop]).max((1, 3), keepdims=True)[..., 0] / 127, (2, stop - start, 3)))
    halves = jnp.array([127.0, 0.5, -0.5, 1.5, -2.5, 0.25])[None, None]
    assert formats.quant_int8(halves)[0].ravel().tolist() == [127, 1, -1, 2, -3, 0]
    codes, scale = formats.quant_int8(jnp.zeros((1, 2, 3)))
    assert not codes.any() and (scale == 1).all()


def test_smoothing_is_exact(x64):
    """Nothing rounded: attention, and the log-normaliser of the keys as they came; queries of a group share keys."""
    q, k, v, _ = agreement.arrays(**SIZES)
    k = k + 5.0
    expected = attnx.attention(q, k, v, mask=masks.causal(), return_residual=True)
    agreement.assert_agree(run({"scores": None}, q, k, v), expected)
    scores = jnp.einsum("btnh,bsnh->btns", q, jnp.repeat(k, 2, 2)) * q.shape[3] ** -0.5
    visible = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, :, None]
    r = run({"scores": None}, q, k, v)[1]
    agreement.assert_agree(r, jax.nn.logsumexp(jnp.where(visible, scores, -jnp.inf), axis=-1))
    rounded = run({}, q, k, v)[1]
    assert 1e-4 < jnp.abs(rounded - r).max() < 0.05


def test_constants_in_keys(x64):
    """A vector added to all keys changes nothing, but for what rounds keys as they are."""
    q, k, v, _ = agreement.arrays(**SIZES)
    exact, moved = attnx.attention(q, k, v, mask=masks.causal()), jax.random.normal(jax.random.key(3), (2, 24))
    plain, errors = run({}, q, k, v)[0], []
    for size in (0.0, 4.0, 16.0):
        agreement.assert_agree(run({}, q, k + size * moved, v)[0], plain, 1e-9)
        errors.append(float(jnp.abs(run({"smooth_k": False}, q, k + size * moved, v)[0] - exact).mean()))
    assert errors[0] < errors[1] / 2 < errors[2] / 4, errors


def test_integer_products():
    """Scores are the product of dequantised codes: what int32 sums up is exact."""
    q, k, _, _ = agreement.arrays(jnp.float32, **{**SIZES, "kv_heads": 4, "size": 128})
    (a, sa), (b, sb) = formats.quant_int8(q, "block", 128), formats.quant_int8(k, "block", 64)
    expected = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (formats.dequantise(a, sa), formats.dequantise(b, sb))))
    got = attnx.attention_scores(q, k, scale=1.0, products=products.int8())[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_outliers():
    """Standard normal inputs but for four channels in which keys are large, and alike: smoothing more than undoes the threefold error that these cost."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 512, 1, 64))
    k = k + 8.0 * (jnp.arange(64) < 4)
    exact = attnx.attention(q, k, v)
    cosine = {smooth: formats.error_metrics(run({}, q, k, v, is_causal=False, smooth_k=smooth)[0], exact)["cosine"] for smooth in (True, False)}
    assert cosine[True] >= 0.9998 and 1 - cosine[False] >= 3 * (1 - cosine[True]), cosine


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_executions(x64, options):
    """Rounded beforehand or in tiles, folded, in kernels of a GPU and, where the tile does not matter, by definition and in kernels of a TPU: one result."""
    args = agreement.arrays(**SIZES)[:3]
    expected = run(options, *args, implementation="blockwise", tile_sizes=TILE)
    with fused.forced(platform="gpu"):
        agreement.assert_agree(run(options, *args, implementation="pallas", tile_sizes=TILE), expected)
    if options.get("values") != "int8":  # there at a scale for a block, not for the sequence
        agreement.assert_agree(smoothed(options, *args, implementation="blockwise", block_sizes=TILE), expected[0])
    if options.get("values") in (None, "float8"):
        agreement.assert_agree(run(options, *args, implementation="reference"), expected)
        with fused.forced():
            agreement.assert_agree(run(options, *args, implementation="pallas"), expected)
    else:  # one tile of keys: weights relative to the largest of all
        agreement.assert_agree(run(options, *args, implementation="reference"), run(options, *args, implementation="blockwise", tile_sizes=(128, 512)))
    error = jnp.abs(expected[0] - attnx.attention(*args, mask=masks.causal())).max()
    assert 1e-5 < error < (0.1 if options.get("values") == "float8" else 0.04)


def test_ring():
    """Over devices whose shares are whole blocks; others are refused."""
    q, k, v, _ = agreement.arrays(jnp.float32, **{**SIZES, "queries": 256, "keys": 256})
    expected = run({}, q, k, v)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    smooth = formats.smooth_k(k)[0]
    ring = lambda sizes: attnx.ring_attention(q, smooth, v, mesh=mesh, zigzag=False, mask=masks.causal(), products=products.int8(block_sizes=sizes))
    agreement.assert_agree(jax.jit(lambda: ring((128, 64)))(), expected[0], 1e-5)
    with pytest.raises(ValueError, match=r"mesh: expected multiples of the blocks \(256, 64\).*got \(128, 128\)"):
        ring((256, 64))


def test_gradients(x64):
    """Those of the engine that rounds scores in tiles, by definition and folded; near those of exact attention."""
    *args, cotangent = agreement.arrays(**SIZES)

    def gradients(attend):
        def loss(*args):
            out, r = attend(*args)
            return jnp.vdot(out, cotangent) + jnp.sum(jnp.sin(r))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)

    got = gradients(lambda *args: sage_attention(*args, is_causal=True, values="int8", return_residual=True))
    agreement.assert_agree(got, gradients(lambda *args: sage_attention(*args, is_causal=True, return_residual=True, implementation="reference")))
    exact = gradients(lambda *args: attnx.attention(*args, mask=masks.causal(), return_residual=True))
    for a, b in zip(got, exact):
        assert 0 < jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)


def test_no_keys():
    """A row whose keys are all masked is zero, its log-normaliser -inf, and nothing is NaN, in value or gradient."""
    q, k, v, _ = agreement.arrays(jnp.float32, **SIZES)
    seen = masks.explicit(jnp.arange(LENGTH)[:, None] > 0)
    for options in ({}, {"values": "int8"}):
        out, r = run(options, q, k, v, seen)
        assert not out[:, 0].any() and (r[:, 0] == -jnp.inf).all() and jnp.isfinite(out).all() and jnp.isfinite(r[:, 1:]).all()
    slopes = jax.jit(jax.grad(lambda *args: sage_attention(*args, mask=seen).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert all(jnp.isfinite(x).all() for x in slopes) and not slopes[0][:, 0].any()
    assert sage_attention(q[:, :0], k, v).shape == (1, 0, 4, 16) and not sage_attention(q, k[:, :0], v[:, :0]).any()


def test_choice_by_layer():
    """A layer one of whose tokens, which none sees, spoils the scales of values takes the accurate kernel."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, 200, 2, 16))
    v = v.at[1, :, 7].mul(100.0)
    assert products.choose_kernel_per_layer(q, k, v, mask=masks.explicit(jnp.arange(200)[None] != 7)) == ("vB", "B")
    assert {name: sage_attention(q[0], k[0], v[0], **options).shape for name, options in products.SAGE_VARIANTS.items()} == dict.fromkeys(
        ("T", "B", "vT", "vB"), (1, 200, 2, 16))


def test_refusals():
    x = jnp.ones((1, 40, 2, 16))
    for match, call in {
        "scores: expected one of 'block', 'token' or None, got 'row'": lambda: sage_attention(x, x, x, scores="row"),
        "values: expected one of 'int8'": lambda: sage_attention(x, x, x, values="int4"),
        r"block_sizes: expected powers of two, got \(100, 64\)": lambda: sage_attention(x, x, x, block_sizes=(100, 64)),
        "fast: expected one of T, B, vT, vB, got 'C'": lambda: products.choose_kernel_per_layer(x[None], x[None], x[None], fast="C"),
        r"key: expected shape \[L, B, T, N, H\]": lambda: products.choose_kernel_per_layer(x[None], x, x[None]),
        "granularity: expected 'token'": lambda: formats.quant_int8(x, "row"),
        "x: expected a real array": lambda: formats.quant_int8(jnp.ones(3)),
        "block: expected an integer": lambda: formats.quant_int8(x, "block", 0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
