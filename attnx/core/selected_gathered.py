"""The ``gathered`` execution of the selected engine: chosen key blocks side by side in a tile, on any backend.

A tile is a few query blocks of one or several heads, each against a slab of its own key blocks. It is read by one gather an array, and the gradients of
what several tiles read are added by one scatter. What is folded comes from :mod:`attnx.core.operations`.
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

# The selection as parts, so that a tile reads one number a key. ``materialised`` they are arrays over queries and keys like any, and every execution
# evaluates them; otherwise arrays over query blocks and entries of the table, which only the gathered one knows how to read.


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
        return chosen >= 0 if self.materialised else at.key >= 0  # padding is gathered as a block of padded keys


@part
class Extra(Score):
    """The scores of chosen blocks. The last of the scores."""

    scores: Any
    materialised: bool = static(default=False)

    def operands(self, sizes):
        return (Operand(self.scores, _axes(self.scores, sizes, self.materialised)),)

    def tile(self, s, at, extra):
        return s + extra.astype(s.dtype)


# Blocks -------------------------------------------------------------------------------------------------------------


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
    """How an operand is cut into blocks."""

    spec: Spec
    lanes: bool  # the heads of a group are apart, each with its own tiles
    bk: int
    low: int  # the first offset of an offset table
    entry: bool = False  # a column for each entry of the table rather than for each key


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["lead", "layout"])
@dataclasses.dataclass(frozen=True)
class Blocked:
    """An operand as [blocks, group, rows, columns, *None axes], or [offsets, group].

    The first axis is [batch, kv_head, lane, query block, key block] or [batch, kv_head, lane, offset], of the sizes ``lead``, in one.
    """

    array: Any
    lead: tuple[int, ...]
    layout: Layout

    @property
    def grouped(self) -> bool:
        """Whether it varies over the heads that share a tile."""
        return self.layout.spec.group and not self.layout.lanes

    def _index(self, place: Place):
        spec = self.layout.spec
        index = [x if varies else 0 for x, varies in zip(place, (spec.batch, spec.kv, spec.group and self.layout.lanes))]
        if spec.offset:
            offset = jnp.clip(place.at.key - place.at.query - self.layout.low, 0, self.lead[3] - 1)
            index = [*(x if isinstance(x, int) else x[:, :, None] for x in index), offset]
        else:
            index += [place.block if spec.query else 0, (place.entry if self.layout.entry else place.chosen) if spec.key else jnp.zeros_like(place.block)]
        flat = 0
        for x, size in zip(index, self.lead, strict=True):
            flat = flat * size + x
        return flat

    def blocks(self, place: Place):
        """What the tile reads, block by block: [C, m or 1, group, rows, columns, *None axes]."""
        return self.array.at[self._index(place)].get(mode="promise_in_bounds")

    def read(self, place: Place):
        """What the tile reads: [C, group, rows, keys, *None axes]."""
        block = self.blocks(place)
        if self.layout.spec.offset:
            return jnp.moveaxis(block, -1, 1)
        if not self.layout.spec.key:
            return block[:, 0]
        block = jnp.moveaxis(jnp.broadcast_to(block, (*block.shape[:4], self.layout.bk, *block.shape[5:])), 1, 3)
        return block.reshape(*block.shape[:3], -1, *block.shape[5:])

    def add(self, place: Place, block):
        """With the gradient of what a tile read added, of which ``block`` [C, group, ...] has one for every head of the tile."""
        block = block if self.grouped else block.sum(1, keepdims=True)
        if self.layout.spec.offset:
            block = jnp.moveaxis(block, 1, -1)
        elif self.layout.spec.key:
            block = jnp.moveaxis(block.reshape(*block.shape[:3], -1, self.layout.bk, *block.shape[4:]), 3, 1)
            block = block.sum(4, keepdims=True) if self.layout.entry else block
        else:
            block = block[:, None]
        return dataclasses.replace(self, array=self.array.at[self._index(place)].add(block, mode="promise_in_bounds"))


class Cut(NamedTuple):
    """The arrays of a call in blocks."""

    query: Any
    key: Any
    value: Any
    operands: Any
    query_positions: Any
    key_positions: Any
    rows: Any


def is_blocked(x):
    """Where a tree of :class:`Blocked` ends."""
    return isinstance(x, Blocked)


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

    def cut(self, x, spec: Spec, entry: bool = False) -> Blocked:
        """A canonical operand in blocks, padded to whole ones; linear."""
        bq, bk, _ = self.tiling
        layout = Layout(spec._replace(query=True, key=True) if entry else spec, self.lanes > 1, bk, self.program.sizes.offsets[0], entry)
        lanes = (x.shape[2], 1) if layout.lanes else (1, x.shape[2])
        if spec.offset:
            x = jnp.moveaxis(x.reshape(*x.shape[:2], *lanes, -1), 3, 4)
            return Blocked(x.reshape(-1, lanes[1]), x.shape[:4], layout)
        if entry:
            x = widen(x, 6, -x.shape[6] % self.entries, constant_values=-1)
            return Blocked(x.reshape(-1, lanes[1], 1, 1), (*x.shape[:2], lanes[0], *x.shape[5:]), layout)
        rows, columns = bq if spec.query else 1, bk if spec.key else 1
        x = widen(x, 3, -x.shape[3] % rows, "edge")
        x = widen(x, 4, -x.shape[4] % columns + columns, "edge") if spec.key else x  # the last block is what padding chooses
        x = x.reshape(*x.shape[:2], *lanes, x.shape[3] // rows, rows, x.shape[4] // columns, columns, *x.shape[5:])
        x = x.transpose(0, 1, 2, 4, 6, 3, 5, 7, *range(8, x.ndim))
        return Blocked(x.reshape(-1, *x.shape[5:]), x.shape[:5], layout)

    def _cut(self, data: Data, rows) -> Cut:
        parts, specs = self.program.parts, self.program.specs
        extra = bool(parts.scores) and isinstance(parts.scores[-1], Extra)
        entries = Blocks(tuple(tuple(extra and i == len(specs.scores) - 1 for _ in x) for i, x in enumerate(specs.scores)),
                         tuple(i == 0 for i in range(len(specs.mask))), (False,) * len(specs.weights))
        operands = jax.tree.map(lambda spec, entry, x: self.cut(x, spec, entry), specs, entries, data.operands, is_leaf=lambda x: isinstance(x, Spec))
        query = partial(self.cut, spec=Spec(True, True, True, True, False, False))
        key = partial(self.cut, spec=Spec(True, True, False, False, True, False))
        (bq, bk, _), (q_pos, k_pos) = self.tiling, (data.query_positions, data.key_positions)
        q_pos, k_pos = widen(q_pos, 1, -q_pos.shape[1] % bq, constant_values=-1), widen(k_pos, 1, -k_pos.shape[1] % bk + bk, constant_values=-1)
        return Cut(query(data.query[..., None, :]), key(data.key[:, :, None, None]), None if data.value is None else key(data.value[:, :, None, None]), operands,
                   self.cut(q_pos[:, None, None, :, None], Spec(q_pos.shape[0] > 1, False, False, True, False, False)),
                   self.cut(k_pos[:, None, None, None, :], Spec(k_pos.shape[0] > 1, False, False, False, True, False)),
                   jax.tree.map(lambda x: query(x[..., None, :]), rows))

    def _sweep(self, data: Data, rows, total, init, visit, finish, differentiable=False):
        """Folds the slabs of every query block, C query blocks at a time.

        Args:
          data, rows: as in the folds.
          total: what every visit updates.
          init: ``init(rows of one head) -> carry``, a pytree of [bq, X].
          visit: ``visit(total, carry, place, on_heads, q, k, v, rows, blocks) -> (total, carry)``, where all but the place and the total have leading axes
            [C, group] or, what the heads of a tile share, [C], over which ``on_heads(function)`` vectorises ``function(q, k, v, rows, at, blocks)``.
          finish: ``finish(carry) -> result``, of one head as well.

        Returns the total and the results as [B, K, G, T, X].
        """
        b, k, g, t, _ = data.query.shape
        cut, m, lanes = self._cut(data, rows), self.entries, self.lanes
        nq = -(-t // self.tiling.bq)
        count, heads, padding = b * k * lanes * nq, g // lanes, cut.key.lead[4] - 1
        table = cut.operands.mask[0]
        axes = jax.tree.map(lambda x: 0 if x.grouped else None, cut.operands, is_leaf=is_blocked)
        over_heads = lambda f: jax.vmap(jax.vmap(f, in_axes=(0, None, None, 0, At(None, 0, None, None), axes)))
        each_head = lambda f: jax.vmap(jax.vmap(f))

        def chunk(total, n):
            index = [x[:, None] for x in jnp.unravel_index(jnp.minimum(n, count - 1), (b, k, lanes, nq))]
            head = (data.origin[1] + index[1]) * g + index[2] + jnp.arange(heads, dtype=jnp.int32)
            here = Place(*index, jnp.arange(table.lead[4])[None], None, At(data.origin[0] + index[0][:, 0], head, None, None))
            query_positions = jnp.where((n < count)[:, None, None], cut.query_positions.read(here)[:, 0], -1)
            here = here._replace(at=here.at._replace(query=query_positions))
            row = lambda x: x.read(here)[:, :, :, 0]
            q, mine = row(cut.query), jax.tree.map(row, cut.rows, is_leaf=is_blocked)
            chosen = table.blocks(here).reshape(len(n), -1)
            chosen = jnp.where(chosen < 0, padding, chosen)

            def step(slab, state):
                entry = slab * m + jnp.arange(m, dtype=jnp.int32)[None]
                place = here._replace(entry=entry, chosen=lax.dynamic_slice_in_dim(chosen, slab * m, m, 1))
                place = place._replace(at=place.at._replace(key=cut.key_positions.read(place)[:, 0]))
                column = lambda x: x.read(place)[:, 0, 0]
                v = None if cut.value is None else column(cut.value)
                blocks = jax.tree.map(lambda x: x.read(place) if x.grouped else x.read(place)[:, 0], cut.operands, is_leaf=is_blocked)
                return visit(*state, place, over_heads, q, column(cut.key), v, mine, blocks)

            state = total, each_head(lambda _, rows: init(rows))(jnp.zeros((len(n), heads)), mine)
            slabs = chosen.shape[1] // m
            if differentiable:
                state, _ = lax.scan(jax.checkpoint(lambda state, slab: (step(slab, state), None)), state, jnp.arange(slabs, dtype=jnp.int32))
            else:  # the entries of a row that are not -1 come first
                state = lax.fori_loop(0, (jnp.max((chosen < padding).sum(1)) + m - 1) // m, step, state)
            total, carry = state
            return total, each_head(finish)(carry)

        chunks = -(-count // self.blocks)
        n = jnp.arange(chunks * self.blocks, dtype=jnp.int32).reshape(chunks, self.blocks)
        total, results = lax.scan(jax.checkpoint(chunk) if differentiable else chunk, total, n)

        def join(x):
            x = x.reshape(-1, *x.shape[2:])[:count].reshape(b, k, lanes, nq, heads, *x.shape[3:])
            return jnp.moveaxis(x, 4, 3).reshape(b, k, g, -1, x.shape[-1])[:, :, :, :t]

        return total, jax.tree.map(join, results)

    def fold_rows(self, data: Data, init, body, finish, rows=(), *, differentiable: bool = False):
        """As :meth:`attnx.core.blockwise.Blockwise.fold_rows`, over the chosen keys of every query."""
        axes = varying_axes(data, rows)
        data, rows = vary((data, rows), axes)

        def visit(total, carry, place, over_heads, q, k, v, rows, blocks):
            one = lambda q, k, v, state, at, blocks: body(state[0], q, k, v, state[1], at, blocks, data.seed, True)
            return total, over_heads(one)(q, k, v, (carry, rows), place.at, blocks)

        return self._sweep(data, rows, (), lambda rows: vary(init(rows), axes), visit, finish, differentiable)[1]

    def fold_keys(self, data: Data, body, rows, gradient_of):
        """As :meth:`attnx.core.blockwise.Blockwise.fold_keys`; gradients of rows stay in a tile, all others are scattered."""
        dtype = tile.accumulator_dtype(data.query.dtype)
        axes = varying_axes(data, rows)
        data, rows = vary((data, rows), axes)

        operands, integers, rejoin = partition(data.operands)

        def views(key, value, operands):
            cut = self._cut(data._replace(key=key, value=value, operands=rejoin(operands, integers)), ())
            blocked = jax.tree.leaves(cut.operands, is_leaf=is_blocked)
            return cut.key, cut.value, [x for x in blocked if jnp.issubdtype(x.array.dtype, jnp.inexact)]

        def init(_):
            return jax.tree.map(lambda x: vary(jnp.zeros((self.tiling.bq, x.shape[-1]), dtype), axes), (data.query, gradient_of))

        def visit(total, carry, place, over_heads, q, k, v, rows, blocks):
            one = lambda q, k, v, rows, at, blocks: body(q, k, v, rows, at, blocks, data.seed, True)
            dq, dk, dv, drows, dblocks = over_heads(one)(q, k, v, rows, place.at, blocks)
            key, value, operands = total
            total = (key.add(place, dk[:, :, None]), None if dv is None else value.add(place, dv[:, :, None]),
                     [x.add(place, dx) for x, dx in zip(operands, dblocks, strict=True)])
            return total, jax.tree.map(jnp.add, carry, (dq, drows))

        # Cutting is linear, so its transpose puts the gradients of blocks together.
        cut, pull = jax.vjp(views, *jax.tree.map(lambda x: x.astype(dtype), (data.key, data.value, operands)))
        total, (dq, drows) = self._sweep(data, rows, jax.tree.map(jnp.zeros_like, cut), init, visit, lambda carry: carry)
        dk, dv, doperands = pull(total)
        return dq, dk, dv, drows, doperands
