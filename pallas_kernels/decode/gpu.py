"""Folding the tiles of a cache on a GPU by Pallas' Triton route: a program a share of the work and key-value head, the queries of a group as its rows.

A share walks through its tiles in order (see :mod:`pallas_kernels.decode.schedule`); at the end of each sequence, or of the share, the result of that segment is
written to its own place, and XLA merges them. No program waits for another. The cache is read where it lies, row by row: a token's keys of one head are
contiguous, whichever layout the cache has, and the page table, if there is one, says where.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as _like
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import flash
from pallas_kernels.decode.schedule import Work, unpack
from pallas_kernels.flash.gpu import begin, uniform
from pallas_kernels.flash.gpu_launch import Block, Here, Output, Reader, launch
from pallas_kernels.flash.gpu_quick import quickened
from pallas_kernels.parts import At
from pallas_kernels.tiles import Tile, power
from pallas_kernels.triton import store


@dataclasses.dataclass(frozen=True)
class Plan(flash.Plan):
    """The static half of a launch.

    Attributes:
      splits: shares of the work.
      groups: query heads of a key-value head, all of whose queries are rows of one.
      length: slots of a sequence, or of a page.
      pages: of a sequence; 0 where sequences are contiguous.
    """

    splits: int = 1
    groups: int = 1
    length: int = 0
    pages: int = 0


class Lists(NamedTuple):
    """What programs look up.

    Attributes:
      work: the tiles.
      pages: int32 [B, pages], each one that exists; or None.
      group, batch: int32 [R], a row's query head within its group, and its batch element, to be added to the sequence's.
    """

    work: Work
    pages: Any
    group: Any
    batch: Any


class CacheReader(Reader):
    """Reads keys and values from a cache [tokens of all sequences or pages, K, H]."""

    plan: Plan

    def keys(self, here: Here) -> Block:
        """As :meth:`Reader.keys`."""
        plan, slot = self.plan, here.j * self.tile.bk + lax.iota(jnp.int32, self.tile.bk)
        if plan.pages:
            number = jnp.minimum(lax.div(slot, jnp.int32(plan.length)), plan.pages - 1)
            token = self.refs.lists.pages[jnp.broadcast_to(here.b, number.shape), number] * plan.length + lax.rem(slot, jnp.int32(plan.length))
        else:
            token = here.b * plan.length + slot
        positions = self._positions("key", here.b, here.j, self.tile.bk, plan.keys)
        key, value = (None if ref is None else self._tokens(ref, x, token, slot, here.k)
                      for ref, x in ((self.refs.key, self.arrays.key), (self.refs.value, self.arrays.value)))
        return Block((key, value), (), positions, self._operands(here, ("key",)))

    def _tokens(self, ref, array, token, slot, head):
        shape, width = (self.tile.bk, ref.shape[-1]), array.shape[-1]
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        index = jnp.broadcast_to(token[:, None], shape), jnp.broadcast_to(head, shape), column
        inside = (jnp.broadcast_to(slot[:, None], shape) < self.plan.keys) & (column < width)
        whole = self.plan.keys % self.tile.bk == 0 and width == shape[1]
        return (ref[index] if whole else plgpu.load(ref.at[index], mask=inside, other=0)).astype(self.arrays.query.dtype)

    def _rows(self, ref, here: Here):
        return ref[pl.ds(here.i * self.tile.bq, self.tile.bq)][:, None]

    def _at(self, here: Here, queries: Block, keys: Block) -> At:
        origin, lists = self.refs.origin, self.refs.lists
        head = (origin[1] + here.k) * self.plan.groups + self._rows(lists.group, here)
        return At(origin[0] + here.b + self._rows(lists.batch, here), head, queries.positions, keys.positions)

    def _band(self, ref, f, here: Here):
        """The tile of an offset table at any positions, whose ends are read beyond it."""
        which, tables = 0, 1
        for place, varies, n in zip((here.b, here.k, self._rows(self.refs.lists.group, here)), f.spec[:3], (*self.sizes[:2], self.plan.groups)):
            which, tables = (which * n + place, tables * n) if varies else (which, tables)
        length = ref.shape[0] // tables
        query, key = (self._positions(name, here.b, n, size, 0) for name, n, size in (("query", here.i, self.tile.bq), ("key", here.j, self.tile.bk)))
        return ref[which * length + jnp.clip(key - query - self.plan.low, 0, length - 1)]


def fold_rows(plan: Plan, tile: Tile, lists: Lists, data, rows, init: Callable, body: Callable, finish: Callable):
    """Folds ``body(carry, q, k, v, rows, at, blocks, seed, masked) -> carry`` over the tiles of every segment.

    Args:
      data: in the canonical layout, groups folded into queries, queries and positions padded to whole tiles: query [B, K, 1, R, H], key [tokens, K, H],
        value [tokens, K, Hv] or None, operands, query_positions [B or 1, R], key_positions [B or 1, S], seed, origin.
      rows: a pytree of [B, K, 1, R, X].
      init: ``init() -> carry``, a pytree of [bq, X], each the same number throughout.
      finish: ``finish(carry) -> results``, a pytree of [bq, X].

    Returns the results of the segments as [S + B - 1, K, R, X]; of segments that hold no tile, anything.
    """
    (b, k, _, r, _), results = data.query.shape, jax.eval_shape(finish, jax.eval_shape(init))
    start, body, segments = uniform(init), quickened(body, plan.interpret), plan.splits + b - 1
    arrays = jax.tree.map(lambda x: _like((segments, k, r) + x.shape[1:] * (x.shape[1] > 1), x.dtype), results)

    def program(reader, ids, outputs):
        i, k, p = ids
        work = reader.refs.lists.work
        count, share = work.share[0], work.share[1]
        low = jnp.minimum(p * share, count)
        high = jnp.minimum(low + share, count)

        def sequence(b, _):
            here = Here(b, k, 0 * i, i)  # the only head, as a number like the others
            queries = reader.queries(here)

            def visit(n, carry):
                at = here._replace(j=unpack(work.items[n]).block)
                return body(carry, *reader.join(at, queries, reader.keys(at)), True)

            first, last = jnp.maximum(work.first[b], low), jnp.minimum(work.last[b], high)
            found = finish(lax.fori_loop(first, jnp.maximum(first, last), visit, begin(start)))
            rows = pl.ds(i * tile.bq, tile.bq)
            for ref, array, x in zip(jax.tree.leaves(outputs), jax.tree.leaves(arrays), jax.tree.leaves(found)):
                store(ref, array, *((x[:, 0], (p + b, k), rows) if array.ndim == 3 else (x, (p + b, k, rows))))
            return _

        first, last = (unpack(work.items[n]).batch for n in (low, jnp.maximum(high - 1, low)))
        lax.fori_loop(first, jnp.where(low < high, last + 1, first), sequence, None)

    def output(x):
        return Output(x, x.shape if len(x.shape) == 3 else (*x.shape[:-1], power(x.shape[-1])), lambda *ids: (0,) * len(x.shape))

    work = lists.work._replace(share=jnp.stack([lists.work.count, lists.work.share]), count=None)
    out = launch(plan, tile, data, rows, lists._replace(work=work), (r // tile.bq, k, plan.splits), program, jax.tree.map(output, arrays), "decode_fold_rows",
                 reads=CacheReader)
    return jax.tree.map(lambda x: x if x.ndim == 4 else x[..., None], out)
