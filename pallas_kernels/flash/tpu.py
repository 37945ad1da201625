"""Folding tiles on a TPU core: one kernel that sweeps the keys of each query block, and its transposes.

:func:`fold_rows` and :func:`fold_keys` run any tile function (see :mod:`pallas_kernels.tile`) over the tiles that hold allowed
pairs. What is folded stays on chip from the first tile of a block to the last, and nothing but results is written. Gradients need three
orders of visits:

    query blocks outside      dq, and the gradients of row quantities, of offset tables and of what all pairs share
    key blocks outside        dk, dv (summed over the query heads of a group), and the gradients of column quantities
    heads inside              the gradient of an operand that varies over queries and keys, summed over the heads that share it
"""

import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.operands import LANES, Form, Window, add_gathered, block, column, form, line, matrix, row, spread, wide, window
from pallas_kernels.flash.schedule import EMPTY, FULL, PARTIAL, Schedule, schedule, unpack
from pallas_kernels.parts import At, Blocks, Cover, Spec
from pallas_kernels.tile import accumulator_dtype


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
    """

    specs: Blocks
    bq: int
    bk: int
    queries: int
    keys: int
    low: int
    contiguous: bool
    interpret: Any = False


class Inputs(NamedTuple):
    """What a tile reads: windows, and inside a kernel the refs to their blocks."""

    query: Any
    key: Any
    value: Any
    rows: Any
    positions: Any
    operands: Any


def fold_rows(plan: Plan, table: Cover, data, init: Callable, body: Callable, finish: Callable, rows=()):
    """Folds ``body(carry, q, k, v, rows, at, blocks, seed, masked) -> carry`` over the keys of every query.

    Args:
      table: the tile table of ``data``, [B or 1, K or 1, G or 1, nq, nk].
      data: arrays in the canonical layout, padded to whole blocks ('offset' tables by one block on either side): query [B, K, G, T, H],
        key [B, K, S, H], value [B, K, S, Hv] or None, operands, query_positions [B or 1, T], key_positions [B or 1, S], seed uint32 [2], origin int32 [2]
        (the batch element and key-value head of the whole call that come first here).
      init: ``init() -> carry`` of a query block, a pytree of [bq, X]; columns [bq, 1] reach ``body`` and ``finish`` repeated over 128 lanes.
      finish: ``finish(carry) -> results``, a pytree of [bq, X].
      rows: a pytree of [B, K, G, T, X].

    Returns the results as [B, K, G, T, X].
    """
    b, k, g, t, _ = data.query.shape
    carries = jax.eval_shape(init)

    def window(x):
        return _row_output((b, k, g), t, plan, x.dtype) if x.shape[1] == 1 else matrix(_like((b, k, g, t, x.shape[1]), x.dtype), "bkg", "i", plan.bq)

    def step(here, tile, outputs, carry):
        @pl.when(here.first)
        def _():
            _put(carry, init())

        load = partial(jax.tree.map, lambda ref: ref[...], carry)

        @_visited(here)
        def _(masked):
            _put(carry, body(load(), *tile(), masked))

        @pl.when(here.last)
        def _():
            jax.tree.map(_write, outputs, finish(load()))

    outputs = jax.tree.map(window, jax.eval_shape(finish, carries))
    outputs = _launch(plan, schedule(table), data, rows, "bkgs", step, outputs, jax.tree.map(_scratch, carries), "fold_rows")
    return jax.tree.map(_as_column, outputs)


def fold_keys(plan: Plan, table: Cover, data, body: Callable, rows, gradient_of):
    """Sums ``body(q, k, v, rows, at, blocks, seed, masked, transposed=...) -> (dq, dk, dv, drows, dblocks)`` over all tiles.

    Args:
      table, data, rows: as in :func:`fold_rows`.
      gradient_of: the rows that ``drows`` are the gradients of.

    Returns the gradients of query, key and value (in their dtypes), of ``gradient_of`` and of the inexact operands (in the accumulator's dtype), all
    shaped like the padded arrays.
    """
    chosen = [(n, form(x, spec), x.shape) for n, (x, spec) in enumerate(
        (x, spec) for x, spec in zip(jax.tree.leaves(data.operands), _specs(plan), strict=True) if jnp.issubdtype(x.dtype, jnp.inexact))]
    call = plan, data, body, rows
    (dq, drows), query_side = _query_side(*call, schedule(table), gradient_of, [c for c in chosen if c[1].kind in ("query", "whole", "offset")])
    (dk, dv), key_side = _key_side(*call, schedule(table, by_key=True), [c for c in chosen if c[1].kind == "key"])
    pairs = {c[0]: _pair_side(*call, schedule(table, varies=c[1].spec[:2]), c) for c in chosen if c[1].kind == "pair"}
    gradients = {**query_side, **key_side, **pairs}
    return dq, dk, dv, drows, [gradients[n] for n in range(len(chosen))]


def _query_side(plan, data, body, rows, timetable, gradient_of, chosen):
    """dq, drows and the gradients of operands that do not vary over keys (or by offset only), with query blocks outside."""
    b, k, g, t, h = data.query.shape
    dtype = accumulator_dtype(data.query.dtype)
    windows, sums = {}, {}
    for n, f, shape in chosen:
        if f.kind == "query":
            whole = _like((b, k, g, t, *f.extra), dtype)
            windows[n] = Window(whole, (None,) * 3 + (plan.bq, *f.extra), ("b", "k", "g", "i", *(None,) * len(f.extra))) if f.extra else _row_output((b, k, g), t, plan, dtype)
            sums[n] = pltpu.VMEM((plan.bq, *(f.extra or (LANES,))), dtype)
        else:
            block_shape = (1, 1, *f.extra) if f.kind == "whole" else (1, _lanes(shape[3]))
            windows[n] = Window(_like((b, k, g, *block_shape), dtype), (None,) * 3 + block_shape, ("b", "k", "g") + (None,) * len(block_shape))
    main = matrix(_like(data.query.shape, data.query.dtype), "bkg", "i", plan.bq), jax.tree.map(lambda x: _row_output((b, k, g), t, plan, x.dtype), gradient_of)
    main_sums = pltpu.VMEM((plan.bq, h), dtype), jax.tree.map(lambda x: pltpu.VMEM((plan.bq, LANES), x.dtype), gradient_of)

    def step(here, tile, outputs, scratch):
        (main, mine), (main_sums, sums) = outputs, scratch

        @pl.when(here.s == 0)
        def _():
            _zero([ref for n, ref in mine.items() if n not in sums])

        @pl.when(here.first)
        def _():
            _zero(scratch)

        @_visited(here)
        def _(masked):
            dq, _, _, drows, dblocks = body(*tile(), masked)
            jax.tree.map(_add, main_sums, (dq, drows))
            for n, f, _ in chosen:
                if f.kind == "offset":
                    add_gathered(mine[n], dblocks[n], here.offset)
                elif f.kind == "whole":
                    _add(mine[n], dblocks[n])
                else:
                    _add(sums[n], dblocks[n][:, 0] if f.extra else dblocks[n])

        @pl.when(here.last)
        def _():
            jax.tree.map(_write, main, main_sums)
            for n, ref in sums.items():
                _write(mine[n], ref)

    main, found = _launch(plan, timetable, data, rows, "bkgs", step, (main, windows), (main_sums, sums), "fold_keys_query_side")
    totals = {}
    for n, f, shape in chosen:
        total = found[n].sum(_shared_axes(f), keepdims=True)
        totals[n] = total[..., 0, :shape[3]] if f.kind == "offset" else total.reshape(shape)
    return jax.tree.map(_as_column, main), totals


def _key_side(plan, data, body, rows, timetable, chosen):
    """dk, dv and the gradients of operands that vary over keys alone, with key blocks outside and the heads of a group inside."""
    b, k, g, _, _ = data.query.shape
    s, dtype = data.key.shape[2], accumulator_dtype(data.query.dtype)
    windows = {}
    for n, f, _ in chosen:
        slots, inner = g if f.spec.group else 1, (plan.bk, *f.extra) if f.extra else (1, plan.bk)
        whole = (b, k, slots, s, *f.extra) if f.extra else (b, k, slots, 1, s)
        names = ("j",) + (None,) * len(f.extra) if f.extra else (None, "j")
        windows[n] = Window(_like(whole, dtype), (None, None, slots, *inner), ("b", "k", None, *names))
    given = [x for x in (data.key, data.value) if x is not None]
    main = [matrix(_like(x.shape, x.dtype), "bk", "j", plan.bk) for x in given]
    main_sums = [pltpu.VMEM((plan.bk, x.shape[3]), dtype) for x in given]

    def step(here, tile, outputs, sums):
        main, mine = outputs

        @pl.when(here.first & (here.g == 0))
        def _():
            _zero((sums, mine))

        @_visited(here)
        def _(masked):
            _, dk, dv, _, dblocks = body(*tile(), masked, transposed=True)
            jax.tree.map(_add, sums, [dk, dv][: len(sums)])
            for n, f, _ in chosen:
                _add(mine[n].at[here.g if f.spec.group else 0], dblocks[n][:, 0] if f.extra else row(dblocks[n]))

        @pl.when(here.last & (here.g == g - 1))
        def _():
            jax.tree.map(_write, main, sums)

    main, found = _launch(plan, timetable, data, rows, "bksg", step, (main, windows), main_sums, "fold_keys_key_side", by_key=True)
    totals = {n: found[n].sum(_shared_axes(f)[: 2 - f.spec[:2].count(True)], keepdims=True).reshape(shape) for n, f, shape in chosen}
    return (main[0], main[1] if len(main) > 1 else None), totals


def _pair_side(plan, data, body, rows, timetable, chosen):
    """The gradient of one operand that varies over queries and keys, with the heads that share it inside."""
    n, f, shape = chosen
    own = "".join(c for c, varies in zip("bkg", f.spec) if varies)
    shared = "".join(c for c in "bkg" if c not in own)

    def step(here, tile, output, _):
        @pl.when(_starts(here, shared) & (here.kind != EMPTY))
        def _():
            _zero(output)

        @_visited(here)
        def _(masked):
            _add(output, body(*tile(), masked)[4][n])

    output = window(_like(shape, accumulator_dtype(data.query.dtype)), f, plan.bq, plan.bk, False)
    return _launch(plan, timetable, data, rows, own + "s" + shared, step, output, (), "fold_keys_pair_side", zeroed=True)


# Launching ----------------------------------------------------------------------------------------------------------


class Here(NamedTuple):
    """A grid step inside a kernel: the head, the step, what the schedule says of it, and its place in offset tables."""

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


def _launch(plan: Plan, timetable: Schedule, data, rows, order: str, step: Callable, outputs, scratch, name: str, *,
            by_key: bool = False, zeroed: bool = False):
    """Runs ``step(here, tile, output refs, scratch refs)`` over a grid whose axes are ``order``: letters of 'bkgs', s the steps of a schedule.

    ``tile()`` reads what a tile function wants: (q, k, v, rows, at, blocks, seed). ``by_key``: the schedule has key blocks outside, and tiles are
    transposed. ``zeroed``: blocks that no step visits are to hold zeros.
    """
    b, k, g, t, _ = data.query.shape
    nq, nk = t // plan.bq, data.key.shape[2] // plan.bk
    by_batch, by_head = (n > 1 for n in timetable.steps.shape[:2])
    heads, length = timetable.steps.shape[1:]
    q_batched, k_batched = data.query_positions.shape[0] > 1, data.key_positions.shape[0] > 1

    def look_up(ids, steps):
        lists = (ids["b"] * heads if by_batch else 0) + (ids["k"] if by_head else 0)
        at = unpack(steps[lists * length + ids["s"]])
        i, j = (at.inner, at.outer) if by_key else (at.outer, at.inner)
        return {**ids, "i": i, "j": j, "kind": at.kind, "first": at.first, "last": at.last}

    def index(*args):
        return look_up(dict(zip(order, args)), args[4])

    leaves, structure = jax.tree.flatten(data.operands)
    forms = [form(x, spec) for x, spec in zip(leaves, _specs(plan), strict=True)]
    positions = None if plan.contiguous else (
        line(data.query_positions[:, None, None], ("b" if q_batched else None, None, None), "i", plan.bq, turned=not by_key),
        line(data.key_positions[:, None, None], ("b" if k_batched else None, None, None), "j", plan.bk, turned=by_key))
    inputs = Inputs(
        matrix(data.query, "bkg", "i", plan.bq), matrix(data.key, "bk", "j", plan.bk), None if data.value is None else matrix(data.value, "bk", "j", plan.bk),
        jax.tree.map(lambda x: line(x[..., 0], "bkg", "i", plan.bq, turned=not by_key) if x.shape[-1] == 1 else matrix(x, "bkg", "i", plan.bq), rows),
        positions, [window(x, f, plan.bq, plan.bk, by_key) for x, f in zip(leaves, forms)])
    read, inputs_tree = jax.tree.flatten(inputs)
    written, outputs_tree = jax.tree.flatten(outputs)
    kept, scratch_tree = jax.tree.flatten(scratch)
    inside = order[order.index("s") + 1:]  # what changes while an outer block stays; the rest is turned once for each of those
    turned = [n for n, w in enumerate(read) if w.turned and not set(inside) & set(w.place)]
    columns = [pltpu.VMEM((read[n].shape[-1], LANES), wide(read[n].array.dtype)) for n in turned]
    parts = (5, len(read), len(written) if zeroed else 0, len(written), len(kept), len(columns))

    def kernel(*refs):
        refs = iter(refs)
        scalars, ins, _, outs, kept, columns = ([next(refs) for _ in range(n)] for n in parts)
        steps, query_starts, key_starts, seed, origin = scalars
        at = look_up({c: pl.program_id(axis) for axis, c in enumerate(order)}, steps)
        query_start = query_starts[(at["b"] * nq if q_batched else 0) + at["i"]]
        key_start = key_starts[(at["b"] * nk if k_batched else 0) + at["j"]]
        here = Here(**at, offset=key_start - query_start - plan.low + 1)

        if turned:
            @pl.when(here.first & _starts(here, inside))
            def _():
                for ref, n in zip(columns, turned):
                    _put(ref, column(ins[n][...]))

        def load(n):
            if not read[n].turned:
                return ins[n][...]
            x = columns[turned.index(n)][:, :1] if n in turned else column(ins[n][...])
            return x.astype(read[n].array.dtype)

        def tile():
            offsets = {id(ref) for ref, f in zip(jax.tree.unflatten(inputs_tree, ins).operands, forms) if f.kind == "offset"}
            values = jax.tree.unflatten(inputs_tree, [None if id(ref) in offsets else load(n) for n, ref in enumerate(ins)])
            where = values.positions or (_consecutive(query_start, here.i, plan.bq, plan.queries, by_key),
                                         _consecutive(key_start, here.j, plan.bk, plan.keys, not by_key))
            refs = jax.tree.unflatten(inputs_tree, ins).operands
            blocks = [block(spread(ref, here.offset, plan.bq, plan.bk) if f.kind == "offset" else x, f, by_key)
                      for x, ref, f in zip(values.operands, refs, forms)]
            at_tile = At(origin[0] + here.b, (origin[1] + here.k) * g + here.g, *where)
            return (values.query, values.key, values.value, values.rows, at_tile, jax.tree.unflatten(structure, blocks), (seed[0], seed[1]))

        step(here, tile, jax.tree.unflatten(outputs_tree, outs), jax.tree.unflatten(scratch_tree, kept))

    counts = {"b": b, "k": k, "g": g, "s": timetable.count}
    arrays = [w.array for w in read]
    start = [jnp.zeros(w.array.shape, w.array.dtype) for w in written] if zeroed else []
    out = pl.pallas_call(
        kernel, [_like(w.array.shape, w.array.dtype) for w in written],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=tuple(counts[c] for c in order),
            in_specs=[w.spec(index) for w in read] + [pl.BlockSpec(memory_space=pl.ANY)] * len(start),
            out_specs=[w.spec(index) for w in written], scratch_shapes=kept + columns),
        input_output_aliases={5 + len(read) + n: n for n in range(len(start))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=tuple("parallel" if axis < order.index("s") else "arbitrary" for axis in range(4))),
        interpret=plan.interpret, name=name,
    )(timetable.steps.reshape(-1), data.query_positions[:, ::plan.bq].reshape(-1), data.key_positions[:, ::plan.bk].reshape(-1), data.seed, data.origin, *arrays, *start)
    return jax.tree.unflatten(outputs_tree, out)


def _consecutive(start, number, size: int, length: int, axis: int):
    """The positions of a block that starts at ``start``, -1 beyond ``length`` entries in all: along axis 0, [size, 1], or 1, [1, size]."""
    along = jax.lax.broadcasted_iota(jnp.int32, (1, size) if axis else (size, 1), axis)
    return start + along if length % size == 0 else jnp.where(number * size + along < length, start + along, -1)


def _visited(here: Here):
    """Decorator: runs ``visit(masked)`` unless the step is empty."""
    def run(visit):
        pl.when(here.kind == FULL)(partial(visit, False))
        pl.when(here.kind == PARTIAL)(partial(visit, True))
    return run


def _starts(here: Here, letters: str):
    """Whether the grid is at the beginning of all these axes."""
    return reduce(jnp.logical_and, (getattr(here, c) == 0 for c in letters), True)


def _specs(plan):
    return jax.tree.leaves(plan.specs, is_leaf=lambda x: isinstance(x, Spec))


def _shared_axes(f: Form):
    return tuple(axis for axis, varies in enumerate(f.spec[:3]) if not varies)


def _lanes(n: int) -> int:
    return n + LANES + -n % LANES


_like = jax.ShapeDtypeStruct


def _row_output(lead, length, plan, dtype) -> Window:
    return Window(_like((*lead, 1, length), dtype), (None,) * 3 + (1, plan.bq), ("b", "k", "g", None, "i"))


def _as_column(x):
    """[.., 1, T] as [.., T, 1]; matrices as they are."""
    return x.swapaxes(3, 4) if x.shape[3] == 1 else x


def _scratch(x):
    """Memory for [n, X]; a column fills whole lanes."""
    return pltpu.VMEM((x.shape[0], LANES if x.shape[1] == 1 else x.shape[1]), x.dtype)


def _put(refs, values):
    def put(ref, x):
        ref[...] = jnp.broadcast_to(x, ref.shape)
    jax.tree.map(put, refs, values)


def _add(ref, x):
    ref[...] += jnp.broadcast_to(x, ref.shape)


def _zero(refs):
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _write(ref, x):
    """Writes a matrix, or a column as a row; ``x`` a value or the memory that holds it."""
    if ref.shape[0] == 1 and x.shape[0] > 1:
        x = row(x[:, :1])
    ref[...] = x[...].astype(ref.dtype)
