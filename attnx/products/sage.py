"""SageAttention: queries meet keys in int8, keys having been freed of what they share, so that any trained model can take it in the place of its attention.

::

    k' = k - mean over tokens of k                                 per head and channel: scores move by -q . mean, which softmax does not see
    s = (codes of q . codes of k') scale_q scale_k / sqrt(H)       summed in int32; a scale for 128 queries, one for 64 keys, or one a token
    out = softmax(s) v,      log-normaliser += q . mean / sqrt(H)

Queries, keys and, where they are int8 too, values are rounded once, before the sweep over tiles (:mod:`pallas_kernels.flash`), which then reads half the bytes
and feeds the matrix units integers. Weights are rounded in the tile: e^(s - m) is at most 1 there.

Two of the released kernels' habits are not taken over: the mean is that of float32, not of the input's dtype, and a row whose keys are all masked is zero with a
log-normaliser of -inf, not a uniform average.

Zhang, Wei, Huang, Zhang, Zhu, Chen: "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration" (2024, ICLR 2025, arXiv 2410.02367).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from attnx.core import checks, fused
from attnx.core.attention import IMPLEMENTATIONS, attention, evaluate
from attnx.core.program import bind, partition
from attnx.masks.causal import causal
from attnx.products.eight_bits import Format, Quantised, UpToOne, int8
from pallas_kernels.parts import Mask, Operand, Similarity, Softmax, part
from pallas_kernels.products import accumulator_dtype, multiply
from pallas_kernels.quantised import formats, triton_launch
from pallas_kernels.quantised.formats import error_metrics, quant_int8, smooth_k
from pallas_kernels.tiles import power

SAGE_VARIANTS: dict[str, dict[str, Any]] = {
    "T": {"scores": "token", "values": "float16 sums"},
    "B": {"scores": "block", "values": "float16 sums"},
    "vT": {"scores": "token", "values": "int8"},
    "vB": {"scores": "block", "values": "int8"},
}
"""The four kernels of the paper, as options of :func:`sage_attention`: queries and keys by token or block, values in float16 or int8."""


@part
class Codes(Similarity):
    """``(q . k) row column`` of int8 codes: the scales of queries [B, T, N] and of keys [B, S, K]."""

    row: Any
    column: Any

    def operands(self, sizes):
        return Operand(self.row, ("batch", "query", "head")), Operand(self.column, ("batch", "key", "kv_head"))

    def pair(self, q, k, at, row, column):
        if q.dtype == jnp.int8:
            s = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32).astype(row.dtype)
        else:
            s = multiply(q, k, (1, 1))
        return s * row * column


class _Options(NamedTuple):
    scores: str | None
    values: str | None
    smooth: bool
    scale: float
    block_sizes: tuple[int, int]
    implementation: str | None
    tiles: tuple[int, int] | None


def sage_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *, is_causal: bool = False,
                   mask: Mask | None = None, smooth_k: bool = True, scores: str | None = "block", values: str | None = None, scale: float | None = None,
                   block_sizes: tuple[int, int] = (128, 64), tile_sizes: tuple[int, int] | None = None, return_residual: bool = False,
                   implementation: str | None = None):
    """Softmax attention whose queries and keys are int8.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      is_causal: whether query i sees the keys up to i alone.
      mask: which pairs are allowed (see :mod:`attnx.masks`), besides.
      smooth_k: whether keys lose their mean over the sequence first.
      scores: what shares a scale among queries and among keys: 'block', of ``block_sizes``; 'token', a row; None: queries and keys as they are.
      values: how weights and values are rounded: None, as values are, summed in float32; 'float16'; 'float16 sums', sums over the keys of a block too; 'int8', values
        at a scale for each channel of the sequence, weights at 1 / 127; 'float8' (e4m3). The paper's default is 'float16 sums', which TPUs lack.
      scale: factor of the dot product, 1 / sqrt(H) by default.
      block_sizes: (queries, keys) that share a scale, powers of two.
      tile_sizes: (queries, keys) of a tile, whole blocks, as block_sizes of :func:`attnx.attention`. Weights are rounded relative to the largest score so far,
        which tiles determine.
      return_residual: also return the log-normaliser [B, T, N], that of the keys as they came.
      implementation: as in :func:`attnx.attention`, or 'triton': a forward kernel in Triton itself, for an NVIDIA GPU (``pip install attnx[cuda]``), without ``mask``, of
        scores 'token' or 'block' (multiples of 128 and 64) and values None (16 bits), 'float16', 'int8' or 'float8' (weights at 1 / 448).

    Returns:
      [B, T, N, Hv] in the query's dtype; with return_residual the pair (out, r).

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.
      NotImplementedError: a named implementation cannot serve the call; says what it lacks.

    Cost: as attention, at the rate of int8 in the product of queries and keys; memory O(T + S). Gradients, in reverse mode, are those before rounding with the rounded
    scores' weights, and evaluate the scores again.

    >>> import attnx, jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 16))
    >>> out = sage_attention(q, k + 30.0, v, is_causal=True)
    >>> bool(abs(out - attnx.attention(q, k, v, mask=attnx.masks.causal())).max() < 0.02)
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    checks.check_choice("implementation", implementation, (*IMPLEMENTATIONS, "triton"))
    checks.check_parts((), mask, Softmax())
    int8(scores, values, block_sizes=block_sizes)  # checks all three
    options = _Options(scores, values, bool(smooth_k), checks.check_scale(scale, query.shape[3]), checks.check_block_sizes(block_sizes), implementation,
                       tile_sizes)
    if implementation == "triton" and mask is not None:
        raise NotImplementedError("implementation='triton': the kernels of quantised attention have is_causal and no other masks; use 'pallas' or None")
    out, r = _attend(options, query, key, value, mask if not is_causal else causal() & mask)
    return (out, r) if return_residual else out


