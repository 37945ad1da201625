"""SageAttention3: attention whose operands are 4-bit numbers in small groups that share a scale, for inference.

Zhang et al.: "SageAttention3: Microscaling FP4 Attention for Inference and An Exploration of 8-Bit Training" (NeurIPS 2025, arXiv 2505.11594). With kbar the mean of all
keys, qbar_i the mean of the 128 queries around i, and ~ for rounded (see :func:`attnx.products.nvfp4`),

    s_ij  = scale (~(q_i - qbar_i) . ~(k_j - kbar)  +  qbar_i . (k_j - kbar)),            p_ij = e^(s_ij - m_i)
    out_i = sum_j ~(2688 p_ij) ~v_j / (2688 sum_j p_ij)

kbar adds the same to all scores of a row, which softmax does not see: what keys have in common, which is large in few channels, need not be rounded. Both means are
exact. Groups of 16 (of 32 in MXFP4) lie along features in q and k, along tokens in p and v: a token's own scale for v, along its features, could not leave the sum
over tokens. Of 2688 = 448 * 6, the factor 6 makes the largest weight of a row exact (1/6 is no e4m3 number, and 1 would become 1.03), and 448 keeps groups of small
weights from scales below the least that e4m3 has: a tail of weights under 0.006 would vanish.

Every product is emulated bit by bit: what it yields is that of a GPU with 4-bit matrix units, up to the order in which float32 adds; how long it takes is not. Rounding
looks at neighbours: a query's 127, a value's 15 and, by kbar, all keys, those that a mask hides and later ones too. So outputs depend on them, by about the
rounding error.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.masks.causal import causal
from attnx.products.four_bits import QUERIES, block_means, each_row, four_bit_products
from attnx.products.smoothing import smoothed_attention
from pallas_kernels.parts import Mask


def smooth_q(query: Float[Array, "B T N H"], block: int = QUERIES) -> tuple[Float[Array, "B T N H"], Float[Array, "B M N H"]]:
    """Queries without what those of a block have in common.

    Args:
      query: [B, T, N, H].
      block: queries that share a mean. A last block that is not full has the mean it would have if zeros filled it up.

    Returns:
      ``(query - mean of its block, means [B, ceil(T / block), N, H])``.

    >>> rest, means = smooth_q(jnp.arange(4.0).reshape(1, 4, 1, 1), 2)
    >>> rest.ravel().tolist(), means.ravel().tolist()
    ([-0.5, 0.5, -0.5, 0.5], [0.5, 2.5])
    """
    checks.check_integer("block", block, least=1)
    by_head = jnp.swapaxes(checks.check_real("query", query, ranks=(4,)), 1, 2)
    means = block_means(by_head, block)
    return jnp.swapaxes(by_head - each_row(means, query.shape[1], block), 1, 2), jnp.swapaxes(means, 1, 2)


def sage3_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    is_causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
    fmt: str | None = "nvfp4",
    smooth_k: bool = True,
    per_block_mean: bool | None = True,
    two_level_p: bool = True,
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = (128, 128),
    return_residual: bool = False,
):
    """Softmax attention with operands of 4 bits, see the module.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      is_causal: whether keys after a query are hidden from it.
      mask: which pairs are allowed (see :mod:`attnx.masks`).
      scale: 1 / sqrt(H) by default.
      fmt: 'nvfp4', 'mxfp4', or None, which rounds nothing.
      smooth_k: whether the mean of all keys is taken out.
      per_block_mean: whether the mean of every 128 queries is taken out (True), that of all (False), or none (None).
      two_level_p: whether weights are multiplied by 448 * 6 before they are rounded.
      implementation: as of :func:`attnx.attention`.
      tile_sizes: queries and keys of a tile. Weights are rounded relative to the largest score so far, so that results depend on it, if little.
      return_residual: also return the log of each row's normaliser, of the scores before smoothing.

    Returns:
      [B, T, N, Hv] in the query's dtype; with return_residual the pair (out, r [B, T, N]). Rows with nothing to attend to are zero, r is -inf there.

    Raises:
      ValueError, TypeError, NotImplementedError: as :func:`attnx.attention`.

    Cost: O(T S) time, O(T + S) memory; gradients are those of attention without rounding at the rounded forward pass's weights.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 200, 2, 32))
    >>> out = sage3_attention(q, k, v, is_causal=True)
    >>> exact = sage3_attention(q, k, v, is_causal=True, fmt=None)
    >>> bool(jnp.abs(out - exact).mean() < 0.1)
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    if per_block_mean not in (True, False, None):
        raise ValueError(f"per_block_mean: expected True, False or None, got {checks.describe(per_block_mean)}")
    scale = checks.check_scale(scale, query.shape[3])
    products = four_bit_products(fmt, bool(per_block_mean), two_level_p)
    if is_causal:
        mask = causal() if mask is None else mask & causal()
    apart = None
    if per_block_mean is False:
        apart = lax.stop_gradient(query.mean(1, keepdims=True))
    return smoothed_attention(query, key, value, apart=apart, smooth=smooth_k, products=products, mask=mask, scale=scale,
                              implementation=implementation, block_sizes=tile_sizes, return_residual=return_residual)
