"""Numbers of 4 bits in small groups that share a scale of 8 bits: NVFP4 and MXFP4.

A number is code * scale. Codes are e2m1 (a sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6), rounded to nearest, halves to even, and at most 6. Of a group with largest magnitude a

    NVFP4    16 numbers    scale = e4m3(a / 6)                         NVIDIA: "Pretraining Large Language Models with NVFP4" (2025, arXiv 2509.25149)
    MXFP4    32 numbers    scale = 2^(floor(log2 a) - 2), e8m0         Rouhani et al.: "Microscaling Data Formats for Deep Learning" (2023, arXiv 2310.10537)

A scale that rounds to zero makes its group zero. Where a > 1.5 * 2^floor(log2 a), MXFP4 has numbers above 6 times the scale, which become that. What is left of a group
at the end of an axis that 16 (32) does not divide is a group as well.

Codes and scales are arrays of the number formats themselves; :func:`round_e2m1` and the scales' roundings are arithmetic on float32, so that tiles inside
kernels are rounded alike. A product of a code and a scale has at most 6 significant bits: bfloat16 holds it exactly.

>>> import jax.numpy as jnp
>>> codes, scales = quant_nvfp4(jnp.asarray([[0.1, -0.7, 3.0, 2.4]]))
>>> codes.astype(jnp.float32).tolist(), scales.astype(jnp.float32).tolist()
([[0.0, -1.5, 6.0, 4.0]], [[0.5]])
>>> dequant_nvfp4(codes, scales).tolist()
[[0.0, -0.75, 3.0, 2.0]]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

E2M1_MAX, E4M3_MAX = 6.0, 448.0


def _nearest(x):
    """The nearest integers to x >= 0, halves to even: not every kernel has an instruction for it."""
    low = x.astype(jnp.int32)
    rest = x - low.astype(x.dtype)
    return (low + ((rest > 0.5) | ((rest == 0.5) & (low % 2 == 1))).astype(jnp.int32)).astype(x.dtype)


def round_e2m1(x):
    """The nearest e2m1 numbers, halves to even, at most 6 in magnitude; float32 to float32."""
    size = jnp.minimum(jnp.abs(x), E2M1_MAX)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    size = _nearest(size / step) * step
    return jnp.where(x < 0, -size, size)


def round_e4m3(x):
    """The nearest e4m3 numbers to x >= 0 (4 significant bits, from 2^-6 down multiples of 2^-9), halves to even, at most 448; float32 to float32."""
    x = jnp.minimum(x, E4M3_MAX)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = bits + 0x7FFFF + (lax.shift_right_logical(bits, 20) & 1)
    return jnp.where(x < 2.0**-6, _nearest(x * 2.0**9) * 2.0**-9, lax.bitcast_convert_type(bits & -0x100000, jnp.float32))


def _nvfp4_scale(largest):
    return round_e4m3(largest / E2M1_MAX)


def _mxfp4_scale(largest):
    """2^(floor(log2 largest) - 2), read from the exponent's bits, and no less than 2^-126: e8m0 has no zero, and its 2^-127 is 0 to most devices."""
    power = jnp.maximum(lax.shift_right_logical(lax.bitcast_convert_type(largest, jnp.int32), 23) - 127 - 2, -126)
    return lax.bitcast_convert_type(lax.shift_left(power + 127, 23), jnp.float32)


class Format(NamedTuple):
    """Codes of 4 bits in groups.

    Attributes:
      group: numbers that share a scale.
      scale: ``scale(largest magnitude) -> scale``, float32 to float32.
      dtype: of scales.
    """

    group: int
    scale: Callable
    dtype: Any


FORMATS = {"nvfp4": Format(16, _nvfp4_scale, jnp.float8_e4m3fn), "mxfp4": Format(32, _mxfp4_scale, jnp.float8_e8m0fnu)}


def _groups(x, axis: int, group: int):
    """``x`` [.., n, ..] as [.., ceil(n / group), group, ..], filled up with zeros."""
    more = -x.shape[axis] % group
    x = jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x
    return x.reshape(*x.shape[:axis], x.shape[axis] // group, group, *x.shape[axis + 1:])


def _flat(x, axis: int, length: int):
    """The inverse of :func:`_groups`."""
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2:])
    return x if x.shape[axis] == length else lax.slice_in_dim(x, 0, length, axis=axis)


def _encode(x, form: Format, axis: int, group: int):
    """Codes [.., groups, group, ..] and scales [.., groups, 1, ..], both float32."""
    grouped = _groups(x.astype(jnp.float32), axis, group)
    scales = form.scale(jnp.max(jnp.abs(grouped), axis=axis + 1, keepdims=True))
    some = scales > 0
    return jnp.where(some, round_e2m1(grouped / jnp.where(some, scales, 1)), 0), scales


def rounded(x, fmt: str, axis: int):
    """What is left of ``x`` once it has been codes and scales; bfloat16, which is exact."""
    codes, scales = _encode(x, FORMATS[fmt], axis, FORMATS[fmt].group)
    return _flat(codes * scales, axis, x.shape[axis]).astype(jnp.bfloat16)


def _check(x, axis, group):
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: expected an axis of an array of shape {x.shape}, got {axis!r}")
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"group: expected an integer from 1 on, got {group!r}")
    return axis % x.ndim


def _quant(x, fmt, axis, group):
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"x: expected real numbers, got {jnp.result_type(x)}")
    axis = _check(x, axis, group)
    codes, scales = _encode(x, FORMATS[fmt], axis, group)
    return _flat(codes, axis, x.shape[axis]).astype(jnp.float4_e2m1fn), jnp.squeeze(scales, axis + 1).astype(FORMATS[fmt].dtype)


