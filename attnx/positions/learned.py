"""Learned absolute position embedding: a table read at the position, added to the token embeddings.

Source: Jonas Gehring, Michael Auli, David Grangier, Denis Yarats, Yann N. Dauphin, "Convolutional Sequence to Sequence Learning",
2017, arXiv:1705.03122.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def learned(positions: Int[Array, "*any"], table: Float[Array, "L features"]) -> Float[Array, "*any features"]:
    """Row ``positions`` of a table: ``e_p = table[p]``; padding (p = -1) gets zeros.

    A position past the end of the table gives NaN, rather than silently the last row. Costs O(T * features).

    Args:
      positions: integers of any shape [...].
      table: [L, features], a row for each position that can be told apart.

    Returns:
      [..., features].

    Example:
      >>> import jax.numpy as jnp
      >>> learned(jnp.array([2, -1]), jnp.eye(3)).tolist()
      [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    rows = table.at[jnp.maximum(positions, 0)].get(mode="fill", fill_value=jnp.nan)
    return jnp.where((positions >= 0)[..., None], rows, 0)