def _smooth(options, query, key):
    """Keys to be rounded, and what the log-normaliser lost by it, [B, T, N]."""
    if not options.smooth or 0 in key.shape:
        return key, 0.0
    smoothed, mean = smooth_k(key.astype(accumulator_dtype(key.dtype)))
    mean = jnp.repeat(mean, query.shape[2] // key.shape[2], axis=2)
    return smoothed, options.scale * jnp.sum(query.astype(mean.dtype) * mean, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, query, key, value, mask):
    dtype, wide = query.dtype, accumulator_dtype(query.dtype)
    key, lost = _smooth(options, query, key)
    if options.implementation == "triton":
        out, r = _in_triton(options, query, key, value, is_causal=mask is not None)
        return out, r + lost
    parts: tuple[Codes, ...] = ()
    factor = None
    if options.scores is None:
        key, scale = key.astype(dtype), options.scale
    else:
        (query, row), (key, column) = (quant_int8(x, options.scores, block) for x, block in zip((query, key), options.block_sizes))
        more = [(0, 0)] * 3 + [(0, power(query.shape[3]) - query.shape[3])]  # kernels want heads of a power of two where the product is not their own
        query, key = (jnp.pad(_widened(x, wide), more) for x in (query, key))
        parts, scale = (Codes(row[..., 0] * options.scale, column[..., 0]),), 1.0
    products = int8(None, options.values, block_sizes=options.block_sizes)
    if options.values == "int8":
        value, factor = quant_int8(value, "channel")
        value, products = _widened(value, wide), Quantised((("values", UpToOne(), Format()),), (), options.block_sizes)
    weights = Softmax()
    program, data = bind(query, key, value, scores=parts, mask=mask, weights=weights, scale=scale, products=products, dtype=dtype if factor is None else wide)
    out, r = evaluate(program, data, weights, options.implementation, return_residual=True, block_sizes=options.tiles)
    if factor is not None:
        out = (out * jnp.repeat(factor, out.shape[2] // factor.shape[2], axis=2)).astype(dtype)
    return out, r + lost


def _in_triton(options, query, key, value, is_causal):
    fused.check_native("triton", "the kernels of quantised attention")
    if options.scores is None or options.values == "float16 sums" or options.tiles is not None:
        raise NotImplementedError("implementation='triton': the kernels of quantised attention take scores 'block' and 'token', sums of values in float32 and tiles of "
                                  f"their own, got scores={options.scores!r}, values={options.values!r} and tile_sizes={options.tiles}; use 'pallas' or None")
    shares = options.block_sizes if options.scores == "block" else (1, 1)
    coded = []
    for x, share in zip((query, key), shares):
        codes, scale = quant_int8(x, options.scores, share)
        coded.append(triton_launch.Codes(codes, scale[:, ::share], share))
    if options.values == "int8":
        codes, scale = quant_int8(value, "channel")
        value = triton_launch.Codes(codes, scale, value.shape[1] + -value.shape[1] % triton_launch.COLUMNS)
    elif options.values == "float8":
        share = options.block_sizes[1]
        codes, scale = formats.encode(value, formats.block_maximum(abs(value), 1, share), "float8_e4m3fn")
        value = triton_launch.Codes(codes, scale[:, ::share], share)
    elif options.values == "float16":
        value = value.astype(jnp.float16)
    out, r = triton_launch.attend(*coded, value, scale=options.scale, dtype=query.dtype, is_causal=is_causal, return_residual=True)
    return out, jnp.swapaxes(r, 1, 2)


def _widened(codes, dtype):
    """Codes in float64 where sums are."""
    return codes if dtype == jnp.float32 else codes.astype(dtype)


def _forward(options, *arrays):
    return _attend(options, *arrays), arrays


def _backward(options, arrays, cotangents):
    *arrays, mask = arrays
    products = int8(options.scores, block_sizes=options.block_sizes)
    implementation = None if options.implementation == "triton" else options.implementation

    def again(query, key, value):
        smoothed, lost = _smooth(options, query, key)
        out, r = attention(query, smoothed.astype(key.dtype), value, mask=mask, scale=options.scale, products=products, return_residual=True,
                           implementation=implementation, block_sizes=options.tiles)
        return out, r + lost

    real, others, join = partition(mask)
    nothing = join([jnp.zeros_like(x) for x in real], [np.zeros(x.shape, jax.dtypes.float0) for x in others])
    return *jax.vjp(again, *arrays)[1](cotangents), nothing


_attend.defvjp(_forward, _backward)


def choose_kernel_per_layer(query: Float[Array, "L B T N H"], key: Float[Array, "L B S K H"], value: Float[Array, "L B S K Hv"], *, fast: str = "vB", accurate: str = "B",
                            threshold: float = 0.998, **options) -> tuple[str, ...]:
    """Which variant each layer of a model can take, by how near it comes to exact attention on what the layer has been given.

    Args:
      query, key, value: of each layer for some calibration text.
      fast, accurate: names of :data:`SAGE_VARIANTS`: the first where its output's cosine similarity to the exact one is at least ``threshold``, else the second.
      **options: is_causal, mask, smooth_k, scale, block_sizes as in :func:`sage_attention`.

    Returns:
      A name a layer.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, 64, 2, 16))
    >>> choose_kernel_per_layer(q, k, v), choose_kernel_per_layer(q, k, v, threshold=1.0)
    (('vB', 'vB'), ('B', 'B'))
    """
    for argument, name in (("fast", fast), ("accurate", accurate)):
        if name not in SAGE_VARIANTS:
            raise ValueError(f"{argument}: expected one of {', '.join(SAGE_VARIANTS)}, got {name!r}")
    for argument, x in (("query", query), ("key", key), ("value", value)):
        checks.check_array(argument, x)
        if len(x.shape) != 5 or x.shape[0] != query.shape[0]:
            raise ValueError(f"{argument}: expected shape [L, B, T, N, H] with as many layers as query, got {checks.describe(x)}")

    def cosine(layer):
        exact = sage_attention(*layer, scores=None, **options)
        return error_metrics(sage_attention(*layer, **SAGE_VARIANTS[fast], **options), exact)["cosine"]

    return tuple(fast if x >= threshold else accurate for x in lax.map(cosine, (query, key, value)).tolist())
