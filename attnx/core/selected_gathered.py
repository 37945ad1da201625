"""The ``gathered`` execution of the selected engine: chosen key blocks side by side in a tile, on any backend.

A tile is a few query blocks, of one head or of the heads that share a choice, each against some of its own key blocks. It reads every array by one
gather, and adds the gradients of keys by one scatter. What is folded comes from :mod:`attnx.core.operations`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnx.core.compat import vary, varying_axes
from attnx.core.program import Data, Program, partition
from attnx.core.tiling import Tiling, widen
from pallas_kernels import tile
from pallas_kernels.parts import At, Blocks, Mask, Operand, Score, Spec, part, static

# The selection as parts: ``materialised``, arrays over queries and keys, which every execution evaluates; otherwise arrays over query blocks and entries
# of the table, which only the gathered one knows how to read.


def _axes(array, sizes, materialised):
    return ("batch", "head" if array.shape[1] in (1, sizes.heads) else "kv_head", *(("query", "key") if materialised else (None, None)))


@part
class Chosen(Mask):
    """Pairs in chosen blocks: where the table is not -1. The first of the masks."""

    table: Any
    materialised: bool = static(default=False)

    def operands(self, sizes):
        return (Operand(self.table, _axes(self.table, sizes, self.materialised)),)

    def tile(self, at, chosen):
        return chosen >= 0 if self.materialised else at.key >= 0  # an entry of -1 is gathered as a block of padding


@part
class Extra(Score):
    """The scores of chosen blocks. The last of the scores."""

    scores: Any
    materialised: bool = static(default=False)

    def operands(self, sizes):
        return (Operand(self.scores, _axes(self.scores, sizes, self.materialised)),)

    def tile(self, s, at, extra):
        return s + extra.astype(s.dtype)


# Arrays in blocks ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """C query blocks and m entries of each one's row in the table: indices [C, 1] and [C, m]."""

    batch: Any
    kv_head: Any
    lane: Any  # the query head of the group where each chooses for itself, else 0
    block: Any
    entry: Any
    chosen: Any  # the key blocks that the entries name
    at: At  # [C], [C, group], [C, bq, 1], [C, 1, m bk]


class Layout(NamedTuple):
    """How an operand lies in blocks."""

    spec: Spec
    lead: tuple[int, ...]  # the sizes of [batch, kv_head, lane, query block, key block] or [batch, kv_head, lane, offset]
    lanes: bool  # the heads of a group are apart, each with tiles of its own
    bk: int
    low: int  # the first offset of an offset table
    entry: bool  # a column for each entry of the table rather than for each key


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Blocked:
    """An operand as [blocks, group, rows, columns, *None axes] or [offsets, group], the leading axes of its layout in one."""

    array: Any
    layout: Layout

    @property
    def grouped(self) -> bool:
        """Whether it varies over the heads that share a tile."""
        return self.layout.spec.group and not self.layout.lanes

    def _index(self, place: Place):
        spec, lead = self.layout.spec, self.layout.lead
        index = [x if varies else jnp.zeros_like(x) for x, varies in zip(place, (spec.batch, spec.kv, spec.group and self.layout.lanes, spec.query))]
        if spec.offset:
            offset = jnp.clip(place.at.key - place.at.query - self.layout.low, 0, lead[3] - 1)
            index = [*(x[:, :, None] for x in index[:3]), offset]
        else:
            column = place.entry if self.layout.entry else place.chosen
            index.append(column if spec.key else jnp.zeros_like(place.block))
        flat = index[0]
        for x, size in zip(index[1:], lead[1:], strict=True):
            flat = flat * size + x
        return flat

    def blocks(self, place: Place):
        """What a tile reads, block by block: [C, m or 1, group, rows, columns, *None axes]."""
        return self.array.at[self._index(place)].get(mode="promise_in_bounds")

    def read(self, place: Place):
        """What a tile reads: [C, group, rows, keys, *None axes], without the group if it does not vary there."""
        block = self.blocks(place)
        if self.layout.spec.offset:
            block = jnp.moveaxis(block, -1, 1)
        elif self.layout.spec.key:
            block = jnp.moveaxis(jnp.broadcast_to(block, (*block.shape[:4], self.layout.bk, *block.shape[5:])), 1, 3)
            block = block.reshape(*block.shape[:3], -1, *block.shape[5:])
        else:
            block = block[:, 0]
        return block if self.grouped else block[:, 0]

    def add(self, place: Place, block):
        """With the gradient of what a tile read added; ``block`` [C, group, ...] has one for every head of the tile."""
        block = block if self.grouped else block.sum(1, keepdims=True)
        if self.layout.spec.offset:
            block = jnp.moveaxis(block, 1, -1)
        elif self.layout.spec.key:
            block = jnp.moveaxis(block.reshape(*block.shape[:3], -1, self.layout.bk, *block.shape[4:]), 3, 1)
            block = block.sum(4, keepdims=True) if self.layout.entry else block
        else:
            block = block[:, None]
        return dataclasses.replace(self, array=self.array.at[self._index(place)].add(block, mode="promise_in_bounds"))


