"""Eight-bit codes with a scale: ``x ~ codes * scale``, symmetric about zero.

    int8     scale = max |x| / 127,     codes = x / scale rounded to the nearest integer, halves away from zero
    float8   scale = max |x| / (largest number of the format),     codes = x / scale rounded to the format

in jnp alone, for whole arrays and for tiles inside kernels. Zhang et al.: "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration"
(2024, arXiv 2410.02367).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.products import accumulator_dtype

LEVELS = 127  # of int8 on either side of zero
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def block_maximum(x, axis: int, block: int):
    """The largest of each ``block`` entries along an axis, in the place of all of them; [.., 1, ..] where one block holds all."""
    length = x.shape[axis]
    if block >= length:
        return jnp.max(x, axis=axis, keepdims=True)
    if block == 1:
        return x
    more = -length % block
    x = jnp.pad(x, [(0, more if n == axis else 0) for n in range(x.ndim)]) if more else x
    blocks = x.reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1:])
    spread = jnp.broadcast_to(jnp.max(blocks, axis=axis + 1, keepdims=True), blocks.shape).reshape(x.shape)
    return spread[(slice(None),) * axis + (slice(length),)] if more else spread


def unit(largest, levels):
    """The scale at which the largest magnitude has the last code; 1 where all are zero."""
    return jnp.where(largest > 0, largest, levels) * (1 / levels)


def to_int8(x, scale):
    """Codes of ``x`` at a scale, halves away from zero."""
    x = x * (1 / scale)
    return (x + jnp.where(x >= 0, 0.5, -0.5)).astype(jnp.int32).astype(jnp.int8)


def to_float8(x, scale, dtype: str):
    """Codes of ``x`` at a scale in a format of :data:`LARGEST`."""
    return (x * (1 / scale)).astype(dtype)


def encode(x, largest, dtype: str):
    """``(codes, scale)`` of ``x`` in 'int8' or a format of :data:`LARGEST`, given the largest magnitudes among what shares a scale."""
    x, largest = (y.astype(accumulator_dtype(x.dtype)) for y in (x, largest))
    if dtype == "int8":
        scale = unit(largest, LEVELS)
        return to_int8(x, scale), scale
    scale = unit(largest, LARGEST[dtype])
    return to_float8(x, scale, dtype), scale


# Whole arrays ---------------------------------------------------------------------------------------------------------


def quant_int8(x, granularity: str = "token", block: int = 128):
    """Int8 codes of tokens and their scales.

    Args:
      x: real [.., T, N, H].
      granularity: what shares a scale: 'token' (the H numbers of a token's head), 'block' (of ``block`` tokens in a row), 'channel' (all tokens of a head's channel),
        or 'tensor' (everything).
      block: tokens of a block.

    Returns:
      ``(codes, scale)``: int8 of x's shape and float32 (float64 for float64) [.., T, N, 1], [.., 1, N, H] or [.., 1, 1, 1], with ``x ~ codes * scale``, off by at most
      half a scale.

    Cost: O(T N H).

    >>> import jax.numpy as jnp
    >>> codes, scale = quant_int8(jnp.array([[[1.0, -0.5, 0.0, 2.54]]]))
    >>> codes.tolist(), f"{scale.item():.2f}"
    ([[[50, -25, 0, 127]]], '0.02')
    """
    if granularity not in ("token", "block", "channel", "tensor"):
        raise ValueError(f"granularity: expected 'token', 'block', 'channel' or 'tensor', got {granularity!r}")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block: expected an integer of at least 1, got {block!r}")
    if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected a real array [.., T, N, H], got {x.dtype}{list(x.shape)}")
    axes = {"token": (-1,), "block": (-1,), "channel": (-3,), "tensor": tuple(range(x.ndim))}[granularity]
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    if granularity == "block" and x.shape[-3]:
        largest = jnp.broadcast_to(block_maximum(largest, x.ndim - 3, block), largest.shape)
    return encode(x, largest, "int8")


def dequantise(codes, scale):
    """``codes * scale``, in the dtype of the scale."""
    return codes.astype(scale.dtype) * scale


def smooth_k(key):
    """Keys without what they have in common.

    ::

        key - mean,        mean over all tokens of the sequence, for each head and channel

    All scores of a query change by ``-q . mean``, which softmax does not see; the channels in which keys are large but alike, and which leave a
    common scale no levels for the rest, are gone. To be added to a row's log-normaliser: ``scale * (query . mean)``.

    Args:
      key: real [.., S, K, H].

    Returns:
      ``(smoothed, mean)``: [.., S, K, H] in the key's dtype, and [.., 1, K, H] in at least float32, in which both are computed.

    >>> import jax.numpy as jnp
    >>> smoothed, mean = smooth_k(jnp.array([[[7.0, 1.0]], [[9.0, -1.0]]]))
    >>> smoothed.tolist(), mean.tolist()
    ([[[-1.0, 1.0]], [[1.0, -1.0]]], [[[8.0, 0.0]]])
    """
    wide = key.astype(accumulator_dtype(key.dtype))
    mean = wide.mean(-3, keepdims=True)
    return (wide - mean).astype(key.dtype), mean


def error_metrics(out, expected) -> dict[str, jax.Array]:
    """How far an output is from another: cosine similarity, relative L1 distance and root mean square error, over all entries.

    ::

        cosine = <o, o'> / (|o| |o'|),        l1 = sum |o - o'| / sum |o'|,        rmse = sqrt(mean (o - o')^2)

    >>> import jax.numpy as jnp
    >>> {name: round(float(x), 3) for name, x in error_metrics(jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0])).items()}
    {'cosine': 0.707, 'l1': 1.0, 'rmse': 0.707}
    """
    a, b = (x.astype(accumulator_dtype(x.dtype)) for x in (out, expected))
    cosine = jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))
    return {"cosine": cosine, "l1": jnp.sum(jnp.abs(a - b)) / jnp.sum(jnp.abs(b)), "rmse": jnp.sqrt(jnp.mean((a - b) ** 2))}
