"""How concentrated attention is, as measured in Nahshan, Kampeas, Haleva: "Linear Log-Normal Attention with Unbiased Concentration" (ICLR 2024, arXiv 2311.13541)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnx.core.checks import check_real


def log_variance(weights: Float[Array, "... T S"]) -> Float[Array, "..."]:
    """The variance of the logarithms of all weights of a map: that of the scores for softmax attention, up to the rows' normalisers.

    Args:
      weights: [..., T, S], positive.

    Returns:
      [...], in float32 (float64 for float64).

    >>> import jax.numpy as jnp
    >>> log_variance(jnp.exp(jnp.array([[0.0, 2.0], [2.0, 0.0]]))).round(5)
    Array(1., dtype=float32)
    """
    weights = check_real("weights", weights)
    return jnp.var(jnp.log(weights.astype(jnp.promote_types(weights.dtype, jnp.float32))), axis=(-2, -1))


def row_entropy(weights: Float[Array, "... T S"]) -> Float[Array, "... T"]:
    """The entropy of each row in nats, ``- sum_j p_ij log p_ij``: log S where all is attended to alike, 0 where one key is.

    Args:
      weights: [..., T, S], rows that sum to 1; weights of 0 count as they should.

    Returns:
      [..., T], in float32 (float64 for float64).

    >>> import jax.numpy as jnp
    >>> row_entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]])).round(3)
    Array([0.693, 0.   ], dtype=float32)
    """
    weights = check_real("weights", weights)
    return jnp.sum(jax.scipy.special.entr(weights.astype(jnp.promote_types(weights.dtype, jnp.float32))), axis=-1)


def spectral_gap(weights: Float[Array, "... T T"]) -> Float[np.ndarray, "..."]:
    """``1 - |lambda_2|``, lambda_2 the second largest eigenvalue by modulus of a map whose rows sum to 1: how quickly repeated attention makes all tokens alike.

    Args:
      weights: [..., T, T], not traced: eigenvalues of general matrices are computed on the host, in float64. T at least 2.

    Returns:
      [...] in NumPy, from 0 (the identity) to 1 (all rows the same).

    >>> import jax.numpy as jnp
    >>> spectral_gap(jnp.stack([jnp.full((4, 4), 0.25), jnp.eye(4)])).round(6).tolist()
    [1.0, 0.0]
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] < 2:
        raise ValueError(f"weights: expected shape [..., T, T] with T at least 2, got {list(weights.shape)}")
    return 1 - np.sort(np.abs(np.linalg.eigvals(weights)), axis=-1)[..., -2]