def is_blocked(x) -> bool:
    """Where a tree of :class:`Blocked` ends."""
    return isinstance(x, Blocked)


# The execution ------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """The arrays of a call in blocks."""

    query: Blocked
    key: Blocked
    value: Blocked | None
    operands: Blocks
    query_positions: Blocked
    key_positions: Blocked
    rows: Any


@dataclasses.dataclass(frozen=True)
class Selected:
    """Executes a program whose first mask is :class:`Chosen`; static and hashable."""

    program: Program
    tiling: Tiling
    blocks: int  # query blocks in a tile
    entries: int  # key blocks of each in a tile

    def maximum(self, x):
        """The largest entry."""
        return jnp.max(x, initial=0)

    def stored(self, x):
        """A result as it is kept: in the accumulator's dtype."""
        return x

    @property
    def lanes(self) -> int:
        """How many query heads of a group choose for themselves."""
        sizes = self.program.sizes
        return sizes.heads // sizes.kv_heads if self.program.specs.mask[0].group else 1

    def _blocked(self, x, spec: Spec, entry: bool = False) -> Blocked:
        """A canonical operand in whole blocks; linear."""
        lanes = (x.shape[2], 1) if self.lanes > 1 else (1, x.shape[2])
        rows, columns = self.tiling.bq if spec.query else 1, self.tiling.bk if spec.key else 1
        if spec.offset:
            x = jnp.moveaxis(x.reshape(*x.shape[:2], *lanes, -1), 3, 4)
        elif entry:
            spec = spec._replace(query=True, key=True)
            x = widen(x, 6, -x.shape[6] % self.entries, constant_values=-1)
            x = x.reshape(*x.shape[:2], lanes[0], *x.shape[5:], lanes[1], 1, 1)
        else:  # any value is legal in padding; the last key block is nothing else
            x = widen(widen(x, 3, -x.shape[3] % rows, "edge"), 4, -x.shape[4] % columns + columns * spec.key, "edge")
            x = x.reshape(*x.shape[:2], *lanes, x.shape[3] // rows, rows, x.shape[4] // columns, columns, *x.shape[5:])
            x = x.transpose(0, 1, 2, 4, 6, 3, 5, 7, *range(8, x.ndim))
        lead = 4 if spec.offset else 5
        layout = Layout(spec, x.shape[:lead], self.lanes > 1, self.tiling.bk, self.program.sizes.offsets[0], entry)
        return Blocked(x.reshape(-1, *x.shape[lead:]), layout)

    def _cut(self, data: Data, rows=()) -> Cut:
        specs, scores = self.program.specs, self.program.parts.scores
        entry = jax.tree.map(lambda _: False, specs, is_leaf=lambda x: isinstance(x, Spec))
        entry = entry._replace(mask=(True, *entry.mask[1:]), scores=tuple((True,) if isinstance(s, Extra) else e for s, e in zip(scores, entry.scores)))
        query, key = Spec(True, True, True, True, False, False), Spec(True, True, False, False, True, False)
        of_rows = lambda x: self._blocked(x[..., None, :], query)
        of_keys = lambda x: self._blocked(x[:, :, None, None], key)

        def positions(x, axes, **over):
            return self._blocked(x.reshape(x.shape[0], *axes), Spec(x.shape[0] > 1, False, False, **over, offset=False))

        (bq, bk, _), (q_pos, k_pos) = self.tiling, (data.query_positions, data.key_positions)
        q_pos, k_pos = widen(q_pos, 1, -q_pos.shape[1] % bq, constant_values=-1), widen(k_pos, 1, -k_pos.shape[1] % bk + 1, constant_values=-1)
        return Cut(of_rows(data.query), of_keys(data.key), None if data.value is None else of_keys(data.value),
                   jax.tree.map(lambda e, spec, x: self._blocked(x, spec, e), entry, specs, data.operands),
                   positions(q_pos, (1, 1, -1, 1), query=True, key=False), positions(k_pos, (1, 1, 1, -1), query=False, key=True),
                   jax.tree.map(of_rows, rows))

    def _sweep(self, data: Data, rows, total, init, visit, finish, differentiable=False):
        """Folds the key blocks of all query blocks, some query blocks at a time and of each some entries at a time.

        Args:
          data, rows: as in the folds.
          total: what every visit updates.
          init: ``init(rows) -> carry`` of one head's query block, a pytree of [bq, X].
          visit: ``visit(total, carry, rows, place, over_heads) -> (total, carry)`` on the arrays [C, group, bq, X] of a tile, where
            ``over_heads(function, rows)`` evaluates ``function(q, k, v, rows, at, blocks)`` of one head for all.
          finish: ``finish(carry) -> result`` of one head's query block.

        Returns the total and the results as [B, K, G, T, X].
        """
        b, k, g, t, _ = data.query.shape
        cut, m, lanes, nq = self._cut(data, rows), self.entries, self.lanes, -(-t // self.tiling.bq)
        table = cut.operands.mask[0]
        count, heads, padding, length = b * k * lanes * nq, g // lanes, cut.key.layout.lead[4] - 1, table.layout.lead[4]
        axes = jax.tree.map(lambda x: 0 if x.grouped else None, cut.operands, is_leaf=is_blocked)
        each_head = lambda f: jax.vmap(jax.vmap(f))

        def chunk(total, n):
            index = [x[:, None] for x in jnp.unravel_index(jnp.minimum(n, count - 1), (b, k, lanes, nq))]
            head = (data.origin[1] + index[1]) * g + index[2] + jnp.arange(heads, dtype=jnp.int32)
            here = Place(*index, jnp.arange(length)[None], None, At(data.origin[0] + index[0][:, 0], head, None, None))
            here = here._replace(at=here.at._replace(query=jnp.where((n < count)[:, None, None], cut.query_positions.read(here), -1)))
            row = lambda x: x.read(here).reshape(len(n), heads, self.tiling.bq, -1)
            q, mine = row(cut.query), jax.tree.map(row, cut.rows, is_leaf=is_blocked)
            chosen = table.blocks(here).reshape(len(n), length)
            chosen = jnp.where(chosen < 0, padding, chosen)

            def step(slab, state):
                entry = slab * m + jnp.arange(m, dtype=jnp.int32)[None]
                place = here._replace(entry=entry, chosen=lax.dynamic_slice_in_dim(chosen, slab * m, m, 1))
                place = place._replace(at=place.at._replace(key=cut.key_positions.read(place)))
                keys, values = (None if x is None else x.read(place)[:, 0] for x in (cut.key, cut.value))
                blocks = jax.tree.map(lambda x: x.read(place), cut.operands, is_leaf=is_blocked)

                def over_heads(function, rows):
                    function = jax.vmap(jax.vmap(function, in_axes=(0, None, None, 0, At(None, 0, None, None), axes)))
                    return function(q, keys, values, rows, place.at, blocks)

                return visit(*state, mine, place, over_heads)

            state = total, each_head(lambda _, rows: init(rows))(jnp.zeros((len(n), heads)), mine)
            if differentiable:
                slabs = jnp.arange(length // m, dtype=jnp.int32)
                state, _ = lax.scan(jax.checkpoint(lambda state, slab: (step(slab, state), None)), state, slabs)
            else:  # -1 comes last in a row
                state = lax.fori_loop(0, (jnp.max((chosen < padding).sum(1)) + m - 1) // m, step, state)
            return state[0], each_head(finish)(state[1])

        n = jnp.arange(-(-count // self.blocks) * self.blocks, dtype=jnp.int32).reshape(-1, self.blocks)
        total, results = lax.scan(jax.checkpoint(chunk) if differentiable else chunk, total, n)

        def join(x):
            x = x.reshape(-1, *x.shape[2:])[:count].reshape(b, k, lanes, nq, heads, *x.shape[3:])
            return jnp.moveaxis(x, 4, 3).reshape(b, k, g, -1, x.shape[-1])[:, :, :, :t]

        return total, jax.tree.map(join, results)

    def fold_rows(self, data: Data, init, body, finish, rows=(), *, differentiable: bool = False):
        """As :meth:`attnx.core.blockwise.Blockwise.fold_rows`, over the chosen keys of every query."""
        axes = varying_axes(data, rows)
        data, rows = vary((data, rows), axes)

        def visit(total, carry, rows, place, over_heads):
            one = lambda q, k, v, state, at, blocks: body(state[0], q, k, v, state[1], at, blocks, data.seed, True)
            return total, over_heads(one, (carry, rows))

        return self._sweep(data, rows, (), lambda rows: vary(init(rows), axes), visit, finish, differentiable)[1]

    def fold_keys(self, data: Data, body, rows, gradient_of):
        """As :meth:`attnx.core.blockwise.Blockwise.fold_keys`, but query block by query block: all but the gradients of rows are scattered."""
        dtype = tile.accumulator_dtype(data.query.dtype)
        axes = varying_axes(data, rows)
        data, rows = vary((data, rows), axes)
        operands, integers, whole = partition(data.operands)

        def scattered(key, value, operands):
            cut = self._cut(data._replace(key=key, value=value, operands=whole(operands, integers)))
            blocked = jax.tree.leaves(cut.operands, is_leaf=is_blocked)
            return cut.key, cut.value, [x for x in blocked if jnp.issubdtype(x.array.dtype, jnp.inexact)]

        def init(_):
            return jax.tree.map(lambda x: vary(jnp.zeros((self.tiling.bq, x.shape[-1]), dtype), axes), (data.query, gradient_of))

        def visit(total, carry, rows, place, over_heads):
            one = lambda q, k, v, rows, at, blocks: body(q, k, v, rows, at, blocks, data.seed, True)
            dq, dk, dv, drows, dblocks = over_heads(one, rows)
            key, value, operands = total
            total = (key.add(place, dk[:, :, None]), None if dv is None else value.add(place, dv[:, :, None]),
                     [x.add(place, dx) for x, dx in zip(operands, dblocks, strict=True)])
            return total, jax.tree.map(jnp.add, carry, (dq, drows))

        # Cutting is linear: its transpose puts the gradients of blocks together.
        cut, together = jax.vjp(scattered, *jax.tree.map(lambda x: x.astype(dtype), (data.key, data.value, operands)))
        total, (dq, drows) = self._sweep(data, rows, jax.tree.map(jnp.zeros_like, cut), init, visit, lambda carry: carry)
        dk, dv, doperands = together(total)
        return dq, dk, dv, drows, doperands
