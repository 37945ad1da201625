"""How close attention matrices are to matrices of low rank.

As in Wang, Li, Khabsa, Fang, Ma: "Linformer: Self-Attention with Linear Complexity" (2020, arXiv 2006.04768).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnx.core import checks


def spectrum(weights: Float[Array, "... T S"]) -> Float[Array, "... R"]:
    """Cumulative singular values, as a share of their sum: entry r - 1 is what the best matrix of rank r keeps.

    Args:
      weights: [..., T, S].

    Returns:
      [..., min(T, S)] in at least float32, rising to 1; zeros for a matrix of zeros. O(T S min(T, S)).

    >>> import jax.numpy as jnp
    >>> [f"{share:.2f}" for share in spectrum(jnp.eye(4))], [f"{share:.2f}" for share in spectrum(jnp.ones((2, 3)) / 3)]
    (['0.25', '0.50', '0.75', '1.00'], ['1.00', '1.00'])
    """
    weights = checks.check_real("weights", weights)
    if weights.ndim < 2:
        raise ValueError(f"weights: expected shape [..., T, S], got {checks.describe(weights)}")
    values = jnp.linalg.svd(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)), compute_uv=False)
    total = values.sum(-1, keepdims=True)
    return jnp.cumsum(values, axis=-1) / jnp.where(total > 0, total, 1)
