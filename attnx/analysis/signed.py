"""What negative weights do to a model, after Lv, Xie, Li, Liao, Sun, Kang, Wang, Yan: "More Expressive Attention with Negative Weights" (2024, arXiv 2411.07176)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnx.core.checks import check_real, describe


def negative_mass(weights: Float[Array, "... T S"], where=None) -> Float[Array, ""]:
    """How much of the weight is negative: ``sum max(-w, 0) / sum |w|``; 0 for weights that are all zero.

    Args:
      weights: [..., T, S], the maps of any number of heads, layers and sequences.
      where: booleans that broadcast against them: the pairs that count; all by default.

    Returns:
      A share, 0 to 1.

    >>> import jax.numpy as jnp
    >>> negative_mass(jnp.array([[0.5, -0.25], [0.0, 0.25]]))
    Array(0.25, dtype=float32)
    """
    weights = check_real("weights", weights)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    where = jnp.ones((), bool) if where is None else where
    total = jnp.sum(jnp.where(where, jnp.abs(weights), 0))
    return jnp.sum(jnp.where(where, jax.nn.relu(-weights), 0)) / jnp.where(total > 0, total, 1)


def layer_cosine_collapse(states: Float[Array, "*L T D"]) -> Float[Array, "*L"]:
    """The mean cosine between the vectors of neighbouring tokens: near 1 where a layer's tokens have become alike.

    Args:
      states: [..., T, D], T at least 2, of any number of layers and sequences; a vector of zeros is like no other.

    Returns:
      [...], in float32 (float64 for float64).

    Raises:
      ValueError: fewer than two tokens.

    >>> import jax.numpy as jnp
    >>> layer_cosine_collapse(jnp.array([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]))
    Array([1., 0.], dtype=float32)
    """
    states = check_real("states", states)
    if states.ndim < 2 or states.shape[-2] < 2:
        raise ValueError(f"states: expected shape [..., T, D] with T at least 2, got {describe(states)}")
    states = states.astype(jnp.promote_types(states.dtype, jnp.float32))
    square = jnp.sum(states**2, axis=-1, keepdims=True)
    unit = states * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
    return jnp.mean(jnp.sum(unit[..., 1:, :] * unit[..., :-1, :], axis=-1), axis=-1)
