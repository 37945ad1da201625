"""The tiles a kernel visits, as one list in scalar memory: empty tiles cost nothing, full ones need no mask.

A tile table (:class:`~pallas_kernels.parts.Cover`: may some pair be allowed, is every one) becomes, for each batch element and key-value
head over which it varies, a list of steps sorted by query block (or by key block). A step packs both
block numbers and four bits into an int32. A block without any tile keeps one empty step, so that its result is written.

Where the data choose the tiles, the table is itself a list (:class:`Listed`), and so is as long as the choice rather than the product of the lengths.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.parts import Cover

EMPTY, PARTIAL, FULL = 0, 1, 2
_BITS = 14  # of a block number
_FIRST, _LAST = 4, 8
_PAIR, _OUTER = 4, _BITS + 4  # where the pair of block numbers starts, and the outer one
_NONE = (1 << 31) - 1  # sorts last
SCALARS = 1 << 17  # steps in scalar memory, half of it


class Schedule(NamedTuple):
    """``steps`` int32 [B or 1, 1 or K or K * G, X], X = nq * nk or what a list holds; at the most the first ``count`` [] are worth a visit."""

    steps: Any
    count: Any


class Visits(NamedTuple):
    """The inner blocks that each outer block visits: ``order[..., :full]`` unmasked, ``order[..., full:active]`` masked."""

    order: Any  # int32 [B or 1, heads or 1, outer, inner]
    full: Any  # int32 [B or 1, heads or 1, outer]
    active: Any

    def of(self, b, head, block):
        """The list of one block, or of all batch elements and heads alike where the table does not vary over them."""
        index = (b if self.full.shape[0] > 1 else 0, head if self.full.shape[1] > 1 else 0, block)
        return self.order[index], self.full[index], self.active[index]


def visits(table: Cover, *, lanes: int = 1, by_key: bool = False) -> Visits:
    """The lists of a tile table [B or 1, K or 1, G or 1, nq, nk], united over groups and over ``lanes`` key-value heads at a time.

    ``by_key``: key blocks outside.
    """
    def unite(x, reduce):
        x = reduce(x, axis=2)
        if x.shape[1] > 1:
            x = reduce(x.reshape(x.shape[0], -1, lanes, *x.shape[2:]), axis=2)
        return jnp.swapaxes(x, -1, -2) if by_key else x

    some, every = unite(table.some, jnp.any), unite(table.every, jnp.all)
    inner = some.shape[-1]
    rank = jnp.where(some, jnp.where(every, 0, inner), 2 * inner) + jnp.arange(inner, dtype=jnp.int32)
    count = lambda x: x.sum(-1, dtype=jnp.int32)
    return Visits(jnp.sort(rank, -1).astype(jnp.int32) % inner, count(some & every), count(some))


class Listed(NamedTuple):
    """The tile table at some key blocks of each query block; elsewhere no pair is allowed.

    Attributes:
      blocks: int32 [B or 1, K or 1, G or 1, nq, L], any order; nk or more is none.
      cover: of those tiles, booleans that broadcast against ``blocks``.
      share: a tile may come several times, each for as large a part of its pairs; this many are all of them.
      keys: nk.
    """

    blocks: Any
    cover: Cover
    share: int
    keys: int


class Lists(NamedTuple):
    """The visits of all outer blocks one after the other: those of a block are ``order[first:full]`` unmasked and ``order[full:active]`` masked."""

    order: Any  # int32 [B or 1, 1 or K or K * G, X]
    first: Any  # int32 [B or 1, 1 or K or K * G, outer]
    full: Any
    active: Any


def lists(table: Cover | Listed, *, by_key: bool = False) -> Lists:
    """The lists of a tile table [B or 1, K or 1, G or 1, nq, nk], united over groups, or of a listed one, as it is."""
    if isinstance(table, Cover):
        found = visits(table, by_key=by_key)
        outer, inner = found.order.shape[-2:]
        first = jnp.broadcast_to(jnp.arange(outer, dtype=jnp.int32) * inner, found.full.shape)
        return Lists(found.order.reshape(*found.order.shape[:-2], -1), first, first + found.full, first + found.active)
    at = unpack(schedule(table, by_key=by_key, varies=(True, True, True), most=None).steps)
    place = lambda outer, partial, inner: outer << _BITS + 1 | partial << _BITS | inner
    order = jnp.sort(jnp.where(at.kind == EMPTY, _NONE, place(at.outer, (at.kind == PARTIAL).astype(jnp.int32), at.inner)), -1)
    outer = jnp.arange(table.keys if by_key else table.blocks.shape[3], dtype=jnp.int32)
    find = jnp.vectorize(lambda order, x: jnp.searchsorted(order, x).astype(jnp.int32), signature="(n),(m)->(m)")
    return Lists(order & ((1 << _BITS) - 1), *(find(order, x) for x in (place(outer, 0, 0), place(outer, 1, 0), place(outer + 1, 0, 0))))


def spread_out(table: Cover | Listed) -> Cover:
    """The tile table, also of a listed one, whose tiles may then all need a mask."""
    if isinstance(table, Cover):
        return table
    blocks, some = jnp.broadcast_arrays(table.blocks, table.cover.some)
    lead = jnp.indices(blocks.shape[:-1], sparse=True)
    found = jnp.zeros((*blocks.shape[:-1], table.keys), bool).at[*(i[..., None] for i in lead), blocks].max(some, mode="drop")
    return Cover(found, jnp.zeros_like(found))


class Step(NamedTuple):
    """A step, unpacked: the outer and the inner block, EMPTY, PARTIAL or FULL, and whether it is the first or last of its outer block."""

    outer: Any
    inner: Any
    kind: Any
    first: Any
    last: Any


def unpack(step) -> Step:
    """The contents of a packed step."""
    return Step(step >> _OUTER, (step >> _PAIR) & ((1 << _BITS) - 1), step & 3, (step & _FIRST) != 0, (step & _LAST) != 0)


def schedule(table: Cover | Listed, *, by_key: bool = False, varies=(True, True, False), most: int | None = SCALARS) -> Schedule:
    """The steps of a tile table [B or 1, K or 1, G or 1, nq, nk], or of a listed one.

    Args:
      by_key: key blocks outside, query blocks inside, rather than the other way round.
      varies: whether the steps may differ over batch elements, over key-value heads and, of a listed table, over the heads of a group; united where not.
      most: steps that there may be; None for any number.
    """
    axes = tuple(axis for axis, own in enumerate(varies) if not own)
    return _from_list(table, axes, by_key, most) if isinstance(table, Listed) else _from_table(table, tuple({*axes, 2}), by_key, most)


def _from_table(table: Cover, axes, by_key: bool, most) -> Schedule:
    united = table.some.any(axes, keepdims=True)[:, :, 0], table.every.all(axes, keepdims=True)[:, :, 0]
    some, every = (jnp.swapaxes(x, -1, -2) if by_key else x for x in united)
    blocks, steps = some.shape[-2:]
    _check(max(blocks, steps), some.size, most)
    inner = jnp.arange(steps, dtype=jnp.int32)
    codes = _code(jnp.arange(blocks, dtype=jnp.int32)[:, None], inner, jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY))
    kept = some | (~some.any(-1, keepdims=True) & (inner == 0))
    return _framed(jnp.where(kept, codes, _NONE).reshape(*some.shape[:2], blocks * steps), blocks * steps)


def _from_list(table: Listed, axes, by_key: bool, most) -> Schedule:
    blocks, some, every = jnp.broadcast_arrays(table.blocks, *table.cover)
    nq, nk = blocks.shape[3], table.keys
    outer = nk if by_key else nq
    lists = math.prod(blocks.shape[axis] for axis in axes)
    batch, *heads = (1 if axis in axes else blocks.shape[axis] for axis in range(3))
    lead = batch, math.prod(heads)
    length = min(blocks.size // math.prod(lead), nq * nk) + outer
    _check(max(nq, nk), length * math.prod(lead), most)
    pair = jnp.arange(nq, dtype=jnp.int32)[:, None], blocks
    codes = jnp.where(some & (blocks < nk), _code(*(pair[::-1] if by_key else pair), jnp.where(every, FULL, PARTIAL)), _NONE)
    codes = jnp.moveaxis(codes, axes, range(5 - len(axes), 5)).reshape(*lead, -1)
    empty = jnp.broadcast_to(_code(jnp.arange(outer, dtype=jnp.int32), 0, EMPTY), (*lead, outer))
    codes = jnp.sort(jnp.concatenate([codes, empty], axis=-1), axis=-1)  # the empty step of a block first, then each tile's entries, partial ones first
    new = (codes >> _PAIR != _shift(codes, -1) >> _PAIR) | (_shift(codes, -1) & 3 == EMPTY)
    needed = (codes & 3 != EMPTY) | (codes >> _OUTER != _shift(codes, 1) >> _OUTER)
    every = (codes & 3 == FULL) & (codes == _shift(codes, lists * table.share - 1))
    kinds = jnp.where(every, codes, jnp.minimum(codes, codes & ~3 | PARTIAL))
    return _framed(jnp.where((codes < _NONE) & new & needed, kinds, _NONE), length)


def _code(outer, inner, kind):
    return outer << _OUTER | inner << _PAIR | kind


def _shift(x, n: int):
    """``x[..., i + n]`` at i, and -1 outside."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(max(-n, 0), max(n, 0))], constant_values=-1)[..., max(n, 0): max(n, 0) + x.shape[-1]]


def _framed(codes, length: int) -> Schedule:
    """Codes in order, each block's first and last marked; what is no step comes last."""
    codes = jnp.sort(codes, axis=-1)[..., :length]
    count, outer = (codes < _NONE).sum(-1, keepdims=True, dtype=jnp.int32), codes >> _OUTER
    steps = codes | jnp.where(outer != _shift(outer, -1), _FIRST, 0) | jnp.where(outer != _shift(outer, 1), _LAST, 0)
    listed = jnp.arange(codes.shape[-1]) < count
    idle = jnp.max(jnp.where(listed, steps, 0), -1, keepdims=True) & ~jnp.int32(15)  # at the end of a list nothing is fetched, computed or written
    return Schedule(jnp.where(listed, steps, idle).astype(jnp.int32), count.max())


def _check(blocks: int, steps: int, most: int | None):
    if blocks >= 1 << (_BITS - 1) or (most is not None and steps > most):
        raise NotImplementedError(f"implementation='pallas': {steps} tiles exceed the schedule's {most}, or {blocks} blocks its {1 << (_BITS - 1)}; "
                                  "use larger block_sizes, or an implementation without kernels")
