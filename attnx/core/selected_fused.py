"""The ``pallas`` execution of the selected engine: the fused kernels of the pairs engine on a list of tiles that the table of chosen blocks writes.

The list is as long as the table, so neither work nor memory grows with the product of the lengths. A tile lies in one chosen block, or holds
several small ones; in the kernel the table then tells its pairs apart. Lists that are too long for a TPU's scalar memory together are worked off one by one.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnx.core import fused
from attnx.core.program import Data, Program, partition
from attnx.core.selected_gathered import Extra, Selected
from attnx.core.tiling import Tiling, cover, map_operands, widen, without_padding
from pallas_kernels import flash
from pallas_kernels.flash.entries import Choice
from pallas_kernels.flash.schedule import SCALARS, Listed
from pallas_kernels.parts import And, Similarity
from pallas_kernels.tiles import Tiles, choose_tiles, power

SMALLEST = {"tpu": 8, "gpu": 16}  # of a block: rows of the vector units, or of a matrix product
DTYPES = {"tpu": (jnp.float32, jnp.bfloat16), "gpu": (jnp.float32, jnp.bfloat16, jnp.float16)}


@dataclasses.dataclass(frozen=True)
class FusedSelected(fused.Fused):
    """Executes a program whose first mask is :class:`~attnx.core.selected_gathered.Chosen` on fused kernels; static and hashable.

    Attributes:
      gathered: the execution that serves second derivatives; its tiling has the block sizes.
    """

    gathered: Any = None

    def fold_rows(self, data: Data, init, body, finish, rows=(), *, differentiable: bool = False):
        """As :meth:`attnx.core.fused.Fused.fold_rows`."""
        if not differentiable:
            return super().fold_rows(data, init, body, finish, rows)

        def init_block(rows):  # of fewer rows than a tile, which start alike
            return jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (self.gathered.tiling.bq, x.shape[1])), init(rows))

        return self.gathered.fold_rows(data, init_block, body, finish, rows, differentiable=True)

    def _kernels(self, name: str, tiling: Tiling, data: Data):
        if self.tiles is not None:
            return partial(self._run_on_gpu, name, tiling)
        run, steps = partial(self._run, name, tiling), self._steps(tiling, data)
        for axis in (1, 0):  # heads inside batch elements
            if math.prod(steps[axis:]) > SCALARS and data.query.shape[axis] > 1:
                run = partial(_one_by_one, axis, self.program, name, run)
        return run

    def _steps(self, tiling: Tiling, data: Data):
        """A bound of what the schedule holds: over how many batch elements and heads it varies, and its length."""
        (b, k, g), table, specs = data.query.shape[:3], data.operands.mask[0], self.program.specs.mask
        nq, nk = data.query.shape[3] // tiling.bq, data.key.shape[2] // tiling.bk
        in_row = max(1, tiling.bq // self.gathered.tiling.bq) * max(1, self.gathered.tiling.bk // tiling.bk) * table.shape[6]
        by_batch = max(data.query_positions.shape[0], data.key_positions.shape[0]) > 1 or any(spec.batch for spec in specs)
        heads = k * g if any(spec.group for spec in specs) else k if any(spec.kv for spec in specs) else 1
        return b if by_batch else 1, heads, nq * min(in_row, nk) + max(nq, nk)

    def _plan(self, tiling: Tiling):
        """The static half of a launch, and whether blocks have scores."""
        program, sizes, blocks = self.program, self.program.sizes, self.gathered.tiling
        scored = bool(program.parts.scores) and isinstance(program.parts.scores[-1], Extra)
        number = sum(map(len, program.specs.scores))  # of the table among all operands; the scores come before it
        choice = Choice(blocks.bq, blocks.bk, number, number - 1 if scored else None)
        return flash.Plan(program.specs, tiling.bq, tiling.bk, sizes.queries, sizes.keys, sizes.offsets[0], program.contiguous, self.interpret, choice), scored

    def _run_on_gpu(self, name: str, tiling: Tiling, data: Data, *args):
        """A fold whose tiles lie in one chosen block each, and have a list for every head that chooses for itself."""
        program, blocks, operands = self.program, self.gathered.tiling, data.operands
        plan, scored = self._plan(tiling)

        def table(bq, bk):
            chosen = _by_tile(data.query.shape[3] // bq, blocks.bq, bq, operands.mask[0], fill=-1)
            return _listed(program, data, Tiling(bq, bk, 1), blocks, chosen)

        def whole(x, fill):  # powers of two of entries for every block of the padded queries
            more = -(-data.query.shape[3] // blocks.bq) - x.shape[5], power(x.shape[6]) - x.shape[6]
            return widen(widen(x, 5, more[0], constant_values=fill), 6, more[1], constant_values=fill)

        given = operands._replace(mask=(whole(operands.mask[0], -1), *operands.mask[1:]))
        if scored:
            given = given._replace(scores=(*operands.scores[:-1], (whole(operands.scores[-1][0], 0),)))
        return getattr(flash.gpu, name)(plan, self.tiles, table, data._replace(operands=given), *args)

    def _run(self, name: str, tiling: Tiling, data: Data, *args):
        program, blocks = self.program, self.gathered.tiling
        plan, scored = self._plan(tiling)
        by_tile = partial(_by_tile, data.query.shape[3] // tiling.bq, blocks.bq, tiling.bq)
        table = by_tile(data.operands.mask[0], fill=-1)
        run = partial(getattr(flash.tpu, name), plan, _listed(program, data, tiling, blocks, table))
        operands = data.operands._replace(mask=(table, *data.operands.mask[1:]))
        if not scored:
            return run(data._replace(operands=operands), *args)
        *before, (scores,) = operands.scores
        scores, pull = jax.vjp(partial(by_tile, fill=0), scores)
        result = run(data._replace(operands=operands._replace(scores=(*before, (scores,)))), *args)
        if name == "fold_rows":
            return result
        *others, gradients = result
        at = len(partition(before)[0])
        gradients[at], = pull(gradients[at].astype(scores.dtype))
        return *others, gradients


def _one_by_one(axis: int, program: Program, name: str, run, data: Data, *args):
    """A fold of kernels, batch element by batch element (``axis`` 0) or key-value head by key-value head (1)."""
    def fold(n):
        take = lambda x: lax.dynamic_slice_in_dim(x, n, 1, axis)
        positions = partial(jax.tree.map, lambda x: take(x) if axis == 0 and x.shape[0] > 1 else x)
        one = Data(*jax.tree.map(take, data[:3]), map_operands(lambda x, spec: take(x) if spec[axis] else x, data.operands, program.specs),
                   *positions((data.query_positions, data.key_positions)), data.seed, data.origin.at[axis].add(n))
        return run(one, *jax.tree.map(lambda x: x if callable(x) else take(x), args))

    results = lax.map(fold, jnp.arange(data.query.shape[axis], dtype=jnp.int32))
    together = lambda x: jnp.moveaxis(x, 0, axis).reshape(*x.shape[1: axis + 1], -1, *x.shape[axis + 2:])
    if name == "fold_rows":
        return jax.tree.map(together, results)
    *results, gradients = results
    return *jax.tree.map(together, results), [together(x) if spec[axis] else x.sum(0) for x, spec in zip(gradients, program.inexact_specs(data.operands))]


def _by_tile(tiles: int, block: int, tile: int, x, *, fill):
    """Canonical entries [B, K, G, 1, 1, blocks, M] by tile: [B, K, G, tiles, blocks of one, M]."""
    x, rows = jnp.repeat(x[:, :, :, 0, 0], max(1, block // tile), axis=3), max(1, tile // block)
    x = widen(x, 3, max(0, tiles * rows - x.shape[3]), constant_values=fill)[:, :, :, : tiles * rows]
    return x.reshape(*x.shape[:3], tiles, rows, x.shape[4])


def _listed(program: Program, data: Data, tiling: Tiling, blocks: Tiling, table) -> Listed:
    """The tiles of a table [B or 1, K or 1, G or 1, nq, rows, M], each as often as the table names a block in it."""
    in_tile, tiles_of, nk = max(1, tiling.bk // blocks.bk), max(1, blocks.bk // tiling.bk), data.key.shape[2] // tiling.bk
    named = table[..., None] // in_tile * tiles_of + jnp.arange(tiles_of, dtype=jnp.int32)
    named = jnp.where(table[..., None] < 0, nk, named).reshape(*table.shape[:4], -1)
    mask, specs = program.parts.mask, program.specs
    mask = mask.b if isinstance(mask, And) else None
    others = dataclasses.replace(program, parts=dataclasses.replace(program.parts, mask=mask), specs=specs._replace(mask=specs.mask[1:]))
    data = data._replace(operands=data.operands._replace(mask=data.operands.mask[1:]))
    return Listed(named, cover(others, data, tiling, named), in_tile * table.shape[4], nk)


def choose_fused(program: Program, data: Data, gathered: Selected) -> FusedSelected:
    """The executor of a call, or NotImplementedError that says what the kernels lack for it."""
    lacks, instead = "implementation='pallas': the kernels of the selected engine", "use 'gathered' or None"
    interpret, platform = fused.target()
    (bq, bk, _), (h, hv), dtype = gathered.tiling, (data.query.shape[-1], data.value.shape[-1]), data.query.dtype
    if platform not in SMALLEST:
        raise NotImplementedError(f"{lacks} are for TPU and GPU, the backend is {platform!r}; {instead} (attnx.core.fused.forced() emulates them)")
    if any(n != power(n, SMALLEST[platform]) for n in (bq, bk)):
        raise NotImplementedError(f"{lacks} take block_sizes that are powers of two and at least {SMALLEST[platform]}, got {(bq, bk)}; {instead}")
    if any(spec.offset for spec in program.flat_specs) and not program.contiguous:
        raise NotImplementedError(f"{lacks} read offset tables (relative position biases) at consecutive positions only; leave out query_positions and "
                                  f"key_positions, or {instead}")
    if hv == 1 or (h == 1 and platform == "gpu"):
        raise NotImplementedError(f"{lacks} take no values{' or heads' if platform == 'gpu' else ''} of size 1; {instead}")
    if interpret is False and dtype not in DTYPES[platform]:
        raise NotImplementedError(f"{lacks} compute in {', '.join(jnp.dtype(d).name for d in DTYPES[platform])}, not in {dtype}; {instead}")
    if platform == "tpu":
        fit = lambda most, size, length: min(most, max(128, size), power(length, 128))
        most = fused.default_sizes("flash", "tpu", data.query, data.value)
        tiling = Tiling(fit(most.bq, bq, program.sizes.queries), fit(most.bk, bk, program.sizes.keys), 1)
        return FusedSelected(without_padding(program, tiling), tiling, None, interpret, gathered)
    if any(isinstance(score, Similarity) for score in program.parts.scores) and h != power(h):
        raise NotImplementedError(f"{lacks} pad head sizes with zeros to a power of two from 16 on a GPU, which a similarity might mind; got head size {h}; {instead}")
    inside = [x for x in jax.tree.leaves(data.operands) if x.ndim > 5 and x is not data.operands.mask[0]]
    if interpret is False and len(inside) > any(isinstance(score, Extra) for score in program.parts.scores):
        raise NotImplementedError(f"{lacks} take no operands with axes of their own (None among an Operand's axes) on a GPU; {instead}")
    chosen = choose_tiles(fused.default_sizes("flash", "gpu", data.query, data.value), program.sizes.queries, program.sizes.keys, busy=True)
    chosen = Tiles(*(tile._replace(bq=min(tile.bq, bq), bk=min(tile.bk, bk), warps=4 if bq * bk < 4096 else tile.warps) for tile in chosen))
    (rows, keys), largest = chosen.rows[:2], chosen.largest
    padded = Tiling(max(rows, largest[0]), max(keys, largest[1]), 1)
    return FusedSelected(without_padding(program, padded), Tiling(rows, keys, 1), chosen, interpret, gathered)
