"""Numbers of 4 bits: against the casts of ml_dtypes, fixed points, layouts in memory, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantised import microscaling as mx

QUANT = {"nvfp4": (mx.quant_nvfp4, mx.dequant_nvfp4, 16), "mxfp4": (mx.quant_mxfp4, mx.dequant_mxfp4, 32)}


def by_casts(x, fmt, axis, group):
    """Codes and scales by the casts of ml_dtypes, group by group; float32."""
    x = np.moveaxis(x.astype(np.float32), axis, -1)
    codes, scales = np.zeros_like(x), np.zeros((*x.shape[:-1], -(-x.shape[-1] // group)), np.float32)
    for row in np.ndindex(x.shape[:-1]):
        for g in range(scales.shape[-1]):
            part = x[row][g * group:(g + 1) * group]
            largest = np.abs(part).max()
            if fmt == "nvfp4":
                scale = np.minimum(largest / np.float32(6), 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            else:
                scale = np.float32(2.0 ** max(np.frexp(largest)[1] - 1 - 2 if largest else -200, -126)).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
            scales[row][g] = scale
            if scale:
                codes[row][g * group:(g + 1) * group] = (part / scale).astype(ml_dtypes.float4_e2m1fn)
    return np.moveaxis(codes, -1, axis), np.moveaxis(scales, -1, axis)


def numbers():
    """Of all sizes: normal, tiny, huge, zero, halfway between codes, and of a single sign."""
    x = np.random.default_rng(0).standard_normal((8, 70)).astype(np.float32)
    x *= np.float32([1, 2.0**-11, 2.0**-8, 3e3, 1e-30, 0, 37, 1])[:, None]
    x[7, :16] = [6, .25, .75, 1.25, 1.75, 2.5, 3.5, 5, -.25, -.75, -1.25, -1.75, -2.5, -3.5, -5, 0]
    return x


@pytest.mark.parametrize("fmt", QUANT)
def test_is_the_casts(fmt):
    """Codes and scales along both axes, in a last group that is not full, and in groups of another size; compiled too."""
    quant, dequant, group = QUANT[fmt]
    x = numbers()
    for axis, size in ((-1, group), (0, group), (1, 5)):
        codes, scales = jax.jit(lambda x, axis=axis, size=size: quant(x, axis, size))(x)
        expected = by_casts(x, fmt, axis % 2, size)
        assert codes.dtype == jnp.float4_e2m1fn and codes.shape == x.shape and scales.shape == expected[1].shape
        np.testing.assert_array_equal(codes.astype(jnp.float32), expected[0])
        np.testing.assert_array_equal(scales.astype(jnp.float32), expected[1])
        each = np.repeat(expected[1], size, axis)
        each = each[:len(x)] if axis == 0 else each[:, :x.shape[1]]
        np.testing.assert_array_equal(dequant(codes, scales, axis, size), expected[0] * each)


def test_roundings_are_the_casts():
    """Every number of a fine grid, all halves among it, and random ones of all sizes."""
    random = np.random.default_rng(1)
    grid = np.concatenate([np.arange(-8, 8, 1 / 64), random.standard_normal(3000) * 3]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(mx.round_e2m1)(grid), grid.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.sort(every[every >= 0])
    wide = np.concatenate([every, (every[1:] + every[:-1]) / 2, 2.0 ** random.uniform(-14, 8.8, 3000)]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(mx.round_e4m3)(wide), wide.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    np.testing.assert_array_equal(mx.round_e4m3(np.float32([460, 1e9])), [448, 448])


@pytest.mark.parametrize("fmt", QUANT)
def test_idempotent(fmt):
    """What has been rounded comes back as it is, where its scale is: where a group's largest code is 6, for NVFP4; MXFP4 always. bfloat16 holds it."""
    quant, dequant, group = QUANT[fmt]
    x = np.random.default_rng(2).standard_normal((16, 4 * group)).astype(np.float32)
    codes, scales = quant(x)
    once = dequant(codes, scales)
    again = quant(once)
    full = np.abs(np.asarray(codes, np.float32)).reshape(16, 4, group).max(-1) == 6
    assert full.mean() > 0.3 and (fmt == "mxfp4" or full.all())
    np.testing.assert_array_equal(dequant(*again), once)
    np.testing.assert_array_equal(np.asarray(again[1], np.float32), np.asarray(scales, np.float32))
    np.testing.assert_array_equal(jax.jit(lambda x: mx.rounded(x, fmt, 1))(x).astype(jnp.float32), once)


def test_layouts():
    """Two codes a byte, and the order of scales, by their definitions."""
    codes, _ = mx.quant_nvfp4(numbers()[:, :64])
    packed = mx.pack_fp4(codes)
    bits = np.asarray(codes).view(np.uint8) & 15
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, bits[:, ::2] + 16 * bits[:, 1::2])
    np.testing.assert_array_equal(np.asarray(mx.unpack_fp4(packed)).view(np.uint8) & 15, bits)
    scales = np.arange(2 * 200 * 6, dtype=np.float32).reshape(2, 200, 6)
    order = np.asarray(mx.swizzle_scales(jnp.asarray(scales)))
    assert order.shape == (2, 2, 2, 512)
    for r, c in ((0, 0), (5, 3), (33, 1), (127, 4), (199, 5)):
        np.testing.assert_array_equal(order[:, r // 128, c // 4, 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4], scales[:, r, c])
    assert order.sum() == scales.sum()
    np.testing.assert_array_equal(mx.unswizzle_scales(jnp.asarray(order), 200, 6), scales)


def test_errors():
    x = jnp.ones((4, 32))
    codes, scales = mx.quant_nvfp4(x)
    for match, call in (("axis: expected", lambda: mx.quant_nvfp4(x, 2)), ("group: expected", lambda: mx.quant_mxfp4(x, group=0)),
                        (r"scales: expected shape \(4, 2\)", lambda: mx.dequant_nvfp4(codes, scales[:, :1])),
                        ("codes: expected an even", lambda: mx.pack_fp4(codes[:, :3])), ("swizzled: expected", lambda: mx.unswizzle_scales(x, 4, 2)),
                        ("scales: expected", lambda: mx.swizzle_scales(x[0]))):
        with pytest.raises(ValueError, match=match):
            call()
    for match, call in (("x: expected real", lambda: mx.quant_nvfp4(jnp.ones(4, int))), ("codes: expected float4", lambda: mx.pack_fp4(x)),
                        ("packed: expected uint8", lambda: mx.unpack_fp4(codes))):
        with pytest.raises(TypeError, match=match):
            call()
