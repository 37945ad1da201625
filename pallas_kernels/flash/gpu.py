"""Folding tiles on a GPU by Pallas' Triton route: one program a block, its sums in registers, and no atomic operations.

:func:`fold_rows` and :func:`fold_keys` run any tile function (see :mod:`pallas_kernels.tile`) over the tiles that hold allowed pairs, which a program
finds in its block's list: whole tiles first, then those that need a mask. Gradients need three orders of visits:

    a program a query block     dq, and the gradients of row quantities and of what all pairs share
    a program a key block       dk, dv (summed over the query heads of a group), and the gradients of column quantities
    a program a tile, or a      the gradient of an operand that varies over pairs, summed over the heads that share it; of an offset table, summed
    diagonal of tiles           along the diagonal as well, whose sum of tiles XLA then sums entry by entry
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as _like
from jax import lax

from pallas_kernels.flash.gpu_launch import Here, Output, Plan, launch
from pallas_kernels.flash.gpu_quick import quickened
from pallas_kernels.flash.launch import flat_forms
from pallas_kernels.flash.schedule import lists, spread_out
from pallas_kernels.tile import accumulator_dtype
from pallas_kernels.tiles import Tile, Tiles, power
from pallas_kernels.triton import store


class Uniform(NamedTuple):
    """A carry as it starts: the same number throughout, so that a kernel may hold it wider."""

    shape: tuple
    dtype: Any
    number: float


def fold_rows(plan: Plan, tiles: Tiles, table: Callable, data, init: Callable, body: Callable, finish: Callable, rows=()):
    """Folds ``body(carry, q, k, v, rows, at, blocks, seed, masked) -> carry`` over the keys of every query.

    Args:
      plan: ``bq`` and ``bk`` are what ``data`` was padded to; positions that are consecutive count from 0.
      table: ``table(bq, bk)``, the tile table of ``data`` for tiles of that size, [B or 1, K or 1, G or 1, nq, nk], or a listed one.
      data: arrays in the canonical layout, padded to whole blocks ('offset' tables by one block on either side): query [B, K, G, T, H],
        key [B, K, S, H], value [B, K, S, Hv] or None, operands, query_positions [B or 1, T], key_positions [B or 1, S], seed uint32 [2], origin int32 [2]
        (the batch element and key-value head of the whole call that come first here).
      init: ``init() -> carry`` of a query block, a pytree of [bq, X], each the same number throughout.
      finish: ``finish(carry) -> results``, a pytree of [bq, X].
      rows: a pytree of [B, K, G, T, X].

    Returns the results as [B, K, G, T, X].
    """
    results, body = jax.eval_shape(finish, jax.eval_shape(init)), quickened(body, plan.interpret)

    def step(carry, reader, here, *tile):
        return body(carry, *tile)

    return _sweep_keys(plan, tiles.rows, table, data, rows, uniform(init), step, finish, results, "fold_rows")


def uniform(init: Callable):
    """``init()`` as a pytree of :class:`Uniform`."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(lambda x: Uniform(_widened(x.shape), x.dtype, x.ravel()[0].item()), init())


def begin(start):
    """The carry that such a pytree stands for, inside a program."""
    return jax.tree.map(lambda x: jnp.full(x.shape, x.number, x.dtype), start, is_leaf=lambda x: isinstance(x, Uniform))


