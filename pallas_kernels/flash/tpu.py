"""Folding tiles on a TPU core: one kernel that sweeps the keys of each query block, and its transposes.

:func:`fold_rows` and :func:`fold_keys` run any tile function (see :mod:`pallas_kernels.tile`) over the tiles that hold allowed
pairs. What is folded stays on chip from the first tile of a block to the last, and nothing but results is written. Gradients need three
orders of visits:

    query blocks outside      dq, and the gradients of row quantities, of offset tables and of what all pairs share
    key blocks outside        dk, dv (summed over the query heads of a group), and the gradients of column quantities
    heads inside              the gradient of an operand that varies over queries and keys, summed over the heads that share it
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as _like
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.entries import add_scores
from pallas_kernels.flash.launch import Plan, entries, flat_forms, launch, put, starts, visited
from pallas_kernels.flash.operands import LANES, Form, Window, add_gathered, matrix, padded_offsets, row, row_output, window
from pallas_kernels.flash.schedule import EMPTY, Listed, schedule
from pallas_kernels.parts import Cover
from pallas_kernels.tile import accumulator_dtype


def fold_rows(plan: Plan, table: Cover | Listed, data, init: Callable, body: Callable, finish: Callable, rows=()):
    """Folds ``body(carry, q, k, v, rows, at, blocks, seed, masked) -> carry`` over the keys of every query.

    Args:
      table: the tile table of ``data``, [B or 1, K or 1, G or 1, nq, nk], or a listed one.
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

    def result(x):
        return row_output(_like((b, k, g, t), x.dtype), plan) if x.shape[1] == 1 else matrix(_like((b, k, g, t, x.shape[1]), x.dtype), "bkg", "i", plan.bq)

    def step(here, tile, outputs, carry):
        @pl.when(here.first)
        def _():
            put(carry, init())

        load = partial(jax.tree.map, lambda ref: ref[...], carry)

        @visited(here)
        def _(masked):
            put(carry, body(load(), *tile(), masked))

        @pl.when(here.last)
        def _():
            jax.tree.map(_write, outputs, finish(load()))

    outputs = jax.tree.map(result, jax.eval_shape(finish, carries))
    outputs = launch(plan, schedule(table, varies=(True,) * 3), data, rows, "bkgs", step, outputs, jax.tree.map(_scratch, carries), "fold_rows",
                     repeated=True)
    return jax.tree.map(_as_column, outputs)


