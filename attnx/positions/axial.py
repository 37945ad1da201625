"""Rotary positions of a grid: half of the channels turn with the row, half with the column.

Used for images by Qihang Fan, Huaibo Huang, Ran He, "Breaking the Low-Rank Dilemma of Linear Attention", 2025, arXiv:2411.07635, whose angles these are;
:func:`rotary` in two dimensions.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnx.positions.rotary import rotary


def axial_rotary(x: Float[Array, "B T N H"], rows: Int[Array, "*B T"], columns: Int[Array, "*B T"], *, base: float = 10000.0) -> Float[Array, "B T N H"]:
    """Rotates pairs of channels by angles proportional to the row (first half of the channels) and to the column (second half).

    Channel pair (2m, 2m + 1) of each half, m = 0 .. n - 1 with n = H / 4, turns by ``row * base^(-m / (n - 1))``, the other half's by the column. So scores
    depend on the displacement in the plane alone, and norms stay as they are.

    Args:
      x: [B, T, N, H], H a multiple of 4.
      rows, columns: int32 [T] or [B, T].
      base: the ratio of the slowest turn to the fastest, one radian a step.

    Returns:
      The shape and dtype of x.

    Raises:
      ValueError: a size of heads that is no multiple of 4, shapes that do not fit.

    Cost: O(T N H).

    >>> x = jnp.ones((1, 3, 1, 8))
    >>> turned = axial_rotary(x, jnp.array([0, 1, 1]), jnp.array([0, 0, 1]))
    >>> bool((turned[0, 0] == 1).all()), bool((turned[0, 1, 0, 4:] == 1).all()), bool((turned[0, 1, 0, :4] == turned[0, 2, 0, 4:]).all())
    (True, True, True)
    """
    if x.ndim != 4 or x.shape[-1] % 4:
        raise ValueError(f"x: expected shape [B, T, N, H] with H a multiple of 4, got {x.shape}")
    count = x.shape[-1] // 4
    wide = base ** (count / max(count - 1, 1))  # whose powers -m / n are those of the base to -m / (n - 1)
    halves = zip(jnp.split(x, 2, axis=-1), (rows, columns))
    return jnp.concatenate([rotary(half, jnp.asarray(places), base=wide, interleaved=True) for half, places in halves], axis=-1)


@dataclasses.dataclass(frozen=True)
class AxialRotary:
    """:func:`axial_rotary` of tokens that are a grid read row by row, as a query-key transform: what ``attnx.nn.Attention(position=...)`` takes.

    Token p is at row ``p // width`` and column ``p % width``.

    >>> q = k = jnp.ones((1, 6, 2, 8))
    >>> turned, _ = AxialRotary(width=3)(q, k)
    >>> s = jnp.einsum("btnh,bsnh->bnts", turned, turned)[0, 0]
    >>> bool(jnp.allclose(s[0, 4], s[1, 5]))  # one down, one to the right
    True
    """

    width: int
    """Tokens in a row."""
    base: float = 10000.0
    """As there."""

    def __call__(self, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], query_positions: Int[Array, "*B T"] | None = None,
                 key_positions: Int[Array, "*B S"] | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """Turns query [B, T, N, H] and key [B, S, K, H]."""
        def turn(x, places):
            places = jnp.arange(x.shape[1]) if places is None else places
            return axial_rotary(x, places // self.width, places % self.width, base=self.base)

        return turn(query, query_positions), turn(key, key_positions)
