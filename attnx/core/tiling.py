"""Cutting a call into tiles: block sizes, padding, which tiles hold allowed pairs, and how blocks are read and gradients added.

The tile table says of each (query block, key block) whether every pair is allowed, some may be, or none is. It comes from interval
arithmetic on positions and mask operands (:meth:`pallas_kernels.parts.Mask.block`), so static and traced masks take the same path,
and costs one entry a tile. A run-time list of the tiles worth visiting follows from it: full ones first, then partial ones. Where the
mask limits how far a query sees, a single tile that slides along with the block is wide enough for all.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnx.core.checks import check_block_sizes, describe
from attnx.core.compat import vary, varying_axes
from attnx.core.program import Data, Program, Spec
from pallas_kernels.flash.schedule import Visits, visits
from pallas_kernels.parts import At, Blocks, Cover, Range

WIDEST = 1024  # how far tiles that slide may see: the wider, the more of a full tile on a grid is gone for a mask


class Tiling(NamedTuple):
    """Static tile sizes: ``bq`` queries by ``bk`` keys of ``lanes`` key-value heads (with their groups) at a time."""

    bq: int
    bk: int
    lanes: int


def choose_tiling(program: Program, data: Data, block_sizes=None) -> Tiling:
    """Tile sizes for a call: given ones, or what was fastest at its shape class.

    Two tiles of 512x512 at a time keep the cores busy and share what a step costs besides; smaller tiles come in larger numbers. Heads that differ in
    what their mask allows go one by one, for only what none of those evaluated together sees can be skipped.
    """
    bq, bk = (512, 512) if block_sizes is None else check_block_sizes(block_sizes)
    check_products(program, data, block_sizes and (bq, bk))
    alone = any(spec.kv for spec in program.specs.mask)
    return _tiling(data, bq, bk, bk, 1 if alone else 2 * 512 * 512)


def choose_sliding(program: Program, data: Data) -> tuple[Tiling, tuple[int, int]] | None:
    """Blocks for tiles that slide, and how many positions before and after its own a query sees; None where tiles on a grid serve better.

    The smaller the block, the less of its tile is hidden; 128 rows still feed the cores well.
    """
    before, after = program.parts.mask.span() if program.contiguous and program.parts.mask is not None else (None, None)
    if before is None or after is None or before + after > WIDEST or program.parts.products.blocks != (1, 1):
        return None
    return _tiling(data, 128, 128, 128 + before + after, 2 * 512 * 512), (before, after)


def check_products(program: Program, data: Data, tile, argument: str = "block_sizes"):
    """That a tile holds whole blocks of what the products of the call scale together, or all there is; None is one that does."""
    lengths = data.query.shape[3], data.key.shape[2]
    for size, block, length in zip(tile or (), program.parts.products.blocks, lengths):
        if size % block and size < length:
            raise ValueError(f"{argument}: expected multiples of the blocks {program.parts.products.blocks} that products={describe(program.parts.products)} "
                             f"scale together, got {tuple(tile)}")


def _tiling(data: Data, bq: int, bk: int, width: int, pairs: int) -> Tiling:
    """Blocks no longer than the call, of as many heads at a time as have ``pairs`` pairs together in tiles of ``width`` keys; at least one."""
    _, k, g, t, _ = data.query.shape
    s = data.key.shape[2]
    together = pairs // max(1, g * min(bq, t) * min(width, s))
    return Tiling(min(bq, t), min(bk, s), max([n for n in range(1, k + 1) if k % n == 0 and n <= together], default=1))


def without_padding(program: Program, tiling: Tiling) -> Program:
    """The program, told that no position is padding where that is known: by default positions in whole blocks."""
    whole = program.sizes.queries % tiling.bq == 0 and program.sizes.keys % tiling.bk == 0
    return dataclasses.replace(program, parts=dataclasses.replace(program.parts, real=program.contiguous and whole))


def widen(x, axis: int, more, mode: str = "constant", **kwargs):
    """Pads one axis by ``more`` at its end, or by ``(before, after)``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = more if isinstance(more, tuple) else (0, more)
    return jnp.pad(x, widths, mode=mode, **kwargs) if any(widths[axis]) else x


