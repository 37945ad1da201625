"""The ``gathered`` execution of the selected engine: chosen key blocks side by side in a tile, on any backend.

A tile is a few query blocks, of one head or of the heads that share a choice, each against some of its own key blocks. It reads every array by one
gather, and adds the gradients of keys by one scatter. What is folded comes from :mod:`attnx.core.operations`.
"""

import dataclasses
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
# of the table, which the executions of the selected engine know how to read.


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
        return chosen >= 0


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
    """C query blocks, m entries of each one's row in the table, and the tile that they make."""

    batch: Any  # [C, 1]
    kv_head: Any
    lane: Any  # the query head of the group where each chooses for itself, else 0
    block: Any
    entry: Any  # [1, m]
    chosen: Any  # [C, m], the key blocks that the entries name; one more than there are for padding
    offset: Any  # [C, bq, m bk], where offset tables are read
    at: At  # [C], [C, group], [C, bq, 1], [C, 1, m bk]


@part
class Blocked:
    """An array some of whose axes a place indexes by name ('one': of size 1, whatever the place); the others a tile reads whole.

    Operands are [batch, kv_head, lane, group, block, rows, chosen or entry, columns, *None axes] or [batch, kv_head, lane, group, offset].
    """

    array: Any  # in another shape, and seen in this one only where it is read, or else compilers copy the whole of a cache that is updated in place
    shape: tuple[int, ...] = static()
    axes: tuple[str | None, ...] = static()

    @property
    def grouped(self) -> bool:
        """Whether an operand varies over the heads of a tile."""
        return self.shape[3] > 1

    def _index(self, place: Place):
        index = place._asdict() | {"one": jnp.zeros_like(place.batch)}
        if "offset" in self.axes:
            index |= {name: index[name][..., None] for name in ("batch", "kv_head", "lane", "one")}
        return tuple(slice(None) if name is None else index[name] for name in self.axes)

    def read(self, place: Place):
        """[C, m or 1, *whole axes], or [C, bq, m bk, *whole axes] of an offset table; the edge for what lies outside."""
        return self.array.reshape(self.shape).at[self._index(place)].get(mode="clip")

    def add(self, place: Place, x):
        """With the gradient of what :meth:`read` returned added, but for what lies outside."""
        array = self.array.reshape(self.shape).at[self._index(place)].add(x, mode="drop")
        return dataclasses.replace(self, array=array.reshape(self.array.shape))

    def read_operand(self, place: Place, bk: int):
        """The block of an operand, [C, group, rows, keys, *None axes], without the group where it does not vary."""
        x = self.read(place)
        if "offset" in self.axes:
            x = jnp.moveaxis(x, -1, 1)
        else:  # an entry of the table is for as many keys as a block has
            bk = x.shape[4] if self.axes[6] == "one" else bk
            x = jnp.moveaxis(jnp.broadcast_to(x, (*x.shape[:4], bk, *x.shape[5:])), 1, 3)
            x = x.reshape(*x.shape[:3], -1, *x.shape[5:])
        return x if self.grouped else x[:, 0]

    def add_operand(self, place: Place, x):
        """With the gradient of a block added; ``x`` [C, group, rows, keys, *None axes] has one for every head of the tile."""
        x = x if self.grouped else x.sum(1, keepdims=True)
        if "offset" in self.axes:
            return self.add(place, jnp.moveaxis(x, 1, -1))
        m = 1 if self.axes[6] == "one" else place.chosen.shape[1]
        x = jnp.moveaxis(x.reshape(*x.shape[:3], m, -1, *x.shape[4:]), 3, 1)
        return self.add(place, x.sum(4, keepdims=True) if self.axes[6] == "entry" else x)


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

    def _operand(self, x, spec: Spec, by_entry: bool) -> Blocked:
        """A canonical operand in whole blocks: no copy unless it has to be padded."""
        split = (x.shape[2], 1) if self.lanes > 1 else (1, x.shape[2])
        lead = ("batch" if spec.batch else "one", "kv_head" if spec.kv else "one", "lane" if spec.group and self.lanes > 1 else "one", None)
        if spec.offset:
            return Blocked(x, (*x.shape[:2], *split, x.shape[3]), (*lead, "offset"))
        if by_entry:
            x = widen(x, 6, -x.shape[6] % self.entries, constant_values=-1)
            return Blocked(x, (*x.shape[:2], *split, x.shape[5], 1, x.shape[6], 1), (*lead, "block", None, "entry", None))
        rows, columns = self.tiling.bq if spec.query else 1, self.tiling.bk if spec.key else 1
        x = widen(widen(x, 3, -x.shape[3] % rows, "edge"), 4, -x.shape[4] % columns, "edge")
        shape = (*x.shape[:2], *split, x.shape[3] // rows, rows, x.shape[4] // columns, columns, *x.shape[5:])
        return Blocked(x, shape, (*lead, "block" if spec.query else "one", None, "chosen" if spec.key else "one", None, *(None,) * (x.ndim - 5)))

    def _cut(self, data: Data, rows=()) -> Cut:
        (bq, bk, _), specs, scores = self.tiling, self.program.specs, self.program.parts.scores
        by_entry = jax.tree.map(lambda _: False, specs, is_leaf=lambda x: isinstance(x, Spec))
        by_entry = by_entry._replace(mask=(True, *by_entry.mask[1:]),
                                     scores=tuple((True,) if isinstance(score, Extra) else no for score, no in zip(scores, by_entry.scores)))

        def of_rows(x):  # [B, K, G, T, X]
            x = widen(x, 3, -x.shape[3] % bq)
            split = (x.shape[2], 1) if self.lanes > 1 else (1, x.shape[2])
            return Blocked(x, (*x.shape[:2], *split, x.shape[3] // bq, bq, x.shape[4]), ("batch", "kv_head", "lane", None, "block", None, None))

        def of_keys(x):  # [B, K, S, X]
            x = widen(x, 2, -x.shape[2] % bk)
            blocks, (rows, entries) = x.shape[2] // bk, data.operands.mask[0].shape[5:7]
            if rows * entries >= blocks:  # much is read: let a block of a head lie in one piece
                return Blocked(x, (*x.shape[:2], blocks, bk, x.shape[3]), ("batch", "kv_head", "chosen", None, None))
            x = jnp.swapaxes(x, 1, 2)  # the order in which it came from the caller
            return Blocked(x, (x.shape[0], blocks, bk, *x.shape[2:]), ("batch", "chosen", None, "kv_head", None))

        def positions(x, more, size, name):
            x = widen(x, 1, more, constant_values=-1)
            return Blocked(x, (x.shape[0], x.shape[1] // size, size), ("batch" if x.shape[0] > 1 else "one", name, None))

        t, s = data.query_positions.shape[1], data.key_positions.shape[1]
        return Cut(of_rows(data.query), of_keys(data.key), None if data.value is None else of_keys(data.value),
                   jax.tree.map(lambda e, spec, x: self._operand(x, spec, e), by_entry, specs, data.operands),
                   positions(data.query_positions, -t % bq, bq, "block"), positions(data.key_positions, -s % bk + bk, bk, "chosen"),
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
        (bq, bk, _), m, lanes, cut, (low, high) = self.tiling, self.entries, self.lanes, self._cut(data, rows), self.program.sizes.offsets
        table = cut.operands.mask[0]
        nq, padding, length = -(-t // bq), -(-data.key.shape[2] // bk), table.shape[6]
        count, heads = b * k * lanes * nq, g // lanes
        axes = jax.tree.map(lambda x: 0 if x.grouped else None, cut.operands, is_leaf=is_blocked)
        each_head = lambda f: jax.vmap(jax.vmap(f))

        def chunk(total, n):
            batch, kv_head, lane, block = (x[:, None] for x in jnp.unravel_index(jnp.minimum(n, count - 1), (b, k, lanes, nq)))
            here = Place(batch, kv_head, lane, block, jnp.arange(length)[None], None, None, None)
            query_positions = jnp.where((n < count)[:, None], cut.query_positions.read(here)[:, 0], -1)[..., None]
            head = (data.origin[1] + kv_head) * g + lane + jnp.arange(heads, dtype=jnp.int32)
            q, mine = jax.tree.map(lambda x: x.read(here)[:, 0], (cut.query, cut.rows), is_leaf=is_blocked)
            chosen = table.read(here).reshape(len(n), length)
            chosen = jnp.where(chosen < 0, padding, chosen)

            def step(slab, state):
                entry = slab * m + jnp.arange(m, dtype=jnp.int32)[None]
                place = here._replace(entry=entry, chosen=lax.dynamic_slice_in_dim(chosen, slab * m, m, 1))
                key_positions = cut.key_positions.read(place).reshape(len(n), 1, m * bk)
                place = place._replace(offset=jnp.clip(key_positions - query_positions, low, high) - low,
                                       at=At(data.origin[0] + batch[:, 0], head, query_positions, key_positions))
                keys, values = (None if x is None else x.read(place).reshape(len(n), m * bk, -1) for x in (cut.key, cut.value))
                blocks = jax.tree.map(lambda x: x.read_operand(place, bk), cut.operands, is_leaf=is_blocked)

                def over_heads(function, rows):
                    function = jax.vmap(jax.vmap(function, in_axes=(0, None, None, 0, At(None, 0, None, None), axes)))
                    return function(q, keys, values, rows, place.at, blocks)

                return visit(*state, mine, place, over_heads)

            state = total, each_head(lambda _, rows: init(rows))(jnp.zeros((len(n), heads)), mine)
            if differentiable:
                slabs = jnp.arange(length // m, dtype=jnp.int32)
                state, _ = lax.scan(jax.checkpoint(lambda state, slab: (step(slab, state), None)), state, slabs)
            else:  # padding comes last in a row
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
            by_block = lambda x: x.sum(1).reshape(*place.chosen.shape, -1, x.shape[-1])
            total = (key.add(place, by_block(dk)), None if dv is None else value.add(place, by_block(dv)),
                     [x.add_operand(place, dx) for x, dx in zip(operands, dblocks, strict=True)])
            return total, jax.tree.map(jnp.add, carry, (dq, drows))

        # Cutting is linear: its transpose puts the gradients of blocks together.
        cut, together = jax.vjp(scattered, *jax.tree.map(lambda x: x.astype(dtype), (data.key, data.value, operands)))
        total, (dq, drows) = self._sweep(data, rows, jax.tree.map(jnp.zeros_like, cut), init, visit, lambda carry: carry)
        dk, dv, doperands = together(total)
        return dq, dk, dv, drows, doperands
