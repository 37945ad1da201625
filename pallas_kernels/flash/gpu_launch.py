"""One launch of a Triton program a block: what a tile reads from memory, and how blocks and lists of them are cut.

Arrays are handed over whole and read by computed addresses, so the same reader serves programs that sweep keys, queries, heads or diagonals. Matrices whose
width is no power of two are read as the next one, zeros beyond their end.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.compat import results_like
from pallas_kernels.flash.launch import Plan, flat_forms
from pallas_kernels.parts import At
from pallas_kernels.tile import accumulator_dtype
from pallas_kernels.tiles import Tile
from pallas_kernels.triton import load, whole, wide


class Here(NamedTuple):
    """The place of a tile: batch element, key-value head, head of the group, query block, key block."""

    b: Any
    k: Any
    g: Any
    i: Any = 0
    j: Any = 0


class Block(NamedTuple):
    """What a tile reads on one side: the numbers of its block of queries (or keys)."""

    matrices: tuple  # (query,) or (key, value)
    rows: Any
    positions: Any
    operands: dict


class Inputs(NamedTuple):
    """What a program reads, as arrays or as references to them."""

    query: Any
    key: Any
    value: Any
    rows: Any
    positions: Any
    operands: Any
    seed: Any
    origin: Any
    lists: Any


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads tiles [bq, bk], or transposed ones, inside a program.

    Attributes:
      refs: the references, of which those of matrices may be wider than the arrays.
      arrays: shapes and dtypes of the arrays.
      forms: of the operands, whose pytree has this ``structure``.
      sizes: B, K, G.
    """

    plan: Plan
    tile: Tile
    refs: Inputs
    arrays: Inputs
    forms: list
    structure: Any
    sizes: tuple[int, int, int]
    transposed: bool

    def sweep(self, here: Here, outer, visit: Callable, carry):
        """Folds ``visit(inner, carry, masked)`` over the inner blocks that the lists have for the outer one."""
        order, *ends = self.refs.lists
        (_, kv_heads, groups), heads = self.sizes, order.shape[1]
        head = 0 if heads == 1 else here.k * groups + here.g if heads == kv_heads * groups else here.k
        index = here.b if order.shape[0] > 1 else 0, head
        first, full, active = (end[(*index, outer)] for end in ends)
        carry = lax.fori_loop(first, full, lambda n, carry: visit(order[(*index, n)], carry, False), carry)
        return lax.fori_loop(full, active, lambda n, carry: visit(order[(*index, n)], carry, True), carry)

    def queries(self, here: Here) -> Block:
        """The query block of ``here``."""
        at = (here.b, here.k, here.g, pl.ds(here.i * self.tile.bq, self.tile.bq))
        rows = jax.tree.map(lambda ref, x: self._line(ref[at], "query") if x.ndim == 4 else load(ref, x, at), self.refs.rows, self.arrays.rows)
        positions = self._positions("query", here.b, here.i, self.tile.bq, self.plan.queries)
        return Block((load(self.refs.query, self.arrays.query, at),), rows, positions, self._operands(here, ("query", "whole")))

    def keys(self, here: Here) -> Block:
        """The key block of ``here``."""
        at = (here.b, here.k, pl.ds(here.j * self.tile.bk, self.tile.bk))
        value = None if self.refs.value is None else load(self.refs.value, self.arrays.value, at)
        positions = self._positions("key", here.b, here.j, self.tile.bk, self.plan.keys)
        return Block((load(self.refs.key, self.arrays.key, at), value), (), positions, self._operands(here, ("key",)))

    def join(self, here: Here, queries: Block, keys: Block):
        """What a tile function wants: q, k, v, rows, at, blocks, seed."""
        operands = {**queries.operands, **keys.operands, **self._operands(here, ("pair", "offset", "entry"))}
        blocks = jax.tree.unflatten(self.structure, [operands[n] for n in range(len(operands))])
        seed = self.refs.seed
        return *queries.matrices, *keys.matrices, queries.rows, self._at(here, queries, keys), blocks, (seed[0], seed[1])

    def _at(self, here: Here, queries: Block, keys: Block) -> At:
        origin = self.refs.origin
        return At(origin[0] + here.b, (origin[1] + here.k) * self.sizes[2] + here.g, queries.positions, keys.positions)

    def _line(self, x, name: str):
        """Numbers along the queries or the keys of a tile."""
        return jnp.expand_dims(x, 1 if (name == "query") != self.transposed else 0)

    def _positions(self, name: str, b, number, size: int, length: int):
        if not self.plan.contiguous:
            ref = self.refs.positions[name]
            return self._line(ref[b if ref.shape[0] > 1 else 0, pl.ds(number * size, size)], name)
        place = self._line(number * size + lax.iota(jnp.int32, size), name)
        return place if length % size == 0 else jnp.where(place < length, place, -1)

    def _operands(self, here: Here, kinds) -> dict:
        read = {"offset": self._band, "entry": self._entry}
        return {n: read.get(f.kind, self._operand)(self.refs.operands[n], f, here) for n, f in enumerate(self.forms) if f.kind in kinds}

    def _operand(self, ref, f, here: Here):
        lead = (place if varies else 0 for place, varies in zip(here[:3], f.spec))
        rows = pl.ds(here.i * self.tile.bq, self.tile.bq) if f.spec.query else 0
        columns = pl.ds(here.j * self.tile.bk, self.tile.bk) if f.spec.key else 0
        x = ref[(*lead, rows, columns, *(slice(None),) * len(f.extra))]
        if f.kind == "pair":
            return jnp.swapaxes(x, 0, 1) if self.transposed else x
        return jnp.expand_dims(x, (0, 1)) if f.kind == "whole" else self._line(x, f.kind)

    def _entry(self, ref, f, here: Here):
        """What the pairs of a tile, which lie in one block of queries and of keys, see of the table (see :class:`Choice`) or of its scores, [1, 1]."""
        mine = self.chosen(here)
        if not jnp.issubdtype(f.dtype, jnp.floating):
            return jnp.max(jnp.where(mine, 0, -1), axis=1, keepdims=True)
        return jnp.sum(jnp.where(mine, self._row(ref, f, here).astype(accumulator_dtype(f.dtype)), 0), axis=1, keepdims=True)

    def chosen(self, here: Here):
        """Which of the entries for a tile's queries, [1, entries], are for its keys."""
        number = self.plan.choice.table
        return self._row(self.refs.operands[number], self.forms[number], here) == lax.div(here.j * self.tile.bk, jnp.int32(self.plan.choice.bk))

    def _row(self, ref, f, here: Here):
        lead = (place if varies else 0 for place, varies in zip(here[:3], f.spec))
        return ref[(*lead, 0, 0, lax.div(here.i * self.tile.bq, jnp.int32(self.plan.choice.bq)), slice(None))][None]

    def _band(self, ref, f, here: Here):
        """The tile of an offset table, gathered: entry (a, b) is that of the offset of key b from query a. Tables lie in memory one after the other."""
        which, tables = 0, 1
        for place, varies, n in zip(here, f.spec[:3], self.sizes):
            which, tables = (which * n + place, tables * n) if varies else (which, tables)
        start = which * (ref.shape[0] // tables) + here.j * self.tile.bk - here.i * self.tile.bq + self.plan.bq - self.plan.low
        a, b = (self._line(lax.iota(jnp.int32, n), name) for n, name in ((self.tile.bq, "query"), (self.tile.bk, "key")))
        return ref[start + b - a]


class Output(NamedTuple):
    """An array that is written a block a program: its shape and dtype, the block (None removes an axis), and the numbers of a program's block."""

    array: Any
    block: tuple
    place: Callable


def launch(plan: Plan, tile: Tile, data, rows, lists, grid: tuple[int, ...], program: Callable, outputs, name: str, *, transposed: bool = False,
           reads: type[Reader] = Reader):
    """Runs ``program(reader, ids, outputs)`` for every ``ids`` of the grid; ``outputs`` a pytree of :class:`Output`, there of references."""
    leaves, structure = jax.tree.flatten(data.operands)
    forms = flat_forms(plan, leaves)
    inputs = Inputs(
        data.query, data.key, data.value, jax.tree.map(lambda x: x[..., 0] if x.shape[-1] == 1 else x, rows),
        None if plan.contiguous else {"query": data.query_positions, "key": data.key_positions},
        [x.reshape(-1) if f.kind == "offset" else x for x, f in zip(leaves, forms)], data.seed, data.origin, lists)
    arrays = jax.eval_shape(lambda: inputs)
    specs = jax.tree.map(whole, inputs)._replace(
        query=wide(data.query), key=wide(data.key), value=None if data.value is None else wide(data.value),
        rows=jax.tree.map(lambda x: wide(x) if x.ndim == 5 else whole(x), inputs.rows))
    read, tree = jax.tree.flatten(inputs)
    written, outputs_tree = jax.tree.flatten(outputs, is_leaf=lambda x: isinstance(x, Output))

    def kernel(*refs):
        inputs, outputs = jax.tree.unflatten(tree, refs[:len(read)]), jax.tree.unflatten(outputs_tree, refs[len(read):])
        reader = reads(plan, tile, inputs, arrays, forms, structure, data.query.shape[:3], transposed)
        program(reader, [pl.program_id(axis) for axis in range(len(grid))], outputs)

    out = pl.pallas_call(
        kernel, results_like([w.array for w in written], read), grid=grid,
        in_specs=jax.tree.leaves(specs), out_specs=[pl.BlockSpec(w.block, w.place) for w in written],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages), interpret=plan.interpret, name=name,
    )(*read)
    return jax.tree.unflatten(outputs_tree, out)