def pad(program: Program, data: Data, queries: int, keys: int) -> Data:
    """Pads queries and keys to multiples; padded positions are -1, padded operands repeat their last entry (any value is legal there)."""
    more_q, more_k = -data.query.shape[3] % queries, -data.key.shape[2] % keys

    def operand(x, spec: Spec):
        x = widen(x, 3, more_q, "edge") if spec.query else x
        return widen(x, 4, more_k, "edge") if spec.key else x

    return data._replace(
        query=widen(data.query, 3, more_q), key=widen(data.key, 2, more_k),
        value=None if data.value is None else widen(data.value, 2, more_k),
        operands=map_operands(operand, data.operands, program.specs),
        query_positions=widen(data.query_positions, 1, more_q, constant_values=-1),
        key_positions=widen(data.key_positions, 1, more_k, constant_values=-1))


def pad_to_blocks(program: Program, data: Data, tiling: Tiling, tile: Tiling | None = None) -> Data:
    """Pads to whole blocks, and offset tables by one tile (of another size, if given) on each side, for the bands of a corner tile reach that far."""
    tile = tiling if tile is None else tile
    data = pad(program, data, tiling.bq, tiling.bk)
    return data._replace(operands=map_operands(
        lambda x, spec: widen(x, 3, (tile.bq, tile.bk), "edge") if spec.offset else x, data.operands, program.specs))


def unpad_operand(x, like, spec: Spec, tiling: Tiling):
    """The gradient of a padded operand as that of the operand: padding repeated its edges, and no allowed pair reads it."""
    return x[..., tiling.bq: x.shape[-1] - tiling.bk] if spec.offset else x[tuple(slice(n) for n in like.shape)]


def map_operands(function, operands: Blocks, specs: Blocks) -> Blocks:
    """``function(array, spec)`` over the operands of every part."""
    leaves, structure = jax.tree.flatten(operands)
    return jax.tree.unflatten(structure, [function(x, spec) for x, spec in zip(leaves, jax.tree.leaves(specs, is_leaf=_is_spec), strict=True)])


def pad_rows(rows, tiling: Tiling):
    """Pads a pytree of [B, K, G, T, X] to whole query blocks."""
    return jax.tree.map(lambda x: widen(x, 3, -x.shape[3] % tiling.bq), rows)


# The tile table -----------------------------------------------------------------------------------------------------


