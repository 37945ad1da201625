"""Equal work whatever the lengths: the tiles of all caches as one list, cut into equal shares ("stream-K").

A share walks through consecutive tiles and may end in the middle of a sequence, which the next one then continues. Share p's piece of batch element b is
*segment* p + b: along the list p and b only grow, so no two pieces have the same number and S + B - 1 segments hold them all. Afterwards the
segments of an element are merged: row statistics form a monoid, so the cuts do not matter.

Osama, Merrill, Cecka, Garland, Owens: "Stream-K: Work-centric Parallel Decomposition for
Dense Matrix-Matrix Multiplication on the GPU" (2023, arXiv 2301.03598).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_BITS = 15  # of a batch element and of a key block


class Work(NamedTuple):
    """The list of a call.

    Attributes:
      items: int32 [B * nk + S]: the tiles worth a visit, ordered by batch element and key block; its last one repeated at the end.
      count: int32 [], how many there are.
      share: int32 [], how many each of the S shares visits; at least 1.
      first, last: int32 [B], where the items of each batch element start and end.
    """

    items: Any
    count: Any
    share: Any
    first: Any
    last: Any


class Item(NamedTuple):
    """A tile: its batch element and key block, and whether all its pairs are allowed."""

    batch: Any
    block: Any
    full: Any


def share_out(some, every, splits: int) -> Work:
    """The work of a tile table, booleans [B, nk]: may some pair of the tile be allowed, is every one."""
    b, nk = some.shape
    if max(b, nk) >= 1 << _BITS:
        raise NotImplementedError(f"the schedule holds fewer than {1 << _BITS} sequences of as many blocks, got {b} of {nk}; use a larger block_size")
    batch, block = jnp.arange(b, dtype=jnp.int32)[:, None], jnp.arange(nk, dtype=jnp.int32)
    code, some = (batch << (_BITS + 1) | block << 1 | every).reshape(-1), some.reshape(-1)
    count = some.sum(dtype=jnp.int32)
    listed = jnp.sort(jnp.where(some, code, jnp.iinfo(jnp.int32).max))
    items = jnp.where(jnp.arange(b * nk) < count, listed, jnp.max(jnp.where(some, code, 0)))
    ends = jnp.cumsum(some.reshape(b, nk).sum(1, dtype=jnp.int32), dtype=jnp.int32)
    share = jnp.maximum(1, -(-count // splits))
    return Work(jnp.pad(items, (0, splits), mode="edge"), count, share, jnp.pad(ends[:-1], (1, 0)), ends)


def unpack(item) -> Item:
    """The contents of an item."""
    return Item(item >> (_BITS + 1), (item >> 1) & ((1 << _BITS) - 1), (item & 1) == 1)


def collect(work: Work, splits: int, results, default, merge: Callable):
    """The result of each batch element, a pytree of [B, ...], from the results of all segments, [S + B - 1, ...].

    Args:
      default: the result of no tile at all.
      merge: joins two results.
    """
    batch, shares = jnp.arange(work.first.shape[0])[:, None], jnp.arange(splits)
    own = jnp.maximum(work.first[:, None], shares * work.share) < jnp.minimum(work.last[:, None], (shares + 1) * work.share)
    pieces = jax.tree.map(lambda x, d: jnp.where(own.reshape(*own.shape, *(1,) * d.ndim), x[batch + shares], d), results, default)
    while splits > 1:
        half = splits // 2
        at = lambda start, stop: jax.tree.map(lambda x: x[:, start:stop], pieces)
        pieces = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), merge(at(0, half), at(half, 2 * half)), at(2 * half, splits))
        splits -= half
    return jax.tree.map(lambda x: x[:, 0], pieces)
