"""Attention's products on operands of 4 bits in small groups: NVFP4 and MXFP4, see :mod:`pallas_kernels.quantised.microscaling`.

Zhang et al.: "SageAttention3: Microscaling FP4 Attention for Inference and An Exploration of 8-Bit Training" (NeurIPS 2025, arXiv 2505.11594). Groups lie along the
axis that is summed over: features of q and k, keys of p and tokens of v. With c_i the mean of the block of 128 queries that has i, and ~ for rounded

    scores    ~(q_i - c_i) . ~k_j  +  c_i . k_j              the second term in float32: what queries have in common costs no range
    values    sum_j ~(2688 p_ij) ~v_j / 2688                 2688 = 448 * 6: a weight of 1 is exact, small ones stay in the range of e4m3

Sums of p, which divide the result, are those of p before rounding. Rounded operands are exact in bfloat16, so the products are those of 4-bit matrix units, up to the
order in which float32 adds. Gradients are made of operands as they are: this is for inference.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from attnx.core.checks import check_choice
from pallas_kernels.parts import Softmax
from pallas_kernels.products import Products, Rounded, accumulator_dtype, multiply
from pallas_kernels.quantised.microscaling import E2M1_MAX, E4M3_MAX, FORMATS, rounded

QUERIES = 128


def block_means(x, block: int = QUERIES):
    """Means of ``block`` rows each, [.., T, H] as [.., ceil(T / block), H]; of a last block that is not full, as if rows of zeros filled it up."""
    *lead, rows, size = x.shape
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -rows % block), (0, 0)]) if rows % block else x
    return x.reshape(*lead, x.shape[-2] // block, block, size).sum(-2) / block


def each_row(means, rows: int, block: int = QUERIES):
    """What blocks have, [.., ceil(T / block), X], as their rows have it, [.., T, X]."""
    *lead, blocks, size = means.shape
    x = jnp.broadcast_to(means[..., None, :], (*lead, blocks, block, size)).reshape(*lead, blocks * block, size)
    return x if blocks * block == rows else lax.slice_in_dim(x, 0, rows, axis=-2)


@dataclasses.dataclass(frozen=True)
class FP4(Rounded):
    """Products of operands of 4 bits. See :func:`nvfp4`.

    Attributes:
      fmt: 'nvfp4' or 'mxfp4'; None rounds nothing, so that what is left is the smoothing.
      smooth_queries: whether the mean of every 128 queries is multiplied apart, in float32.
      two_level: whether weights, at most 1, are multiplied by 448 * 6 before they are rounded.
    """

    fmt: str | None = "nvfp4"
    smooth_queries: bool = True
    two_level: bool = True

    @property
    def any_scale(self):
        return False  # scales of groups are rounded themselves, and have a least one

    @property
    def blocks(self):
        return QUERIES if self.smooth_queries else 1, FORMATS[self.fmt].group if self.fmt else 1

    def check(self, parts):
        if self.fmt and self.two_level and (parts.dropout_rate or not isinstance(parts.weights, Softmax)):
            raise NotImplementedError("products: two_level is for weights up to 1, those of softmax without dropout; "
                                      f"got weights={type(parts.weights).__name__} and dropout_rate={parts.dropout_rate}; use two_level=False")

    def product(self, name, a, b, contract, *, transposed=False):
        if name == "scores":
            return self._scores(b, a).T if transposed else self._scores(a, b)
        if name == "values":
            return self._values(a, b)
        return multiply(a, b, contract)

    def _rounded(self, x, axis):
        return x if self.fmt is None else rounded(x, self.fmt, axis)

    def _scores(self, q, k):
        dtype = accumulator_dtype(q.dtype)
        if not self.smooth_queries:
            return multiply(self._rounded(q, 1), self._rounded(k, 1), (1, 1)).astype(dtype)
        q, k = q.astype(dtype), k.astype(dtype)
        means = block_means(q)
        apart = lax.dot_general(means, k, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        rest = multiply(self._rounded(q - each_row(means, len(q)), 1), self._rounded(k, 1), (1, 1))
        return rest.astype(dtype) + each_row(apart, len(q))

    def _values(self, p, v):
        if self.fmt is None:
            return multiply(p, v, (1, 0))
        factor = E4M3_MAX * E2M1_MAX if self.two_level else 1.0
        return multiply(self._rounded(p * factor, 1), self._rounded(v, 0), (1, 0)).astype(accumulator_dtype(v.dtype)) / factor


def nvfp4(*, smooth_queries: bool = True, two_level: bool = True) -> Products:
    """Products of NVFP4 operands: codes of 4 bits, 16 of which share a scale of 8.

    Args:
      smooth_queries: whether the mean of every 128 queries is taken out before they are rounded, and multiplied with keys in float32.
      two_level: whether weights are rounded as multiples of 1 / (448 * 6): 6 makes a weight of 1 exact, and 448 puts scales of groups in the range of e4m3, which
        ends at 2^-9. For softmax without dropout.

    The rounded products are the two of the forward pass; gradients are those of the operands before rounding.

    >>> import attnx, jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 16))
    >>> rounded = attnx.attention(q, k, v, mask=attnx.masks.causal(), products=attnx.products.nvfp4())
    >>> bool(abs(rounded - attnx.attention(q, k, v, mask=attnx.masks.causal())).max() < 0.5)
    True
    """
    return FP4("nvfp4", smooth_queries, two_level)


def mxfp4(*, smooth_queries: bool = True, two_level: bool = True) -> Products:
    """As :func:`nvfp4` in MXFP4: 32 codes share a power of two.

    >>> mxfp4().blocks
    (128, 32)
    """
    return FP4("mxfp4", smooth_queries, two_level)


def four_bit_products(fmt: str | None, smooth_queries: bool, two_level: bool) -> Products:
    """Those of a format, or None for the smoothing alone."""
    check_choice("fmt", fmt, tuple(FORMATS))
    return FP4(fmt, smooth_queries, two_level)
