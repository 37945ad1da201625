"""Orders in which attention or a scan visits the positions of a grid, their inverses, and the reordering of tokens by them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def _raster(shape, coordinates):
    return np.ravel_multi_index(coordinates, shape)


def _transposed(shape, coordinates):
    return np.ravel_multi_index(coordinates[::-1], shape[::-1])


def _snake(shape, coordinates):
    rank = np.zeros_like(coordinates[0])
    for n, c in zip(shape, coordinates):
        rank = rank * n + np.where(rank % 2, n - 1 - c, c)
    return rank


def _zigzag(shape, coordinates):
    diagonal, raster = sum(coordinates), _raster(shape, coordinates)
    size = math.prod(shape)
    return diagonal * size + np.where(diagonal % 2, raster, size - 1 - raster)


def _interleave(coordinates, bits):
    """One number from the bits of all coordinates, most significant first."""
    rank = np.zeros_like(coordinates[0])
    for bit in reversed(range(bits)):
        for c in coordinates:
            rank = rank << 1 | c >> bit & 1
    return rank


def _morton(shape, coordinates):
    return _interleave(coordinates, max(shape).bit_length())


def _hilbert(shape, coordinates):
    bits, x = max(max(shape) - 1, 1).bit_length(), list(coordinates)
    for bit in reversed(range(1, bits)):  # undo the reflections and exchanges of each level of the curve, from the largest cell
        low = (1 << bit) - 1
        for i in range(len(x)):
            reflect = (x[i] >> bit & 1).astype(bool)
            exchange = np.where(reflect, 0, (x[0] ^ x[i]) & low)
            x[0] = np.where(reflect, x[0] ^ low, x[0]) ^ exchange
            x[i] = x[i] ^ exchange
    for i in range(1, len(x)):  # Gray encode
        x[i] = x[i] ^ x[i - 1]
    flip = np.zeros_like(x[0])
    for bit in reversed(range(1, bits)):
        flip = np.where(x[-1] >> bit & 1, flip ^ (1 << bit) - 1, flip)
    return _interleave([c ^ flip for c in x], bits)


_RANKS = {"raster": _raster, "transposed": _transposed, "snake": _snake, "zigzag": _zigzag, "morton": _morton, "hilbert": _hilbert}


def token_order(shape: Sequence[int], order: str = "raster") -> np.ndarray:
    """An order in which to visit the positions of a grid: ``order[t]`` is the raster index of the t-th.

    - 'raster': the last axis fastest; 'transposed': the first axis fastest.
    - 'snake': raster with every other line reversed, so that consecutive positions are neighbours.
    - 'zigzag': along the anti-diagonals, back and forth, as in JPEG.
    - 'morton': by interleaved bits of the coordinates (Z-order): nested blocks.
    - 'hilbert': nested blocks too, and consecutive positions are neighbours where the sides are equal powers of two (elsewhere: the
      curve of the enclosing cube without what lies outside). Skilling, Programming the Hilbert curve, AIP Conf. Proc. 707, 2004.

    A reversed scan is ``order[::-1]``; a random one ``jax.random.permutation(key, size)``. :func:`permute` moves the tokens.

    Args:
      shape: lengths of the axes, any number of them.
      order: one of the names above; others raise ValueError.

    Returns:
      int32 [prod(shape)], a permutation, a NumPy array.

    >>> token_order((2, 3), "snake")
    array([0, 1, 2, 5, 4, 3], dtype=int32)
    >>> token_order((4, 4), "hilbert")
    array([ 0,  4,  5,  1,  2,  3,  7,  6, 10, 11, 15, 14, 13,  9,  8, 12],
          dtype=int32)
    """
    if order not in _RANKS:
        raise ValueError(f"order: expected one of {sorted(_RANKS)}, got {order!r}")
    shape = tuple(shape)
    if not math.prod(shape):
        return np.zeros(0, np.int32)
    coordinates = [c.ravel() for c in np.indices(shape)]
    return np.argsort(_RANKS[order](shape, coordinates), kind="stable").astype(np.int32)


def permute(x: jax.Array, order: jax.Array | np.ndarray, *, axis: int = 1) -> jax.Array:
    """Reorders an axis: element t of the result is element ``order[t]`` of x.

    Args:
      x: any array.
      order: int [T], a permutation (not checked).
      axis: the axis of length T.

    >>> permute(jnp.array([[10, 11, 12]]), jnp.array([2, 0, 1]))
    Array([[12, 10, 11]], dtype=int32)
    """
    if order.shape != (x.shape[axis],):
        raise ValueError(f"order: expected shape [T] with T = {x.shape[axis]} as axis {axis} of x, got {order.shape}")
    at = (slice(None),) * (axis % x.ndim) + (jnp.asarray(order),)
    return x.at[at].get(unique_indices=True, mode="promise_in_bounds")


def inverse_order(order: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The permutation that undoes ``order``: ``permute(permute(x, order), inverse_order(order))`` is x. O(T).

    ``order`` is int [T]; NumPy gives NumPy, a JAX array (traced or not) a JAX array.

    >>> inverse_order(np.array([2, 0, 1]))
    array([1, 2, 0])
    """
    if isinstance(order, np.ndarray):
        return np.argsort(order)
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)
