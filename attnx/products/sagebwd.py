"""SageBwd: attention trained with products of 8-bit integers, all but one, forward and backward.

Zhang et al.: "SageAttention3: Microscaling FP4 Attention for Inference and An Exploration of 8-Bit Training" (NeurIPS 2025, arXiv 2505.11594). With ~ for rounded to int8
and keys smoothed (see :func:`attnx.products.smooth_k`),

    s = scale ~q ~k^T       p = e^(s - m)          out = ~p ~v / sum p        scales: of q and k by block of tokens; of p by row of a tile, of v by block
    dv = ~p^T ~do           dp = do v^T            ds = p (dp - <do, out>)
    dq = scale ~ds ~k       dk = scale ~ds^T ~q                               all by block; scores are computed again, as forward

``dp`` is not rounded, but in the dtype of the arrays (the paper's is float16): its error would reach dq and dk through sums over the whole sequence. ``dq`` may use
smoothed keys, since rows of ds sum to zero. Blocks are 128 queries and 64 keys. Reconstructed: block sizes of the backward pass and the scale of p are not published.
"""

from jaxtyping import Array, Float

from attnx.core import checks
from attnx.masks.causal import causal
from attnx.products.eight_bits import Quantised, Scaled
from attnx.products.smoothing import smoothed_attention
from pallas_kernels.parts import Mask
from pallas_kernels.products import Products


def sagebwd_products(block_sizes: tuple[int, int] = (128, 64)) -> Products:
    """The six products of SageBwd, 'dp' as it is.

    Args:
      block_sizes: (queries, keys) that share a scale, powers of two.

    >>> sagebwd_products().blocks
    (128, 64)
    """
    block, row = Scaled("int8", "block"), Scaled("int8", "token")
    return Quantised((("scores", block, block), ("values", row, block), ("dv", block, block), ("dq", block, block), ("dk", block, block)), (),
                     checks.check_block_sizes(block_sizes))


def sagebwd_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    is_causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
    smooth_k: bool = True,
    products: Products = sagebwd_products(),
    implementation: str | None = None,
    tile_sizes: tuple[int, int] | None = None,
    return_residual: bool = False,
):
    """Softmax attention whose forward and backward passes multiply 8-bit integers, see the module.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      is_causal: whether keys after a query are hidden from it.
      mask: which pairs are allowed (see :mod:`attnx.masks`).
      scale: 1 / sqrt(H) by default.
      smooth_k: whether the mean of all keys is taken out.
      products: :func:`sagebwd_products`'s, or others.
      implementation: as of :func:`attnx.attention`.
      tile_sizes: its block_sizes: queries and keys of a tile, whole blocks of ``products``.
      return_residual: also return the log of each row's normaliser, of keys as they came.

    Returns:
      [B, T, N, Hv] in the query's dtype; with return_residual the pair (out, r [B, T, N]). Rows with nothing to attend to are zero, r is -inf there.

    Raises:
      ValueError, TypeError, NotImplementedError: as :func:`attnx.attention`.

    Cost: O(T S) time, five of six products at the rate of int8; O(T + S) memory.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 200, 2, 32))
    >>> slopes = jax.grad(lambda q: jnp.sum(sagebwd_attention(q, k, v, is_causal=True)**2))(q)
    >>> exact = jax.grad(lambda q: jnp.sum(sagebwd_attention(q, k, v, is_causal=True, products=attnx.products.Products())**2))(q)
    >>> bool(jnp.vdot(slopes, exact) > 0.99 * jnp.linalg.norm(slopes) * jnp.linalg.norm(exact))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    if is_causal:
        mask = causal() if mask is None else mask & causal()
    return smoothed_attention(query, key, value, smooth=smooth_k, products=products, mask=mask, scale=checks.check_scale(scale, query.shape[3]),
                              implementation=implementation, block_sizes=tile_sizes, return_residual=return_residual)