def _dequant(codes, scales, axis, group, dtype):
    axis = _check(codes, axis, group)
    expected = tuple(-(-n // group) if i == axis else n for i, n in enumerate(codes.shape))
    if scales.shape != expected:
        raise ValueError(f"scales: expected shape {expected} for codes {codes.shape} in groups of {group}, got {scales.shape}")
    each = _groups(codes.astype(jnp.float32), axis, group) * jnp.expand_dims(scales.astype(jnp.float32), axis + 1)
    return _flat(each, axis, codes.shape[axis]).astype(dtype)


def quant_nvfp4(x, axis: int = -1, group: int = 16):
    """Numbers as NVFP4.

    Args:
      x: real numbers, any shape. Computed in float32.
      axis: along which ``group`` numbers share a scale: in a matrix product the one that is summed over.
      group: how many.

    Returns:
      ``(codes, scales)``: float4_e2m1fn shaped like ``x``, float8_e4m3fn with ceil(n / group) entries along the axis. The scale is rounded from largest / 6, and
      the code from x / scale.
    """
    return _quant(x, "nvfp4", axis, group)


def dequant_nvfp4(codes, scales, axis: int = -1, group: int = 16, dtype=jnp.float32):
    """``code * scale``, exact from bfloat16 on; the inverse of :func:`quant_nvfp4` on what it returns.

    Raises:
      ValueError: for scales whose shape is not that of the codes' groups.
    """
    return _dequant(codes, scales, axis, group, dtype)


def quant_mxfp4(x, axis: int = -1, group: int = 32):
    """Numbers as MXFP4: as :func:`quant_nvfp4`, with scales that are powers of two, float8_e8m0fnu.

    >>> codes, scales = quant_mxfp4(jnp.asarray([7.9, 5.0, -3.0]))
    >>> codes.astype(jnp.float32).tolist(), scales.astype(jnp.float32).tolist()
    ([6.0, 4.0, -3.0], [1.0])
    """
    return _quant(x, "mxfp4", axis, group)


def dequant_mxfp4(codes, scales, axis: int = -1, group: int = 32, dtype=jnp.float32):
    """``code * scale``, as :func:`dequant_nvfp4`."""
    return _dequant(codes, scales, axis, group, dtype)


# In memory ----------------------------------------------------------------------------------------------------------


def pack_fp4(codes):
    """Two codes a byte: codes [.., 2 n] as uint8 [.., n], the one of even index in the lower four bits.

    >>> codes, _ = quant_nvfp4(jnp.asarray([1.0, -6.0]))
    >>> [hex(byte) for byte in pack_fp4(codes).tolist()]
    ['0xf2']
    """
    if codes.dtype != jnp.float4_e2m1fn:
        raise TypeError(f"codes: expected float4_e2m1fn, got {codes.dtype}")
    if codes.ndim < 1 or codes.shape[-1] % 2:
        raise ValueError(f"codes: expected an even number along the last axis, got shape {codes.shape}")
    bits = lax.bitcast_convert_type(codes, jnp.uint4).astype(jnp.uint8)
    return bits[..., ::2] | bits[..., 1::2] << 4


def unpack_fp4(packed):
    """The inverse of :func:`pack_fp4`: uint8 [.., n] as float4_e2m1fn [.., 2 n]."""
    if packed.dtype != jnp.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    bits = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return lax.bitcast_convert_type(bits.astype(jnp.uint4), jnp.float4_e2m1fn)


def swizzle_scales(scales):
    """Scales [.., R, C] of R rows in the order in which tensor cores of Blackwell GPUs read them, [.., ceil(R / 128), ceil(C / 4), 512].

    Of each 128 rows by 4 groups, the scale of row r and group c comes at ``16 (r mod 32) + 4 (r div 32) + c``; missing rows and groups are zero. See "1D Block Scaling
    Factors Layout" in NVIDIA's cuBLAS documentation.
    """
    if scales.ndim < 2:
        raise ValueError(f"scales: expected [.., R, C], got shape {scales.shape}")
    *lead, rows, columns = scales.shape
    x = jnp.pad(scales, [(0, 0)] * len(lead) + [(0, -rows % 128), (0, -columns % 4)])
    x = x.reshape(*lead, -(-rows // 128), 4, 32, -(-columns // 4), 4)
    return jnp.moveaxis(x, -2, -4).swapaxes(-2, -3).reshape(*lead, -(-rows // 128), -(-columns // 4), 512)


def unswizzle_scales(swizzled, rows: int, columns: int):
    """The inverse of :func:`swizzle_scales`: [.., ceil(R / 128), ceil(C / 4), 512] as scales [.., R, C].

    >>> scales = jnp.arange(130 * 5.0).reshape(130, 5)
    >>> bool((unswizzle_scales(swizzle_scales(scales), 130, 5) == scales).all())
    True
    """
    expected = (-(-rows // 128), -(-columns // 4), 512)
    if swizzled.shape[-3:] != expected:
        raise ValueError(f"swizzled: expected [.., {', '.join(map(str, expected))}] for {rows} rows and {columns} groups, got shape {swizzled.shape}")
    lead = swizzled.shape[:-3]
    x = swizzled.reshape(*lead, *expected[:2], 32, 4, 4).swapaxes(-2, -3)
    return jnp.moveaxis(x, -4, -2).reshape(*lead, expected[0] * 128, expected[1] * 4)[..., :rows, :columns]