def fold_keys(plan: Plan, tiles: Tiles, table: Callable, data, body: Callable, rows, gradient_of):
    """Sums ``body(q, k, v, rows, at, blocks, seed, masked, transposed=...) -> (dq, dk, dv, drows, dblocks)`` over all tiles.

    Args:
      plan, table, data, rows: as in :func:`fold_rows`.
      gradient_of: the rows that ``drows`` are the gradients of.

    Returns the gradients of query, key and value (in their dtypes), of ``gradient_of`` and of the inexact operands (in the accumulator's dtype), all
    shaped like the padded arrays.
    """
    leaves = jax.tree.leaves(data.operands)
    chosen = [(n, f, x.shape) for n, (x, f) in enumerate(
        (x, f) for x, f in zip(leaves, flat_forms(plan, leaves)) if jnp.issubdtype(x.dtype, jnp.inexact))]
    call = plan, table, data, quickened(body, plan.interpret), rows
    (dq, drows), query_side = _query_side(*call, tiles.queries, gradient_of, [c for c in chosen if c[1].kind in ("query", "whole", "entry")])
    (dk, dv), key_side = _key_side(*call, tiles.keys, [c for c in chosen if c[1].kind == "key"])
    pairs = {c[0]: (_offset_side if c[1].kind == "offset" else _pair_side)(*call, tiles.pairs, c) for c in chosen if c[1].kind in ("pair", "offset")}
    gradients = {**query_side, **key_side, **pairs}
    return dq, dk, dv, drows, [gradients[n] for n in range(len(chosen))]


def _sweep_keys(plan, tile: Tile, table, data, rows, start, body, finish, results, name):
    """A fold over the keys of each query block. ``start``: a pytree of :class:`Uniform`; ``results``: what a block yields, [n, *rest], n rows or 1."""
    b, k, g, t, _ = data.query.shape
    nq = t // tile.bq

    def program(reader, ids, outputs):
        step, g, k, b = ids
        here = Here(b, k, g, nq - 1 - step)  # under a causal mask the longest go first
        queries = reader.queries(here)

        def visit(j, carry, masked):
            at = here._replace(j=j)
            return body(carry, reader, at, *reader.join(at, queries, reader.keys(at)), masked)

        found = finish(reader.sweep(here, here.i, visit, begin(start)))
        jax.tree.map(lambda ref, x, result: store(ref, result, x), outputs, found, results)

    def output(x):
        n, *rest = x.shape
        return Output(_like((b, k, g, nq * n, *rest), x.dtype), (None, None, None, *_widened(x.shape)),
                      lambda step, g, k, b: (b, k, g, nq - 1 - step, *(0,) * len(rest)))

    return launch(plan, tile, data, rows, lists(table(tile.bq, tile.bk)), (nq, g, k, b), program, jax.tree.map(output, results), name)


def _query_side(plan, table, data, body, rows, tile: Tile, gradient_of, chosen):
    """dq, drows and the gradients of operands that do not vary over keys."""
    dtype = accumulator_dtype(data.query.dtype)
    blocks = {n: _like((1, shape[6]) if f.kind == "entry" else (tile.bq if f.kind == "query" else 1, 1, *f.extra), dtype) for n, f, shape in chosen}
    results = (_like((tile.bq, data.query.shape[-1]), data.query.dtype), jax.tree.map(lambda x: _like((tile.bq, 1), x.dtype), gradient_of), blocks)
    start = jax.tree.map(lambda x: Uniform(_widened(x.shape), dtype, 0), results)

    def step(carry, reader, here, *tile):
        dq, _, _, drows, dblocks = body(*tile)
        mine = {n: jnp.where(reader.chosen(here), dblocks[n], 0) if f.kind == "entry" else dblocks[n] for n, f, _ in chosen}
        return jax.tree.map(jnp.add, carry, (dq, drows, mine))

    dq, drows, found = _sweep_keys(plan, tile, table, data, rows, start, step, lambda carry: carry, results, "fold_keys_query_side")
    for n, f, shape in chosen:
        if f.kind == "entry":  # of a block of queries, from that of its tiles
            tiles = found[n].shape[3], plan.choice.bq // tile.bq
            x = jnp.pad(found[n], [(0, 0)] * 3 + [(0, shape[5] * tiles[1] - tiles[0]), (0, 0)])
            found[n] = x.reshape(*x.shape[:3], shape[5], tiles[1], shape[6]).sum(4)
    shared = {n: [3] * (f.kind == "whole") + _shared_axes(f) for n, f, _ in chosen}
    return (dq, drows), {n: found[n].sum(shared[n], keepdims=True).reshape(shape) for n, _, shape in chosen}


