"""The kernel of quantised attention in Triton itself, interpreted: prints how far it is from the definition. For a process of its own, see :mod:`triton_emulated`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import triton_emulated

from attnx.core import fused
from attnx.products import sage_attention
from pallas_kernels import native
from pallas_kernels.quantised.triton_launch import COLUMNS, Codes, attend

jax.config.update("jax_disable_most_optimizations", True)
native.call, native.by_batch = triton_emulated.call, lambda function: function

CASES = {  # queries, keys, size of keys, of values; tokens that share a scale, dtype and tokens of a scale of the values, options
    "float16 values, causal": (200, 200, 20, 33, (128, 64), None, {"is_causal": True}),
    "float16 values, scales of tokens, lengths": (50, 170, 32, 16, (1, 1), None, {"lengths": [170, 65, 0]}),
    "int8 values, lengths, causal": (140, 140, 48, 24, (128, 64), ("int8", 64), {"lengths": [140, 130, 3], "is_causal": True}),
    "int8 values, a scale for all tokens": (70, 130, 32, 16, (128, 128), ("int8", 192), {}),
    "e4m3 values": (70, 130, 32, 16, (1, 64), ("float8_e4m3fn", 64), {}),
}
LARGEST = {"int8": 127, "float8_e4m3fn": 448}


def quantise(x, share, dtype="int8", axis=(1, 3)):
    """Codes and scales of arrays [B, T, N, H], and the numbers that they stand for."""
    blocks = -(-x.shape[1] // share)
    whole = np.pad(x, ((0, 0), (0, blocks * share - x.shape[1]), (0, 0), (0, 0))).reshape(x.shape[0], blocks, share, *x.shape[2:])
    scales = abs(whole).max(axis=(2, 4) if 3 in axis else 2, keepdims=True) / LARGEST[dtype]
    codes = np.round(whole / scales) if dtype == "int8" else whole / scales
    codes = codes.astype(jnp.dtype(dtype))
    flat = lambda y: y.reshape(x.shape[0], blocks * share, *x.shape[2:])[:, :x.shape[1]]
    return Codes(flat(codes), np.float32(scales[:, :, 0]), share), flat(codes.astype(np.float64) * scales)


def errors(name):
    """The largest differences of outputs, relative to the largest number, and of log-normalisers; whether rows without keys are zero."""
    queries, keys, size, value_size, (query_share, key_share), kind, options = CASES[name]
    random, batch, heads, key_heads = np.random.default_rng(0), 3, 4, 2
    normal = lambda *shape: random.normal(size=shape)
    (query, q), (key, k) = quantise(normal(batch, queries, heads, size), query_share), quantise(normal(batch, keys, key_heads, size), key_share)
    v = normal(batch, keys, key_heads, value_size).astype(np.float16)
    value, v = (v, v.astype(np.float64)) if kind is None else quantise(v.astype(np.float64), kind[1], kind[0], axis=(1,))
    lengths = np.array(options["lengths"]) if "lengths" in options else None
    out, residual = attend(query, key, value, scale=size**-0.5, dtype=np.float32, is_causal=options.get("is_causal", False),
                           lengths=None if lengths is None else jnp.asarray(lengths), return_residual=True)

    k, v = (np.repeat(x, heads // key_heads, axis=2) for x in (k, v))
    s = np.einsum("bihd,bjhd->bhij", q, k) * size**-0.5
    seen = np.arange(keys) < (np.full(batch, keys) if lengths is None else lengths)[:, None, None, None]
    if options.get("is_causal"):
        seen = seen & (np.arange(queries)[:, None] >= np.arange(keys))
    expected, log = fold(np.where(seen, s, -np.inf), v, kind and kind[0])
    out, residual, some = np.asarray(out, np.float64), np.asarray(residual, np.float64), log > -np.inf
    return {"error": abs(out - expected).max() / abs(expected).max(), "residual": abs(np.where(some, residual, 0) - np.where(some, log, 0)).max(),
            "nothing": bool((out[~some.swapaxes(1, 2)] == 0).all() and (residual[~some] == -np.inf).all())}


def fold(s, v, kind):
    """Outputs and log-normalisers of scores [B, N, T, S] and values [B, S, N, H], with weights rounded by blocks of keys as the kernel says it does."""
    largest, total, out = np.full(s.shape[:3], -np.inf), np.zeros(s.shape[:3]), 0
    for start in range(0, s.shape[3], COLUMNS):
        block = s[..., start:start + COLUMNS]
        most = np.maximum(largest, block.max(-1))
        shift = np.where(most == -np.inf, 0, most)
        p, kept = np.exp(block - shift[..., None]), np.exp(largest - shift)
        rounded = p.astype(np.float16) if kind is None else np.floor(p * 127 + 0.5) / 127 if kind == "int8" else (p * 448).astype(jnp.dtype(kind)).astype(float) / 448
        total = total * kept + p.sum(-1)
        out = out * kept[..., None] + np.einsum("bhij,bjhv->bhiv", rounded.astype(float), v[:, start:start + COLUMNS])
        largest = most
    some = total > 0
    divisor = np.where(some, total, 1)
    return np.swapaxes(out / divisor[..., None], 1, 2), np.where(some, largest + np.log(divisor), -np.inf)


def sage(values):
    """How far SageAttention by the kernel is from that by a fold of the same tiles, output and log-normaliser."""
    query, key, value = (jax.random.normal(jax.random.key(n), (2, 150, heads, 20)) for n, heads in enumerate((4, 2, 2)))
    options = dict(is_causal=True, values=values, return_residual=True)
    with fused.forced(interpret=False, platform="gpu"):
        found = sage_attention(query, key + 3, value, implementation="triton", **options)
    return [float(abs(a - b).max()) for a, b in zip(found, sage_attention(query, key + 3, value, implementation="blockwise", tile_sizes=(128, 64), **options))]


if __name__ == "__main__":
    print(json.dumps({"kernel": {name: errors(name) for name in CASES}, "sage": {values: sage(values) for values in ("float16", "int8", "float8")}}))
