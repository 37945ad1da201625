"""One launch over the tiles of a schedule on a TPU core: the grid, what every tile reads, and how it reaches the tile functions."""

import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compat import results_like
from pallas_kernels.flash.entries import Choice, names_any, read_scores, read_table
from pallas_kernels.flash.operands import LANES, Form, Window, block, column, form, line, matrix, spread, wide, window
from pallas_kernels.flash.schedule import EMPTY, FULL, PARTIAL, Schedule, unpack
from pallas_kernels.parts import At, Blocks, Spec
from pallas_kernels.tile import across


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a launch.

    Attributes:
      specs: how each canonical operand varies.
      bq, bk: tile sizes, powers of two and at least 128.
      queries, keys: lengths before padding.
      low: the offset (key position minus query position) of the first entry of 'offset' tables before padding.
      contiguous: positions are consecutive inside every block.
      interpret: as for ``pallas_call``.
      choice: the blocks of keys that each block of queries has chosen, where pairs outside are not allowed.
    """

    specs: Blocks
    bq: int
    bk: int
    queries: int
    keys: int
    low: int
    contiguous: bool
    interpret: Any = False
    choice: Choice | None = None


class Inputs(NamedTuple):
    """What a tile reads."""

    query: Any
    key: Any
    value: Any
    rows: Any
    positions: Any
    operands: Any


class Here(NamedTuple):
    """A grid step inside a kernel: the head, the step, what the schedule says of it, its place in offset tables, and the window of the chosen blocks."""

    b: Any
    k: Any
    g: Any
    s: Any
    i: Any
    j: Any
    kind: Any
    first: Any
    last: Any
    offset: Any
    table: Any


def launch(plan: Plan, timetable: Schedule, data, rows, order: str, step: Callable, outputs, scratch, name: str, *,
            by_key: bool = False, zeroed: bool = False, repeated: bool = False):
    """Runs ``step(here, tile, output refs, scratch refs)`` over a grid whose axes are ``order``: letters of 'bkgs', s the steps of a schedule.

    ``tile()`` reads what a tile function wants: (q, k, v, rows, at, blocks, seed). ``by_key``: the schedule has key blocks outside, and tiles are
    transposed. ``zeroed``: blocks that no step visits are to hold zeros. ``repeated``: operands that are columns come as wide as the tile, which spares spreading
    them over lanes tile by tile; not where their gradients are wanted.
    """
    b, k, g, t, _ = data.query.shape
    nq, nk = t // plan.bq, data.key.shape[2] // plan.bk
    by_batch, heads, length = timetable.steps.shape[0] > 1, *timetable.steps.shape[1:]
    by_group = g > 1 and heads == k * g
    q_batched, k_batched = data.query_positions.shape[0] > 1, data.key_positions.shape[0] > 1

    def look_up(ids, steps):
        lists = (ids["b"] * heads if by_batch else 0) + (ids["k"] * g + ids["g"] if by_group else ids["k"] if heads > 1 else 0)
        at = unpack(steps[lists * length + ids["s"]])
        i, j = (at.inner, at.outer) if by_key else (at.outer, at.inner)
        return {**ids, "i": i, "j": j, "kind": at.kind, "first": at.first, "last": at.last}

    def index(*args):
        return look_up(dict(zip(order, args)), args[4])

    leaves, structure = jax.tree.flatten(data.operands)
    forms = flat_forms(plan, leaves)
    positions = None if plan.contiguous else (
        line(data.query_positions[:, None, None], ("b" if q_batched else None, None, None), "i", plan.bq, turned=not by_key),
        line(data.key_positions[:, None, None], ("b" if k_batched else None, None, None), "j", plan.bk, turned=by_key))
    inputs = Inputs(
        matrix(data.query, "bkg", "i", plan.bq), matrix(data.key, "bk", "j", plan.bk), None if data.value is None else matrix(data.value, "bk", "j", plan.bk),
        jax.tree.map(lambda x: line(x[..., 0], "bkg", "i", plan.bq, turned=not by_key) if x.shape[-1] == 1 else matrix(x, "bkg", "i", plan.bq), rows),
        positions, [entries(x, f) if f.kind == "entry" else window(x, f, plan.bq, plan.bk, by_key) for x, f in zip(leaves, forms)])
    read, inputs_tree = jax.tree.flatten(inputs)
    slots = jax.tree.unflatten(inputs_tree, range(len(read)))  # which of the refs each is
    written, outputs_tree = jax.tree.flatten(outputs)
    kept, scratch_tree = jax.tree.flatten(scratch)
    inside = order[order.index("s") + 1:]  # what changes while an outer block stays; the rest is turned once for each of those
    turned = [n for n, w in enumerate(read) if w.turned and not set(inside) & set(w.place)]
    columns = [pltpu.VMEM((read[n].shape[-1], LANES), wide(read[n].array.dtype)) for n in turned]
    width = plan.bk if repeated else 1
    parts = (5, len(read), len(written) if zeroed else 0, len(written), len(kept), len(columns))

    def kernel(*refs):
        refs = iter(refs)
        scalars, ins, _, outs, kept, columns = ([next(refs) for _ in range(n)] for n in parts)
        steps, querystarts, keystarts, seed, origin = scalars
        at = look_up({c: pl.program_id(axis) for axis, c in enumerate(order)}, steps)
        query_start = querystarts[(at["b"] * nq if q_batched else 0) + at["i"]]
        key_start = keystarts[(at["b"] * nk if k_batched else 0) + at["j"]]
        table = None if plan.choice is None else ins[slots.operands[plan.choice.table]]
        here = Here(**at, offset=key_start - query_start - plan.low + 1, table=table)
        if by_key and table is not None and forms[plan.choice.table].spec.group:  # the list is of what any head of the group has chosen
            here = here._replace(kind=jnp.where(names_any(plan.choice, table, here.j, plan.bk), here.kind, EMPTY))

        if turned:
            @pl.when(here.first & starts(here, inside))
            def _():
                for ref, n in zip(columns, turned):
                    put(ref, column(ins[n][...]))

        def load(n, width=1):
            if not read[n].turned:
                return ins[n][...]
            x = columns[turned.index(n)][:, :min(width, LANES)] if n in turned else column(ins[n][...])
            return across(x, width).astype(read[n].array.dtype)

        def operand(n, f):
            if f.kind == "entry":
                read = partial(read_table, plan.choice) if ins[n] is table else partial(read_scores, plan.choice, table)
                return read(ins[n], here.j, plan.bq, plan.bk, by_key)
            return block(spread(ins[n], here.offset, plan.bq, plan.bk) if f.kind == "offset" else load(n, width), f, by_key)

        def tile():
            q, k, v, rows, where = jax.tree.map(load, slots._replace(operands=None))[:5]
            where = where or (_consecutive(query_start, here.i, plan.bq, plan.queries, by_key),
                              _consecutive(key_start, here.j, plan.bk, plan.keys, not by_key))
            blocks = jax.tree.unflatten(structure, [operand(n, f) for n, f in zip(slots.operands, forms)])
            return q, k, v, rows, At(origin[0] + here.b, (origin[1] + here.k) * g + here.g, *where), blocks, (seed[0], seed[1])

        step(here, tile, jax.tree.unflatten(outputs_tree, outs), jax.tree.unflatten(scratch_tree, kept))

    counts = {"b": b, "k": k, "g": g, "s": timetable.count}
    arrays = [w.array for w in read]
    start = [jnp.zeros(w.array.shape, w.array.dtype) for w in written] if zeroed else []
    scalars = (timetable.steps.reshape(-1), data.query_positions[:, ::plan.bq].reshape(-1), data.key_positions[:, ::plan.bk].reshape(-1),
               data.seed, data.origin)
    out = pl.pallas_call(
        kernel, results_like([w.array for w in written], arrays),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=tuple(counts[c] for c in order),
            in_specs=[w.spec(index) for w in read] + [pl.BlockSpec(memory_space=pl.ANY)] * len(start),
            out_specs=[w.spec(index) for w in written], scratch_shapes=kept + columns),
        input_output_aliases={5 + len(read) + n: n for n in range(len(start))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=tuple("parallel" if axis < order.index("s") else "arbitrary" for axis in range(4))),
        interpret=plan.interpret, name=name,
    )(*scalars, *arrays, *start)
    return jax.tree.unflatten(outputs_tree, out)


def _consecutive(start, number, size: int, length: int, axis: int):
    """The positions of a block that starts at ``start``, -1 beyond ``length`` entries in all: along axis 0, [size, 1], or 1, [1, size]."""
    along = jax.lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)
    return start + along if length % size == 0 else jnp.where(number * size + along < length, start + along, -1)


def visited(here: Here):
    """Decorator: runs ``visit(masked)`` unless the step is empty."""
    def run(visit):
        pl.when(here.kind == FULL)(partial(visit, False))
        pl.when(here.kind == PARTIAL)(partial(visit, True))
    return run


def starts(here: Here, letters: str):
    """Whether the grid is at the beginning of all these axes."""
    return reduce(jnp.logical_and, (getattr(here, c) == 0 for c in letters), True)


def flat_specs(plan: Plan):
    """The specs of all operands, in tree order."""
    return jax.tree.leaves(plan.specs, is_leaf=lambda x: isinstance(x, Spec))


def flat_forms(plan: Plan, leaves):
    """The forms of all operands, in tree order."""
    chosen = () if plan.choice is None else (plan.choice.table, plan.choice.scores)
    return [Form("entry", spec, (), x.dtype) if n in chosen else form(x, spec) for n, (x, spec) in enumerate(zip(leaves, flat_specs(plan), strict=True))]


def entries(x, f: Form) -> Window:
    """The window of a number for each chosen block, [batch, kv_head, group, nq, rows, entries]."""
    return Window(x, (None,) * 4 + x.shape[4:], (*f.lead, "i", None, None))


def put(refs, values):
    """Writes a pytree of values, columns to all lanes."""
    def write(ref, x):
        ref[...] = jnp.broadcast_to(x, ref.shape)

    jax.tree.map(write, refs, values)
