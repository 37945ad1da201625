"""Executions over a cache where it lies: [B, L, K, H] or pages of it, a few queries against many keys.

A cache read as the matrix [L K, H], in its own order of memory, needs no transposition: a tile has the queries of *all* heads of a batch element as rows
and the tokens of *all* key-value heads as columns, and to a row every column but its own head's is padding (position -1). That is K times the arithmetic
and no traffic of its own, where traffic is what decoding waits for; and it fills the rows of a matrix unit, which are many, with the queries, which
are few. What is folded comes from :mod:`attnx.core.operations` as everywhere, and gradients are those of the fold over a transposed copy.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnx.core.blockwise import Blockwise
from attnx.core.compat import vary, varying_axes
from attnx.core.program import Data, Program
from attnx.core.tiling import Tiling, cover, map_operands, widen
from pallas_kernels import tile
from pallas_kernels.decode.schedule import collect, share_out, unpack
from pallas_kernels.parts import At, Spec


class CachedData(NamedTuple):
    """As :class:`attnx.core.program.Data`, keys and values as the cache has them.

    Attributes:
      key, value: [B, L, K, H] and [B, L, K, Hv]; or pages of them, [P, p, K, H] and [P, p, K, Hv].
      pages: int32 [B, M], the pages of each sequence in order, or None. Pages without a real position may have any number.
      span: int32 [B or 1, 2], (first, end), where ``key_positions`` are consecutive from the first and -1 from the end; or None.
    """

    query: Any
    key: Any
    value: Any
    operands: Any
    query_positions: Any
    key_positions: Any
    seed: Any
    origin: Any
    pages: Any = None
    span: Any = None


def canonical(data: CachedData) -> Data:
    """The call with its cache copied into the layout of other executions."""
    def keys(x):
        if x is None:
            return None
        if data.pages is not None:
            x = x[jnp.clip(data.pages, 0, x.shape[0] - 1)]
            x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return x.swapaxes(1, 2).astype(data.query.dtype)

    return Data(*data[:len(Data._fields)])._replace(key=keys(data.key), value=keys(data.value))


@dataclasses.dataclass(frozen=True)
class Cached:
    """Executes a program over a cache by XLA, on any backend; static and hashable.

    Attributes:
      block: tokens in a tile.
      splits: the number of equal shares into which the tiles of the whole batch are cut; more than one need exponential weights, whose results merge.
      folded: how many batch elements' queries are the queries of this call's only one.
    """

    program: Program
    block: int
    splits: int = 1
    folded: int = 1

    @property
    def tiling(self) -> Tiling:
        """A tile: the queries of all heads."""
        return Tiling(self.program.sizes.heads * self.program.sizes.queries, self.block, 1)

    def maximum(self, x):
        """The largest entry."""
        return jnp.max(x, initial=0)

    def stored(self, x):
        """A result as it is kept: in the accumulator's dtype."""
        return x

    def fold_rows(self, data: CachedData, init, body, finish, rows=(), *, differentiable: bool = False):
        """As :meth:`Blockwise.fold_rows`."""
        if differentiable:
            return Blockwise(self.program, self.tiling).fold_rows(canonical(data), init, body, finish, rows, differentiable=True)
        axes = varying_axes(data, rows)
        data, rows = vary((data, rows), axes)
        results, default, work = self.fold_segments(data, init, body, finish, jax.tree.map(packed, rows), axes)
        shape = data.query.shape[:4]
        return jax.tree.map(lambda x: x.reshape(*shape, x.shape[-1]), collect(work, self.splits, results, default, merge_results))

    def fold_segments(self, data: CachedData, init, body, finish, rows, axes):
        """The results of all segments, a pytree of [S + B - 1, R, X]; that of no tile; and the work it was."""
        sizes, splits, query = self.program.sizes, self.splits, packed(data.query)
        some, every = tile_table(self.program, data, self.block)
        work = share_out(some, every, splits)

        def visit(item, carry):
            at = unpack(item)
            k, v, positions, operands = self._load(data, at.batch, at.block)
            mine = jax.tree.map(lambda x: x[at.batch], rows)
            return body(carry, query[at.batch], k, v, mine, positions, operands, data.seed, True)

        def step(n, carries):
            place = jnp.arange(splits, dtype=jnp.int32) * work.share + n
            items = work.items[place]
            segments = jnp.arange(splits, dtype=jnp.int32) + unpack(items).batch
            mine = jax.tree.map(lambda x: x[segments], carries)
            if splits == 1:  # slices of the cache rather than a gather
                mine = jax.tree.map(lambda x: x[None], visit(items[0], jax.tree.map(lambda x: x[0], mine)))
            else:
                mine = jax.vmap(visit)(items, mine)
                segments = jnp.where(place < work.count, segments, splits + sizes.batch + place)  # out of bounds: dropped
            return jax.tree.map(lambda x, new: x.at[segments].set(new, mode="drop", unique_indices=True), carries, mine)

        empty = vary(init(None), axes)
        carries = jax.tree.map(lambda x: jnp.broadcast_to(x, (splits + sizes.batch - 1, *x.shape)), empty)
        carries = lax.fori_loop(0, work.share if splits > 1 else work.count, step, carries)
        return jax.vmap(finish)(carries), finish(empty), work

    def _load(self, data: CachedData, b, j):
        """What a tile function wants of key block j: keys [bk K, H], values [bk K, Hv], positions, operands."""
        program, sizes, bk = self.program, self.program.sizes, self.block
        start = jnp.minimum(j * bk, sizes.keys - bk)  # the last block may begin in the one before, and skips what that has seen

        def keys(x):
            if x is None:
                return None
            if data.pages is None:
                x = lax.dynamic_slice(x, (b, start, *jnp.zeros(2, jnp.int32)), (1, bk, *x.shape[2:]))
            else:
                n = bk // x.shape[1]
                x = x[jnp.clip(lax.dynamic_slice_in_dim(_of(data.pages, b), start // x.shape[1], n), 0, x.shape[0] - 1)]
            return x.reshape(-1, x.shape[3]).astype(data.query.dtype)

        query = _of(data.query_positions, b)
        key = lax.dynamic_slice_in_dim(_of(data.key_positions, b), start, bk)
        key = jnp.where(start + jnp.arange(bk, dtype=jnp.int32) >= j * bk, key, -1)
        blocks = map_operands(lambda x, spec: self._operand(x, spec, query, key, b, start), data.operands, program.specs)
        return keys(data.key), keys(data.value), self._at(data.origin, b, query, key), blocks

    def _at(self, origin, b, query, key) -> At:
        """The place of a tile whose rows are (kv_head, group, query) and whose columns are (key, kv_head), of positions [t] and [bk]."""
        sizes = self.program.sizes
        groups = sizes.heads // sizes.kv_heads
        row, column = np.arange(sizes.heads * sizes.queries, dtype=np.int32)[:, None], np.arange(self.block * sizes.kv_heads, dtype=np.int32)
        head, batch = row // sizes.queries, b if self.folded == 1 else row % sizes.queries // (sizes.queries // self.folded)
        key = jnp.repeat(key, sizes.kv_heads)[None]
        if sizes.kv_heads > 1:
            key = jnp.where(head // groups == column % sizes.kv_heads, key, -1)
        return At(origin[0] + batch, origin[1] * groups + head, jnp.tile(query, sizes.heads)[:, None], key)

    def _operand(self, x, spec: Spec, query, key, b, start):
        """The block of a canonical operand, [R or 1, bk K or 1, *None axes]."""
        x = _of(x, b)
        if spec.offset:
            x = banded(self.program, x, query, key)
        elif spec.key:
            x = lax.dynamic_slice_in_dim(x, start, self.block, axis=3)
        return packed_operand(self.program, x)

    def fold_keys(self, data: CachedData, body, rows, gradient_of):
        """As :meth:`Blockwise.fold_keys`, gradients of keys and values in the layout of the cache."""
        sizes, dtype = self.program.sizes, data.query.dtype
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, dtype)), tree)  # a cotangent has the cache's dtype
        fold = Blockwise(self.program, Tiling(min(512, sizes.queries), min(512, sizes.keys), 1))
        dq, dk, dv, drows, doperands = fold.fold_keys(canonical(data), body, wide(rows), wide(gradient_of))

        def as_cached(gradient, x):
            if x is None:
                return None
            gradient = gradient.swapaxes(1, 2)
            if data.pages is None:
                return gradient
            pages = gradient.reshape(*data.pages.shape, *x.shape[1:])
            return jnp.zeros(x.shape, gradient.dtype).at[jnp.clip(data.pages, 0, x.shape[0] - 1)].add(pages)

        return dq, as_cached(dk, data.key), as_cached(dv, data.value), drows, doperands


def tile_table(program: Program, data: CachedData, block: int):
    """Which key blocks hold allowed pairs, and allowed pairs alone: booleans [B, nk] each."""
    sizes = program.sizes
    more = -sizes.keys % block
    operands = tuple(widen(x, 4, more, "edge") if spec.key else x for x, spec in zip(data.operands.mask, program.specs.mask))
    padded = Data(*data[:len(Data._fields)])._replace(operands=data.operands._replace(mask=operands),
                                                      key_positions=widen(data.key_positions, 1, more, constant_values=-1))
    table = cover(program, padded, Tiling(sizes.queries, block, 1))
    shape = sizes.batch, (sizes.keys + more) // block
    return type(table)(jnp.broadcast_to(table.some.any((1, 2, 3)), shape), jnp.broadcast_to(table.every.all((1, 2, 3)), shape))


def packed_operand(program: Program, x):
    """A canonical operand of one batch element, [K or 1, G or 1, t or 1, bk or 1, *None axes], for such a tile."""
    sizes, extra = program.sizes, x.shape[4:]
    rows = sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.queries
    if x.shape[3] == 1:
        return x.reshape(1, 1, *extra) if x.shape[:3] == (1, 1, 1) else jnp.broadcast_to(x, (*rows, 1, *extra)).reshape(-1, 1, *extra)
    x = jnp.moveaxis(jnp.broadcast_to(x, (rows[0], *x.shape[1:])), 0, 3)
    columns = x.shape[2] * x.shape[3]
    if x.shape[:2] == (1, 1):
        return x.reshape(1, columns, *extra)
    x = jnp.broadcast_to(x, (*rows[1:], *x.shape[2:])).reshape(-1, columns, *extra)
    return jnp.tile(x, (rows[0], *(1,) * (x.ndim - 1)))


def banded(program: Program, table, query, key):
    """An 'offset' table [.., offsets] at the pairs of positions [t] and [bk], [.., t, bk]; its ends are read beyond it."""
    return jnp.take(table, jnp.clip(key - query[:, None] - program.sizes.offsets[0], 0, table.shape[-1] - 1), axis=-1)


def _of(x, b):
    """A batch element, or the only one."""
    return x[b] if x.shape[0] > 1 else x[0]


def packed(x):
    """[B, K, G, t, X] as [B, R, X]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def merge_results(a, b):
    """Two results ``(out [.., Hv], r [.., 1])`` as one."""
    (out_a, r_a), (out_b, r_b) = a, b
    out, r = tile.merge((out_a, r_a[..., 0]), (out_b, r_b[..., 0]))
    return out, r[..., None]
