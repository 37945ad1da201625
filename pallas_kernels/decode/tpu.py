"""Folding the tiles of a cache on a TPU core: the queries of all heads are the rows of a tile, the tokens of all heads its columns.

The cache [B, L, K, H] is read as [B, L K, H], which is how it lies in memory. A matrix unit takes a block of keys about as long to load as to multiply
with 128 rows, so a decoder's few rows leave it idle whichever head they belong to; columns of other heads are padding to a row, and what
that costs hides behind the reading. Pages are windows of their own onto the pool, placed by a prefetched table and fetched together.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compat import results_like
from pallas_kernels.decode.schedule import Work, unpack
from pallas_kernels.parts import At

LANES = 128
SCALARS = 1 << 17  # in scalar memory, half of it


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a launch.

    Attributes:
      columns: of a tile, tokens times key-value heads; a multiple of 128, or all there are.
      splits: shares of the work, the parallel axis of the grid.
      kv_heads: key-value heads.
      interpret: as for ``pallas_call``.
    """

    columns: int
    splits: int
    kv_heads: int
    interpret: Any = False


class Packed(NamedTuple):
    """What the tiles of a call read; R rows are padded to whole sublanes, C columns to whole tiles.

    Attributes:
      query: [B, R, H].
      key, value: [B, L K, H] and [B, L K, Hv], or pages [P, p K, H] and [P, p K, Hv]; value may be None.
      rows: a pytree of [B, R, X].
      head, batch, owner: int32 [1, R, 1], a row's query head, batch element (added to the tile's) and key-value head (-1: padding).
      column: int32 [1, 1, columns of a tile], a column's key-value head.
      query_positions: int32 [B or 1, R, 1].
      key_positions: int32 [B or 1, 1, C]; or, where a span says which, [1, 1, columns of a tile], the number of each column's token in the tile.
      operands: a pytree of [B or 1, R or 1, C or 1, *None axes].
    """

    query: Any
    key: Any
    value: Any
    rows: Any
    head: Any
    batch: Any
    owner: Any
    column: Any
    query_positions: Any
    key_positions: Any
    operands: Any