def _key_side(plan, table, data, body, rows, tile: Tile, chosen):
    """dk, dv and the gradients of operands that vary over keys alone; the heads of a group one after the other, tiles transposed."""
    b, k, groups, _, _ = data.query.shape
    s, dtype = data.key.shape[2], accumulator_dtype(data.query.dtype)
    given = [x for x in (data.key, data.value) if x is not None]
    own = {n: f for n, f, _ in chosen if f.spec.group}
    common = {n: f for n, f, _ in chosen if not f.spec.group}

    def zeros(forms):
        return {n: jnp.zeros((tile.bk, 1, *f.extra), dtype) for n, f in forms.items()}

    def program(reader, ids, outputs):
        j, k, b = ids
        main, operands = outputs

        def head(g, sums):
            here = Here(b, k, g, 0, j)
            keys = reader.keys(here)

            def visit(i, carry, masked):
                at = here._replace(i=i)
                _, dk, dv, _, dblocks = body(*reader.join(at, reader.queries(at), keys), masked, transposed=True)
                found = [dk, dv][:len(given)], {n: dblocks[n] for n in common}, {n: dblocks[n] for n in own}
                return jax.tree.map(jnp.add, carry, found)

            *sums, mine = reader.sweep(here, j, visit, (*sums, zeros(own)))
            for n, x in mine.items():
                operands[n][(g, *(slice(None),) * x.ndim)] = x
            return tuple(sums)

        sums = [jnp.zeros((tile.bk, power(x.shape[-1])), dtype) for x in given], zeros(common)
        sums, totals = lax.fori_loop(0, groups, head, sums)
        for ref, array, x in zip(main, given, sums):
            store(ref, array, x)
        for n, x in totals.items():
            operands[n][(0, *(slice(None),) * x.ndim)] = x

    outputs = [Output(x, (None, None, tile.bk, power(x.shape[-1])), lambda j, k, b: (b, k, j, 0)) for x in given]
    slots = {n: (groups if f.spec.group else 1, f.extra) for n, f, _ in chosen}
    operands = {n: Output(_like((b, k, g, s, 1, *extra), dtype), (None, None, g, tile.bk, 1, *extra), lambda j, k, b, zeros=(0,) * (1 + len(extra)): (b, k, 0, j, *zeros))
                for n, (g, extra) in slots.items()}
    main, found = launch(plan, tile, data, rows, lists(table(tile.bq, tile.bk), by_key=True), (s // tile.bk, k, b), program, (outputs, operands),
                         "fold_keys_key_side", transposed=True)
    totals = {n: found[n].sum([axis for axis in _shared_axes(f) if axis < 2], keepdims=True).reshape(shape) for n, f, shape in chosen}
    return (main[0], main[1] if len(main) > 1 else None), totals


def _pair_side(plan, table, data, body, rows, tile: Tile, chosen):
    """The gradient of an operand that varies over queries and keys, a program a tile."""
    _, f, shape = chosen
    dtype, some = accumulator_dtype(data.query.dtype), _united(table(tile.bq, tile.bk), f)
    output = Output(_like(shape, dtype), (None, None, None, tile.bq, tile.bk, *f.extra), lambda j, i, g, k, b: (b, k, g, i, j, *(0,) * len(f.extra)))
    bounds = jnp.zeros(some.shape, jnp.int32), some.astype(jnp.int32)
    return _sum_tiles(plan, data, body, rows, tile, chosen, bounds, lambda i, j, step: (i, j), output)


def _offset_side(plan, table, data, body, rows, tile: Tile, chosen):
    """The gradient of an offset table, a program a diagonal of tiles."""
    _, f, shape = chosen
    m = min(tile.bq, tile.bk)
    dtype, some = accumulator_dtype(data.query.dtype), _united(table(m, m), f)
    *lead, nq, nk = some.shape
    diagonals = nq + nk - 1
    i = jnp.arange(nq, dtype=jnp.int32)[:, None]
    diagonal = jnp.arange(nk, dtype=jnp.int32) - i + nq - 1
    low = jnp.full((*lead, 1, diagonals), nq, jnp.int32).at[..., 0, diagonal].min(jnp.where(some, i, nq))
    high = jnp.zeros((*lead, 1, diagonals), jnp.int32).at[..., 0, diagonal].max(jnp.where(some, i + 1, 0))
    output = Output(_like((*shape[:3], diagonals, m, m), dtype), (None, None, None, None, m, m), lambda d, _, g, k, b: (b, k, g, d, 0, 0))
    summed = _sum_tiles(plan, data, body, rows, tile._replace(bq=m, bk=m), chosen, (low, high), lambda _, d, i: (i, i + d - (nq - 1)), output)
    line = _overlapped(_diagonal_sums(summed))
    first = plan.bq - plan.low - nq * m + 1  # of the line, in the padded table
    return lax.pad(line, jnp.zeros((), dtype), [(0, 0, 0)] * 3 + [(first, shape[3] - first - line.shape[3], 0)])


def _sum_tiles(plan, data, body, rows, tile: Tile, chosen, bounds, place, output):
    """Sums one operand's tile gradients over the heads that share it and the steps of a cell, from ``bounds[0][cell]`` to ``bounds[1][cell]``.

    ``place(*cell, step) -> (i, j)``.
    """
    n, f, _ = chosen
    sizes = data.query.shape[:3]
    shared = math.prod(sizes[axis] for axis in _shared_axes(f))

    def program(reader, ids, ref):
        second, first, *own = ids
        own = own[::-1]
        low, high = (x[(*(place if x.shape[axis] > 1 else 0 for axis, place in enumerate(own)), first, second)] for x in reader.refs.lists)
        steps = jnp.maximum(high - low, 1)

        def visit(m, total):
            head, step = lax.div(m, steps), low + lax.rem(m, steps)
            here = []
            for axis in (2, 1, 0):
                here.append(own[axis] if f.spec[axis] else lax.rem(head, jnp.int32(sizes[axis])))
                head = head if f.spec[axis] else lax.div(head, jnp.int32(sizes[axis]))
            at = Here(*here[::-1], *place(first, second, step))
            return total + body(*reader.join(at, reader.queries(at), reader.keys(at)), True)[4][n]

        ref[...] = lax.fori_loop(0, shared * (high - low), visit, jnp.zeros(ref.shape, ref.dtype))

    grid = (*bounds[0].shape[:2:-1], *(size if varies else 1 for size, varies in zip(sizes[::-1], f.spec[2::-1])))
    return launch(plan, tile, data, rows, bounds, grid, program, output, "fold_keys_pair_side")


def _diagonal_sums(x):
    """[.., m, m] summed along diagonals: entry c is the sum of (a, b) with m - 1 + b - a = c. Row a from below, moved a places right."""
    *lead, m, _ = x.shape
    x = jnp.pad(x[..., ::-1, :], [(0, 0)] * (len(lead) + 1) + [(0, m)]).reshape(*lead, 2 * m * m)
    return x[..., : m * (2 * m - 1)].reshape(*lead, m, 2 * m - 1).sum(-2)


def _overlapped(x):
    """Lines [.., n, 2 m - 1] that start m apart, added up: [.., (n + 1) m]."""
    *lead, n, length = x.shape
    m = (length + 1) // 2
    x = jnp.pad(x, [(0, 0)] * (len(lead) + 1) + [(0, 1)]).reshape(*lead, n, 2, m)
    after, before = ([(0, 0)] * len(lead) + [pad, (0, 0)] for pad in ((0, 1), (1, 0)))
    return (jnp.pad(x[..., 0, :], after) + jnp.pad(x[..., 1, :], before)).reshape(*lead, (n + 1) * m)


def _united(table, f):
    """Which tiles may hold an allowed pair for some head that shares the operand, [B or 1, K or 1, G or 1, nq, nk]."""
    return spread_out(table).some.any(tuple(_shared_axes(f)), keepdims=True)


def _shared_axes(f) -> list[int]:
    return [axis for axis, varies in enumerate(f.spec[:3]) if not varies]


def _widened(shape):
    """A block [n, X] as wide as a kernel holds it; columns and blocks of operands as they are."""
    return (shape[0], power(shape[1])) if len(shape) == 2 and shape[1] > 1 else tuple(shape)