def fold_keys(plan: Plan, table: Cover | Listed, data, body: Callable, rows, gradient_of):
    """Sums ``body(q, k, v, rows, at, blocks, seed, masked, transposed=...) -> (dq, dk, dv, drows, dblocks)`` over all tiles.

    Args:
      table, data, rows: as in :func:`fold_rows`.
      gradient_of: the rows that ``drows`` are the gradients of.

    Returns the gradients of query, key and value (in their dtypes), of ``gradient_of`` and of the inexact operands (in the accumulator's dtype), all
    shaped like the padded arrays.
    """
    leaves = jax.tree.leaves(data.operands)
    inexact = [(f, x.shape) for x, f in zip(leaves, flat_forms(plan, leaves)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    chosen = [(n, *operand) for n, operand in enumerate(inexact)]
    call = plan, data, body, rows
    (dq, drows), query_side = _query_side(*call, schedule(table, varies=(True,) * 3), gradient_of, [c for c in chosen if c[1].kind not in ("key", "pair")])
    (dk, dv), key_side = _key_side(*call, schedule(table, by_key=True), [c for c in chosen if c[1].kind == "key"])
    pairs = {c[0]: _pair_side(*call, schedule(table, varies=c[1].spec[:3]), c) for c in chosen if c[1].kind == "pair"}
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
            matrices = Window(whole, (None,) * 3 + (plan.bq, *f.extra), ("b", "k", "g", "i", *(None,) * len(f.extra)))
            windows[n] = matrices if f.extra else row_output(whole, plan)
            sums[n] = pltpu.VMEM((plan.bq, *(f.extra or (LANES,))), dtype)
        elif f.kind == "entry":
            windows[n] = entries(_like((b, k, g, *shape[3:]), dtype), f._replace(spec=(True,) * 3))
            sums[n] = pltpu.VMEM(shape[4:], dtype)
        else:
            block_shape = (1, 1, *f.extra) if f.kind == "whole" else (1, padded_offsets(shape[3]))
            windows[n] = Window(_like((b, k, g, *block_shape), dtype), (None,) * 3 + block_shape, ("b", "k", "g") + (None,) * len(block_shape))
    main = (matrix(_like(data.query.shape, data.query.dtype), "bkg", "i", plan.bq),
            jax.tree.map(lambda x: row_output(_like((b, k, g, t), x.dtype), plan), gradient_of))
    main_sums = pltpu.VMEM((plan.bq, h), dtype), jax.tree.map(lambda x: pltpu.VMEM((plan.bq, LANES), x.dtype), gradient_of)

    def step(here, tile, outputs, scratch):
        (main, mine), (main_sums, sums) = outputs, scratch

        @pl.when(here.s == 0)
        def _():
            _zero([ref for n, ref in mine.items() if n not in sums])

        @pl.when(here.first)
        def _():
            _zero(scratch)

        @visited(here)
        def _(masked):
            dq, _, _, drows, dblocks = body(*tile(), masked)
            jax.tree.map(_add, main_sums, (dq, drows))
            for n, f, _ in chosen:
                if f.kind == "offset":
                    add_gathered(mine[n], dblocks[n], here.offset)
                elif f.kind == "entry":
                    add_scores(sums[n], dblocks[n], plan.choice, here.table, here.j, plan.bk)
                elif f.kind == "whole":
                    _add(mine[n], dblocks[n])
                else:
                    _add(sums[n], dblocks[n][:, 0] if f.extra else dblocks[n])

        @pl.when(here.last)
        def _():
            jax.tree.map(_write, main, main_sums)
            for n, ref in sums.items():
                _write(mine[n], ref)

    main, found = launch(plan, timetable, data, rows, "bkgs", step, (main, windows), (main_sums, sums), "fold_keys_query_side")
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

        @visited(here)
        def _(masked):
            _, dk, dv, _, dblocks = body(*tile(), masked, transposed=True)
            jax.tree.map(_add, sums, [dk, dv][: len(sums)])
            for n, f, _ in chosen:
                _add(mine[n].at[here.g if f.spec.group else 0], dblocks[n][:, 0] if f.extra else row(dblocks[n]))

        @pl.when(here.last & (here.g == g - 1))
        def _():
            jax.tree.map(_write, main, sums)

    main, found = launch(plan, timetable, data, rows, "bksg", step, (main, windows), main_sums, "fold_keys_key_side", by_key=True)
    totals = {n: found[n].sum([axis for axis in _shared_axes(f) if axis < 2], keepdims=True).reshape(shape) for n, f, shape in chosen}
    return (main[0], main[1] if len(main) > 1 else None), totals


def _pair_side(plan, data, body, rows, timetable, chosen):
    """The gradient of one operand that varies over queries and keys, with the heads that share it inside."""
    n, f, shape = chosen
    own = "".join(c for c, varies in zip("bkg", f.spec) if varies)
    shared = "".join(c for c in "bkg" if c not in own)

    def step(here, tile, output, _):
        @pl.when(starts(here, shared) & (here.first | (here.kind != EMPTY)))
        def _():
            _zero(output)

        @visited(here)
        def _(masked):
            _add(output, body(*tile(), masked)[4][n])

    output = window(_like(shape, accumulator_dtype(data.query.dtype)), f, plan.bq, plan.bk, False)
    return launch(plan, timetable, data, rows, own + "s" + shared, step, output, (), "fold_keys_pair_side", zeroed=True)


def _shared_axes(f: Form):
    return tuple(axis for axis, varies in enumerate(f.spec[:3]) if not varies)


def _as_column(x):
    """[.., 1, T] as [.., T, 1]; matrices as they are."""
    return x.swapaxes(3, 4) if x.shape[3] == 1 else x


def _scratch(x):
    """Memory for [n, X]; a column fills whole lanes."""
    return pltpu.VMEM((x.shape[0], LANES if x.shape[1] == 1 else x.shape[1]), x.dtype)


def _add(ref, x):
    ref[...] = jnp.broadcast_to(x, ref.shape) + ref[...]  # in this order: the other makes backward kernels of a v5e up to 11% longer


def _zero(refs):
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _write(ref, x):
    """Writes a matrix, or a column as a row; ``x`` a value or the memory that holds it."""
    if ref.shape[0] == 1 and x.shape[0] > 1:
        x = row(x[:, :1])
    ref[...] = x[...].astype(ref.dtype)