def _extent(x, axis, block):
    """Smallest and largest value of each block along an axis."""
    shape = x.shape[:axis] + (x.shape[axis] // block, block) + x.shape[axis + 1:]
    x = x.reshape(shape)
    return x.min(axis + 1), x.max(axis + 1)


def cover(program: Program, data: Data, tiling: Tiling, blocks=None) -> Cover:
    """The tile table of padded data: booleans [B or 1, K or 1, G or 1, nq, nk], or [.., nq, L] at key ``blocks`` of each query block, shaped so, alone."""
    limit = jnp.iinfo(jnp.int32)
    pick = (lambda x: x) if blocks is None else lambda x: jnp.take_along_axis(x, blocks, axis=4, mode="clip")

    def positions(p, block):
        blocks = p.reshape(p.shape[0], -1, block)
        real = blocks >= 0
        extent = Range(jnp.where(real, blocks, limit.max).min(-1), jnp.where(real, blocks, limit.min).max(-1))
        return extent, real.any(-1), real.all(-1)

    query, q_some, q_every = positions(data.query_positions, tiling.bq)
    key, k_some, k_every = positions(data.key_positions, tiling.bk)
    column = lambda x: x[:, None, None, :, None]
    row = lambda x: pick(x[:, None, None, None, :])
    some, every = column(q_some) & row(k_some), column(q_every) & row(k_every)
    mask = program.parts.mask
    if mask is None:
        return Cover(some, every)

    def extent(x, spec):
        if spec.offset:
            raise NotImplementedError("mask: an 'offset' operand cannot decide which pairs are allowed; use positions (at.key - at.query)")
        low = high = x
        if spec.query:
            low, high = _extent(low, 3, tiling.bq)[0], _extent(high, 3, tiling.bq)[1]
        if spec.key:
            low, high = pick(_extent(low, 4, tiling.bk)[0]), pick(_extent(high, 4, tiling.bk)[1])
        return Range(low, high)

    ranges = [extent(x, spec) for x, spec in zip(data.operands.mask, program.specs.mask)]
    certain = mask.block(Range(column(query.low), column(query.high)), Range(row(key.low), row(key.high)), *ranges)
    return Cover(some & certain.some, every & certain.every)


def sweep(program: Program, data: Data, tiling: Tiling, reach=None, *, by_key: bool = False) -> tuple[Tiling, Data, Visits]:
    """The tiles of a pass over all query blocks (or key blocks), the data padded to them, and which ones each block visits: by the first key (or query).

    ``reach``: how many positions before and after its own a query sees at the most, in a call of default positions. Then each block visits one tile.
    """
    if reach is None:
        data = pad_to_blocks(program, data, tiling)
        found = visits(cover(program, data, tiling), lanes=tiling.lanes, by_key=by_key)
        return tiling, data, found._replace(order=found.order * (tiling.bq if by_key else tiling.bk))
    lengths = (data.query.shape[3], tiling.bq), (data.key.shape[2], tiling.bk)
    (length, block), (other, inner) = lengths[::-1] if by_key else lengths
    end = other + -other % inner
    width = min(block + sum(reach) + -sum(reach) % 64, end)
    tile = tiling._replace(bq=width) if by_key else tiling._replace(bk=width)
    first = jnp.clip(jnp.arange(0, length, block, dtype=jnp.int32) - reach[by_key], 0, end - width)
    one = jnp.ones((1, 1, first.size), jnp.int32)
    return tile, pad_to_blocks(program, data, tiling, tile), Visits(first[None, None, :, None], 0 * one, one)


# Reading blocks, adding gradients -----------------------------------------------------------------------------------


class Where(NamedTuple):
    """A tile's place: batch element, chunk of key-value heads, first query, first key (traced)."""

    b: Any
    c: Any
    query: Any
    key: Any


def _slice(x, starts, sizes):
    return lax.dynamic_slice(x, [jnp.asarray(s, jnp.int32) for s in starts], sizes)


def _add(total, block, starts):
    starts = [jnp.asarray(s, jnp.int32) for s in starts]
    return lax.dynamic_update_slice(total, lax.dynamic_slice(total, starts, block.shape) + block, starts)


def cut(x, starts, sizes):
    """A block of ``x`` with the axes of size None removed."""
    return _slice(x, starts, [1 if s is None else s for s in sizes]).reshape([s for s in sizes if s is not None])


def rows_block(x, where: Where, tiling: Tiling):
    """[B, K, G, T, X] -> [lanes, G, bq, X]."""
    return cut(x, (where.b, where.c * tiling.lanes, 0, where.query, 0), (None, tiling.lanes, x.shape[2], tiling.bq, x.shape[4]))


def add_rows_block(total, block, where: Where, tiling: Tiling):
    """Adds [lanes, G, bq, X] to rows [B, K, G, T, X]."""
    return _add(total, block[None], (where.b, where.c * tiling.lanes, 0, where.query, 0))


def by_token(x):
    """[B, K, G, T, X] as [B, T, N, X]: how a call brings queries and takes outputs, so that neither need be laid out anew."""
    b, k, g, t, size = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(b, t, k * g, size)


def by_head(x, groups: int):
    """The inverse of :func:`by_token`."""
    b, t, n, size = x.shape
    return jnp.moveaxis(x.reshape(b, t, n // groups, groups, size), 1, 3)


def token_rows_block(x, where: Where, tiling: Tiling, groups: int):
    """[B, T, N, X] -> [lanes, G, bq, X]."""
    heads = tiling.lanes * groups
    return by_head(_slice(x, (where.b, where.query, where.c * heads, 0), (1, tiling.bq, heads, x.shape[3])), groups)[0]


def put_token_rows_block(total, block, where: Where, tiling: Tiling):
    """Writes [lanes, G, bq, X] to rows [B, T, N, X]."""
    block = by_token(block[None])
    return lax.dynamic_update_slice(total, block, [jnp.asarray(s, jnp.int32) for s in (where.b, where.query, where.c * block.shape[2], 0)])


def keys_block(x, where: Where, tiling: Tiling):
    """[B, K, S, X] -> [lanes, bk, X]."""
    return cut(x, (where.b, where.c * tiling.lanes, where.key, 0), (None, tiling.lanes, tiling.bk, x.shape[3]))


def at_block(data: Data, where: Where, tiling: Tiling):
    """The logical positions of a tile, [bq, 1] and [1, bk]."""
    def get(p, start, size):
        return cut(p, (where.b if p.shape[0] > 1 else 0, start), (None, size))

    return (get(data.query_positions, where.query, tiling.bq)[:, None],
            get(data.key_positions, where.key, tiling.bk)[None, :])


def _window(x, spec: Spec, where: Where, tiling: Tiling):
    """Start and size of an operand's block in each axis; an offset table is left whole."""
    kv = tiling.lanes if spec.kv else 1
    starts = [where.b if spec.batch else 0, where.c * tiling.lanes if spec.kv else 0, 0]
    sizes = [1, kv, x.shape[2]]
    if spec.offset:
        return starts + [0], sizes + [x.shape[3]]
    starts += [where.query if spec.query else 0, where.key if spec.key else 0]
    sizes += [tiling.bq if spec.query else 1, tiling.bk if spec.key else 1]
    return starts + [0] * (x.ndim - 5), sizes + list(x.shape[5:])


def _diagonals(bands, rows, columns):
    """Toeplitz: entry (a, b) is ``bands[..., rows - 1 + b - a]``; bands [..., rows + columns - 1]. Copies and reshapes, no gather."""
    length = rows + columns - 1
    lead = bands.shape[:-1]
    x = jnp.broadcast_to(jnp.pad(bands, [(0, 0)] * len(lead) + [(0, 1)])[..., None, :], (*lead, rows, length + 1))
    x = x.reshape(*lead, rows * (length + 1))[..., : rows * length].reshape(*lead, rows, length)
    return x[..., rows - 1:]  # row a of the skewed square is the bands shifted by -a


def _bands(program: Program, positions, where: Where, tiling: Tiling):
    """How to read an offset table at a tile: a differentiable function table [..., L] -> [..., bq, bk]."""
    query, key = positions
    low = program.sizes.offsets[0] - tiling.bq  # the table was padded by one block on the left
    if program.contiguous:
        start = key[0, 0] - query[0, 0] - (tiling.bq - 1) - low
        return lambda bands: _diagonals(bands, tiling.bq, tiling.bk), start, tiling.bq + tiling.bk - 1
    index = key - query - low
    return lambda table: jnp.take(table, jnp.clip(index, tiling.bq, table.shape[-1] - tiling.bk - 1), axis=-1), None, None


def operand_block(program: Program, x, spec: Spec, positions, where: Where, tiling: Tiling):
    """The block of a canonical operand, [lanes or 1, G or 1, bq or 1, bk or 1, *None axes]."""
    starts, sizes = _window(x, spec, where, tiling)
    if not spec.offset:
        return _slice(x, starts, sizes)[0]
    expand, start, length = _bands(program, positions, where, tiling)
    if start is not None:
        starts, sizes = [*starts[:3], start], [*sizes[:3], length]
    return expand(_slice(x, starts, sizes)[0])


def add_operand_block(program: Program, total, spec: Spec, block, positions, where: Where, tiling: Tiling):
    """Adds a per-head block gradient [lanes, G, bq or 1, ...] to the gradient of the whole operand."""
    dropped = tuple(axis for axis, varies in enumerate((spec.kv, spec.group)) if not varies)
    block = block.sum(dropped, keepdims=True) if dropped else block
    starts, sizes = _window(total, spec, where, tiling)
    if spec.offset:
        expand, start, length = _bands(program, positions, where, tiling)
        if start is not None:
            starts, sizes = [*starts[:3], start], [*sizes[:3], length]
        (block,) = jax.vjp(expand, vary(jnp.zeros(sizes[1:], block.dtype), varying_axes(block)))[1](block)
    return _add(total, block[None], starts)


def over_lanes(function, program: Program, data: Data, where: Where, tiling: Tiling):
    """Vectorises ``function(q, k, v, rows, at, blocks)`` of one head over the tile's key-value heads and their groups.

    ``rows`` is any pytree of [lanes, G, bq, X]; keys and values are shared by a group; operands as their specs say.
    """
    specs, groups = program.specs, data.query.shape[2]

    def axes(flag):
        return map_operands(lambda _, s: 0 if flag(s) else None, jax.tree.map(lambda _: 0, specs, is_leaf=_is_spec), specs)

    def run(q, k, v, rows, positions, blocks: Blocks):
        squeeze = lambda x, s: x.reshape([n for n, keep in zip(x.shape, (s.kv, s.group)) if keep] + list(x.shape[2:]))
        blocks = map_operands(squeeze, blocks, specs)

        def head(q, k, v, rows, kv, group, blocks):
            return function(q, k, v, rows, At(data.origin[0] + where.b, kv * groups + group, *positions), blocks)

        head = jax.vmap(head, in_axes=(0, None, None, 0, None, 0, axes(lambda s: s.group)))
        head = jax.vmap(head, in_axes=(0, 0, 0, 0, 0, None, axes(lambda s: s.kv)))
        kv = data.origin[1] + where.c * tiling.lanes + jnp.arange(tiling.lanes, dtype=jnp.int32)
        return head(q, k, v, rows, kv, jnp.arange(groups, dtype=jnp.int32), blocks)

    return run


def _is_spec(x):
    return isinstance(x, Spec)