def fold_rows(plan: Plan, work: Work, pages, span, packed: Packed, init: Callable, body: Callable, finish: Callable):
    """Folds ``body(carry, q, k, v, rows, at, blocks, seed, masked) -> carry`` over the tiles of every segment (see :mod:`pallas_kernels.decode.schedule`).

    Args:
      pages: int32 [items of the work, pages of a tile], the pages of every tile, each one that exists; None for a contiguous cache.
      span: int32 [B or 1, 2], (first, end): slot j of a sequence holds position first + j, if that is below the end. None: ``packed.key_positions`` say.
      init: ``init() -> carry``, a pytree of [R, X]; columns [R, 1] reach ``body`` and ``finish`` repeated over 128 lanes.
      finish: ``finish(carry) -> results``, a pytree of [R, X].

    Returns the results of the segments as [S + B - 1, R, X]; of segments that hold no tile, anything.
    """
    _check_scalars(work, pages)
    b, length = packed.query.shape[0], packed.key.shape[1]  # beyond the end of an array a tile holds anything, and 0 * NaN is no 0
    carries = jax.eval_shape(init)
    results, results_tree = jax.tree.flatten(jax.eval_shape(finish, carries))
    scalars = {"items": work.items, "share": jnp.stack([work.count, work.share])}
    scalars |= {name: x.reshape(-1) for name, x in (("pages", pages), ("span", span)) if x is not None}

    def number(p, n, refs):
        """Which item of the list a grid step has, and the scalars by name."""
        given = dict(zip(scalars, refs))
        return p * given["share"][1] + n, given

    def place(p, n, refs):
        item, given = number(p, n, refs)
        return unpack(given["items"][item])

    def spec(x, axis=None):
        """The tile of an array; ``axis``, its columns, is cut."""
        shape = [n if a != axis else plan.columns for a, n in enumerate(x.shape)]

        def index(p, n, *refs):
            at = place(p, n, refs)
            return tuple(at.batch if a == 0 and x.shape[0] > 1 else at.block if a == axis else 0 for a in range(x.ndim))

        return pl.BlockSpec((None, *shape[1:]), index)

    def page(x, i):
        def index(p, n, *refs):
            item, given = number(p, n, refs)
            return given["pages"][item * pages.shape[1] + i], 0, 0

        return pl.BlockSpec((None, *x.shape[1:]), index)

    def segment(x):
        return pl.BlockSpec((None, *x.shape), lambda p, n, *refs: (p + place(p, n, refs).batch, 0, 0))

    def cache(x):
        if x is None:
            return None
        return [(x, spec(x, 1))] if pages is None else [(x, page(x, i)) for i in range(pages.shape[1])]

    whole = partial(jax.tree.map, lambda x: (x, spec(x)))
    along = lambda x: (x, spec(x, 2 if x.shape[2] > 1 else None))
    reads = Packed(whole(packed.query), cache(packed.key), cache(packed.value), whole(packed.rows),
                   whole(packed.head), whole(packed.batch), whole(packed.owner), whole(packed.column),
                   whole(packed.query_positions), (along if span is None else whole)(packed.key_positions), jax.tree.map(along, packed.operands))
    pairs, reads_tree = jax.tree.flatten(reads, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], pl.BlockSpec))
    kept, kept_tree = jax.tree.flatten(jax.tree.map(lambda x: pltpu.VMEM((x.shape[0], LANES if x.shape[1] == 1 else x.shape[1]), x.dtype), carries))

    def kernel(*refs):
        refs = iter(refs)
        counts = len(scalars), len(pairs), len(results), len(kept)
        prefetched, *others = ([next(refs) for _ in range(n)] for n in counts)
        read, out, carry = (jax.tree.unflatten(tree, x) for tree, x in zip((reads_tree, results_tree, kept_tree), others))
        p, n = pl.program_id(0), pl.program_id(1)
        (item, given), at = number(p, n, prefetched), place(p, n, prefetched)
        (count, share), other = (given["share"][0], given["share"][1]), lambda m: unpack(given["items"][m]).batch != at.batch
        live = item < count
        first = live & ((n == 0) | other(jnp.maximum(item - 1, 0)))
        last = live & ((n == share - 1) | (item + 1 >= count) | other(item + 1))

        @pl.when(first)
        def _():
            _put(carry, init())

        def visit(masked):
            key = read.key_positions[...]
            if span is not None:
                row = 2 * at.batch if span.shape[0] > 1 else 0
                key = key + given["span"][row] + at.block * (plan.columns // plan.kv_heads)
                key = jnp.where(key < given["span"][row + 1], key, -1)
            if plan.kv_heads > 1:
                key = jnp.where(read.owner[...] == read.column[...], key, -1)
            where = At(at.batch + read.batch[...], read.head[...], read.query_positions[...], key)
            blocks = jax.tree.map(lambda ref: ref[...], read.operands)
            k = _joined(read.key, None, packed.query.dtype)
            v = _joined(read.value, length - at.block * plan.columns if pages is None and length % plan.columns else None, packed.query.dtype)
            rows = jax.tree.map(lambda ref: ref[...], read.rows)
            _put(carry, body(jax.tree.map(lambda ref: ref[...], carry), read.query[...], k, v, rows, where, blocks, None, masked))

        if plan.kv_heads > 1:
            pl.when(live)(partial(visit, True))
        else:
            pl.when(live & at.full)(partial(visit, False))
            pl.when(live & ~at.full)(partial(visit, True))

        @pl.when(last)
        def _():
            jax.tree.map(_write, out, finish(jax.tree.map(lambda ref: ref[...], carry)))

    arrays = [x for x, _ in pairs]
    out = pl.pallas_call(
        kernel, results_like([jax.ShapeDtypeStruct((plan.splits + b - 1, *x.shape), x.dtype) for x in results], arrays),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(plan.splits, work.share), in_specs=[s for _, s in pairs],
            out_specs=[segment(x) for x in results], scratch_shapes=kept),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")), interpret=plan.interpret, name="decode_fold_rows",
    )(*scalars.values(), *arrays)
    return jax.tree.unflatten(results_tree, out)


def _check_scalars(work, pages):
    needed = work.items.size + (0 if pages is None else pages.size)
    if needed > SCALARS:
        raise NotImplementedError(f"implementation='pallas': {needed} tiles and pages exceed the {SCALARS} that scalar memory holds; use a larger block_size, "
                                  "larger pages, or 'blockwise'")


def _joined(refs, left, dtype):
    """The keys or values of a tile as one matrix; all but its first ``left`` rows (None: no row) are zero."""
    if refs is None:
        return None
    x = refs[0][...] if len(refs) == 1 else jnp.concatenate([ref[...] for ref in refs], 0)
    x = x.astype(dtype)
    return x if left is None else jnp.where(jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0) < left, x, 0)


def _put(refs, values):
    """Writes a pytree of values, columns to all lanes."""
    def write(ref, x):
        ref[...] = jnp.broadcast_to(x, ref.shape)

    jax.tree.map(write, refs, values)


def _write(ref, x):
    ref[...] = x[:, :ref.shape[1]].astype(ref.dtype)
