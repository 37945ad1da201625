"""Attention on eight-bit codes by the kernel in Triton itself (:mod:`pallas_kernels.quantised.triton_kernel`): the forward pass on a GPU."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.tiles import power

ROWS, COLUMNS = 128, 64  # queries and keys of a tile
LARGEST = 256  # size of heads


class Codes(NamedTuple):
    """Eight-bit numbers and their scales, ``x ~ codes * scales``.

    Attributes:
      codes: [B, T, N, H].
      scales: float32 [B, ceil(T / share), N, 1], or of values [B, ceil(T / share), N, H].
      share: tokens in a row that have a scale in common, 1 (not of values) or a multiple of a tile's.
    """

    codes: jax.Array
    scales: jax.Array
    share: int


def attend(query: Codes, key: Codes, value, *, scale: float, dtype, is_causal: bool = False, lengths=None, return_residual: bool = False):
    """``softmax(scale q k^T) v`` of codes, [B, T, N, Hv], or with the rows' log-normalisers float32 [B, N, T].

    Args:
      query, key: int8 :class:`Codes`, N heads on K.
      value: [B, S, K, Hv] in 16 bits, or :class:`Codes` in int8 or e4m3.
      scale: a factor of the scores.
      dtype: of the output.
      is_causal: whether query i sees keys up to the i-th alone.
      lengths: int [B], keys that count; all by default. A query that sees none gets zeros, and -inf.
    """
    check(query, key, value)
    (b, t, n, _), value_size = query.codes.shape, (value.codes if isinstance(value, Codes) else value).shape[3]
    if 0 in (b, t, n, value_size):
        out = jnp.zeros((b, t, n, value_size), dtype)
        return (out, jnp.full((b, n, t), -jnp.inf, jnp.float32)) if return_residual else out
    coded = isinstance(value, Codes)
    shares = query.share, key.share, (0 if value.scales.shape[1] == 1 else value.share) if coded else COLUMNS
    row, column = (x.scales[..., 0].astype(jnp.float32) for x in (query, key))
    values, value_scales = (_along_tokens(value.codes), value.scales.astype(jnp.float32)) if coded else (value, None)
    arrays = query.codes, row * (scale * math.log2(math.e)), key.codes, column, values, value_scales, None if lengths is None else jnp.asarray(lengths, jnp.int32)
    out, residual = native.by_batch(partial(_call, shares, value_size, is_causal, jnp.dtype(dtype), return_residual))(*arrays)
    return (out, residual) if return_residual else out


def check(query, key, value):
    """Raises NotImplementedError for what the kernel lacks."""
    lacks = "implementation='triton': the kernel of quantised attention"
    native.check_installed()
    if query.codes.dtype != jnp.int8 or key.codes.dtype != jnp.int8:
        raise NotImplementedError(f"{lacks} takes queries and keys in int8, got {query.codes.dtype} and {key.codes.dtype}")
    kept = value.codes.dtype if isinstance(value, Codes) else value.dtype
    if kept not in ((jnp.int8, jnp.float8_e4m3fn) if isinstance(value, Codes) else (jnp.float16, jnp.bfloat16)):
        raise NotImplementedError(f"{lacks} takes values in float16 and bfloat16, and coded ones in int8 and float8_e4m3fn, got {kept}")
    for name, x, tile in (("query", query, ROWS), ("key", key, COLUMNS), ("value", value, COLUMNS)):
        if isinstance(x, Codes) and x.share % tile and (x.share != 1 or name == "value"):
            raise NotImplementedError(f"{lacks} takes a scale for {'each token or ' * (name != 'value')}a multiple of {tile} tokens of the {name}, got {x.share}")
    if max(query.codes.shape[3], (value.codes if isinstance(value, Codes) else value).shape[3]) > LARGEST:
        raise NotImplementedError(f"{lacks} holds heads of size {LARGEST} at the most, got {query.codes.shape[3]}")


def _along_tokens(codes):
    """[B, S, K, Hv] -> [B, K, Hv, S in whole sectors of memory]."""
    return jnp.pad(jnp.transpose(codes, (0, 2, 3, 1)), [(0, 0)] * 3 + [(0, -codes.shape[1] % 32)])


def _call(shares, value_size, is_causal, dtype, return_residual, query, query_scales, key, key_scales, value, value_scales, lengths):
    from pallas_kernels.quantised.triton_kernel import quantised_forward

    (b, t, n, size), (s, kv_heads) = query.shape, key.shape[1:3]
    outputs = [jax.ShapeDtypeStruct((b, t, n, value_size), dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32) if return_residual else None]
    large = max(size, value_size) > 128
    return tuple(native.call(
        quantised_forward, [query, query_scales, key, key_scales, value, value_scales, lengths], outputs, grid=(-(-t // ROWS) * n * b,), name="quantised_forward",
        warps=8, stages=2 if large else 3, scalars=(t, s, value.shape[3] if value_scales is not None else s),
        HEADS=n, KEY_HEADS=kv_heads, SIZE=size, SIZE_BLOCK=power(size, 32), VALUE_SIZE=value_size, VALUE_BLOCK=power(value_size), ROWS=ROWS, COLUMNS=COLUMNS,
        QUERY_SHARE=shares[0], KEY_SHARE=shares[1], VALUE_SHARE=shares[2], CAUSAL=is_causal, LENGTHS=lengths is not None, RESIDUAL=return_residual))
