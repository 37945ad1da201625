"""The order of a grid's tokens: by rows, or so that each tile of the grid, of one residue class, is contiguous."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnx.core import checks
from pallas_kernels.parts import Range

Shape = tuple[int, ...]
Sizes = int | Sequence[int]


class Order(NamedTuple):
    """How tokens of a grid follow one another: by rows (no tile), or class by class, tile by tile, and in a tile by rows.

    Attributes:
      grid, dilation: a number a dimension.
      tile: as well, or None.
    """

    grid: Shape
    dilation: Shape
    tile: Shape | None = None

    @property
    def tiles(self) -> Shape:
        """Tiles of a class, a number a dimension."""
        assert self.tile is not None
        return tuple(-(-n // (d * t)) for n, d, t in zip(self.grid, self.dilation, self.tile))

    @property
    def radices(self) -> Shape:
        """Of the digits of a position."""
        return self.grid if self.tile is None else (*self.dilation, *self.tiles, *self.tile)

    def boxes(self, low, high) -> list[tuple[Range, Range]]:
        """For each dimension, what is known of the classes and of the places in them of the tokens at positions low .. high: exact for one token, and for a tile."""
        digits, rest = [], 1
        for radix in reversed(self.radices):
            first, last = low // rest, high // rest
            rest *= radix
            if low is high:
                digits.append(Range(first % radix, first % radix))
                continue
            together = first // radix == last // radix
            digits.append(Range(jnp.where(together, first % radix, 0), jnp.where(together, last % radix, radix - 1)))
        digits.reverse()
        if self.tile is not None:
            dims = len(self.grid)
            return [(classes, Range(t.low * size + w.low, t.high * size + w.high))
                    for classes, t, w, size in zip(digits[:dims], digits[dims:2 * dims], digits[2 * dims:], self.tile)]
        boxes = []
        for digit, d in zip(digits, self.dilation):
            places = Range(digit.low // d, digit.high // d)
            same = True if low is high else places.low == places.high
            boxes.append((Range(jnp.where(same, digit.low % d, 0), jnp.where(same, digit.high % d, d - 1)), places))
        return boxes


def each_dimension(name: str, value, dims: int, most: Sequence[int] | None = None) -> Shape:
    """A number a dimension, at least 1."""
    values = (value,) * dims if isinstance(value, (int, np.integer)) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"{name}: expected an integer or one for each of {dims} dimensions, got {value}")
    return tuple(checks.check_integer(name, x, least=1, most=limit) for x, limit in zip(values, most or (None,) * dims))


def token_permute(x: Float[Array, "B ..."], tile: Sequence[int], dilation: Sizes = 1) -> Float[Array, "B T ..."]:
    """Tokens of a grid in an order in which each tile of each residue class is contiguous.

    Args:
      x: [B, *grid, ...], as many dimensions of the grid as ``tile`` has.
      tile: sizes of a tile, in places of a class.
      dilation: whose residue classes are kept apart.

    Returns:
      [B, T, ...], zeros where the grid is no multiple of dilation times tile.

    >>> token_permute(jnp.arange(16).reshape(1, 4, 4), (2, 2))[0].tolist()
    [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    """
    order = _order(x.shape[1:1 + len(tile)], tile, dilation)
    dims, rest = len(tile), x.shape[1 + len(tile):]
    padded = [(0, d * t * size - n) for n, d, t, size in zip(order.grid, order.dilation, order.tile, order.tiles)]
    x = jnp.pad(x, [(0, 0), *padded, *((0, 0) for _ in rest)])
    x = x.reshape(x.shape[0], *(size for triple in zip(order.tiles, order.tile, order.dilation) for size in triple), *rest)
    axes = [1 + 3 * i + which for which in (2, 0, 1) for i in range(dims)]
    return x.transpose(0, *axes, *range(1 + 3 * dims, x.ndim)).reshape(x.shape[0], -1, *rest)


def token_unpermute(x: Float[Array, "B T ..."], grid: Sequence[int], tile: Sequence[int], dilation: Sizes = 1) -> Float[Array, "B ..."]:
    """The inverse of :func:`token_permute`, without its padding: [B, T, ...] to [B, *grid, ...].

    >>> x = jnp.arange(15.0).reshape(1, 3, 5)
    >>> bool((token_unpermute(token_permute(x, (2, 2)), (3, 5), (2, 2)) == x).all())
    True
    """
    order = _order(grid, tile, dilation)
    dims, rest = len(order.grid), x.shape[2:]
    if x.shape[1] != math.prod(order.radices):
        raise ValueError(f"x: expected {math.prod(order.radices)} tokens for a grid {order.grid} in tiles {order.tile}, got {x.shape[1]}")
    x = x.reshape(x.shape[0], *order.radices, *rest)
    axes = [1 + which * dims + i for i in range(dims) for which in (1, 2, 0)]
    x = x.transpose(0, *axes, *range(1 + 3 * dims, x.ndim))
    x = x.reshape(x.shape[0], *(t * size * d for t, size, d in zip(order.tile, order.tiles, order.dilation)), *rest)
    return x[:, *(slice(n) for n in order.grid)]


def _order(grid, tile, dilation):
    dims = len(grid)
    return Order(tuple(grid), each_dimension("dilation", dilation, dims, grid), each_dimension("tile", tile, dims))
