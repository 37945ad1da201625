"""Keys without what all of them have in common, which softmax does not see.

Zhang et al.: "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration" (ICLR 2025, arXiv 2410.02367). With kbar the mean of all keys of a head,
q . (k_j - kbar) is q . k_j less a number that all keys of the row share, so the weights are the same and ``r``, the log of the normaliser, is lower by scale q . kbar.
What keys have in common lies in a few channels and is large: without it they lose less when they are rounded. The mean must be one for all keys of a row.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnx.core.attention import attention
from attnx.scores.bias import bias
from pallas_kernels.quantised.formats import smooth_k
from pallas_kernels.tile import accumulator_dtype


def residual_correction(query: Float[Array, "B T N H"], mean: Float[Array, "B 1 K H"], scale: float) -> Float[Array, "B T N"]:
    """``scale q . kbar``: what smoothing took from the log of each row's normaliser, in at least float32.

    >>> residual_correction(jnp.ones((1, 2, 4, 3)), jnp.ones((1, 1, 2, 3)), 0.5).shape
    (1, 2, 4)
    """
    b, t, n, h = query.shape
    k = mean.shape[2]
    by_head = query.reshape(b, t, k, n // k, h).astype(mean.dtype)
    return scale * jnp.einsum("btkgh,bskh->btkg", by_head, mean, precision=lax.Precision.HIGHEST).reshape(b, t, n)


def delta_scores(means: Float[Array, "B M N H"], key: Float[Array, "B S K H"]) -> Float[Array, "B N M S"]:
    """What means that were taken out of queries add to the scores of their rows: ``means . key``, in at least float32.

    Args:
      means: [B, M, N, H], of M blocks of queries, see :func:`attnx.products.smooth_q`.
      key: [B, S, K, H], smoothed or not.

    Returns:
      [B, N, M, S], not scaled.

    >>> delta_scores(jnp.ones((1, 2, 1, 3)), jnp.ones((1, 5, 1, 3))).shape
    (1, 1, 2, 5)
    """
    (b, m, n, h), (_, s, k, _) = means.shape, key.shape
    dtype = accumulator_dtype(key.dtype)
    if n % k or key.shape[0] != b or key.shape[3] != h:
        raise ValueError(f"key: expected [{b}, S, K, {h}], K a divisor of {n}, for means {means.shape}, got {key.shape}")
    return jnp.einsum("bmkgh,bskh->bkgms", means.reshape(b, m, k, n // k, h).astype(dtype), key.astype(dtype), precision=lax.Precision.HIGHEST).reshape(b, n, m, s)


def smoothed_attention(query, key, value, *, scale: float, apart=None, smooth: bool = True, return_residual: bool = False, **parts):
    """:func:`attnx.attention` of smoothed keys, with the residual of keys as they came.

    Args:
      query, key, value, return_residual, **parts: as there.
      scale: a number.
      apart: [B, 1, N, H], taken from all queries, whose scores with keys are added exactly; or None.
      smooth: whether keys are smoothed at all.
    """
    mean = None
    if smooth and key.shape[1]:
        _, mean = smooth_k(lax.stop_gradient(key))  # to which softmax is indifferent
        key = (key.astype(mean.dtype) - mean).astype(key.dtype)
    rest = query
    if apart is not None:
        rest = (query - apart).astype(query.dtype)
        parts["scores"] = bias(delta_scores(apart, key) * scale)
    out = attention(rest, key, value, scale=scale, return_residual=return_residual, **parts)
    if not return_residual:
        return out
    out, r = out
    return out, r if mean is None else r + residual_correction(query, mean, scale).astype(r.dtype)
