"""Attention sinks, outliers and sparsity, as measured in Zuhri, Fuadi, Aji: "Softpick: No Attention Sink, No Massive Activations with Rectified Softmax"
(2025, arXiv 2504.20966)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnx.core.checks import check_real


def sink_rate(weights: Float[Array, "... T S"], threshold: float = 0.3) -> Float[Array, ""]:
    """The share of heads whose queries give the first key more than ``threshold`` of their weight on average.

    Args:
      weights: [..., T, S], the maps of any number of heads, layers and sequences.
      threshold: what counts as a sink.

    Returns:
      A share, 0 to 1.

    >>> import jax.numpy as jnp
    >>> heads = jnp.stack([jnp.eye(8), jnp.zeros((8, 8)).at[:, 0].set(1.0)])
    >>> sink_rate(heads)
    Array(0.5, dtype=float32)
    """
    weights = check_real("weights", weights)
    return jnp.mean(jnp.mean(weights[..., 0], axis=-1) > threshold, dtype=jnp.promote_types(weights.dtype, jnp.float32))


def activation_kurtosis(hidden: Float[Array, "..."]) -> Float[Array, ""]:
    """The kurtosis ``E (h - E h)^4 / Var(h)^2`` of activations: 3 for normal ones, large where few of them are massive; NaN for constant ones.

    >>> import jax.numpy as jnp
    >>> activation_kurtosis(jnp.array([-1.0, 1.0]))
    Array(1., dtype=float32)
    """
    hidden = check_real("hidden", hidden)
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    square = (hidden - hidden.mean()) ** 2
    return jnp.mean(square**2) / jnp.mean(square) ** 2


def sparsity(weights: Float[Array, "... T S"], where=None) -> Float[Array, ""]:
    """The share of weights that are exactly zero.

    Args:
      weights: [..., T, S].
      where: boolean, broadcasting against them: the pairs that count, such as those a mask allows; all by default.

    >>> import jax.numpy as jnp
    >>> sparsity(jnp.eye(4), where=jnp.tril(jnp.ones((4, 4), bool)))
    Array(0.6, dtype=float32)
    """
    weights = check_real("weights", weights)
    where = None if where is None else jnp.broadcast_to(where, weights.shape)
    return jnp.mean(weights == 0, where=where, dtype=jnp.promote_types(weights.dtype, jnp.float32))
