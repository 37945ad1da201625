"""Executions over a cache on fused kernels (:mod:`pallas_kernels.decode`), for TPU and for GPU, and the choice of an execution for a call."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core import fused
from attnx.core.cached import Cached, CachedData, banded, packed, packed_operand, tile_table
from attnx.core.program import Program
from attnx.core.tiling import Tiling, map_operands, widen
from pallas_kernels.decode import gpu, tpu
from pallas_kernels.decode.schedule import Work, share_out, unpack
from pallas_kernels.parts import Exponential, Similarity, Spec
from pallas_kernels.tiles import Tile, power

ROWS = 64  # of a tile on a GPU, at most
PROGRAMS = 528  # there at a time: four for each of an H200's processors


@dataclasses.dataclass(frozen=True)
class TpuCached(Cached):
    """Executes a program over a cache on a TPU kernel; static and hashable."""

    interpret: Any = False

    @property
    def tiling(self) -> Tiling:
        """A tile: the queries of all heads, in whole sublanes."""
        rows, sublanes = super().tiling.bq, 8 * max(1, 4 // self.program.sizes.dtype.itemsize)
        return Tiling(rows + -rows % sublanes, self.block, 1)

    def fold_segments(self, data: CachedData, init, body, finish, rows, axes):
        """As :meth:`Cached.fold_segments`."""
        sizes, columns = self.program.sizes, self.block * self.program.sizes.kv_heads
        count = sizes.heads * sizes.queries
        more, blocks = self.tiling.bq - count, -(-sizes.keys // self.block)
        tail = blocks * columns - sizes.keys * sizes.kv_heads
        some, every = tile_table(self.program, data, self.block)
        work = share_out(some, every, self.splits)
        flat = lambda x: None if x is None else x.reshape(x.shape[0], -1, x.shape[-1])
        pages = None if data.pages is None else self._pages(data, work)
        place = self._at(data.origin, 0, data.query_positions[0], jnp.zeros(self.block, jnp.int32))
        row = lambda x: widen(jnp.broadcast_to(x, (count, 1)).astype(jnp.int32), 0, more, constant_values=-1)[None]

        def operand(x, spec):
            if spec.offset:
                b = max(len(x), len(data.query_positions), len(data.key_positions))
                every = lambda x: jnp.broadcast_to(x, (b, *x.shape[1:]))
                x = jax.vmap(partial(banded, self.program))(every(x), every(data.query_positions), every(data.key_positions))
            x = jax.vmap(partial(packed_operand, self.program))(x.astype(jnp.int32) if x.dtype == bool else x)
            x = widen(x, 1, more, "edge") if x.shape[1] > 1 else x
            return widen(x, 2, tail, "edge") if x.shape[2] > 1 else x

        key_positions = jnp.arange(columns, dtype=jnp.int32)[None, None] // sizes.kv_heads
        if data.span is None:
            key_positions = widen(jnp.repeat(data.key_positions, sizes.kv_heads, 1)[:, None], 2, tail, constant_values=-1)
        given = tpu.Packed(
            widen(packed(data.query), 1, more), flat(data.key), flat(data.value), jax.tree.map(lambda x: widen(x, 1, more), rows),
            row(place.head), row(place.batch), row(np.arange(count)[:, None] // (count // sizes.kv_heads)),
            jnp.arange(columns, dtype=jnp.int32)[None, None] % sizes.kv_heads,
            widen(jnp.tile(data.query_positions, (1, sizes.heads))[..., None], 1, more, constant_values=-1),
            key_positions,
            map_operands(operand, data.operands, self.program.specs))

        def restored(carry, q, k, v, rows, at, blocks, seed, masked):
            blocks = jax.tree.map(lambda x, like: x != 0 if like.dtype == bool else x, blocks, data.operands)
            return body(carry, q, k, v, rows, at, blocks, seed, masked)

        plan = tpu.Plan(columns, self.splits, sizes.kv_heads, self.interpret)
        results, default = tpu.fold_rows(plan, work, pages, data.span, given, partial(init, None), restored, finish), finish(init(None))
        return jax.tree.map(lambda x: x[:, :count], results), jax.tree.map(lambda x: x[:count], default), work

    def _pages(self, data: CachedData, work: Work):
        """The pages of every item of the work, int32 [items, pages of a tile]; beyond the table, any."""
        item, many = unpack(work.items), self.block // data.key.shape[1]
        place = jnp.minimum(item.block[:, None] * many + jnp.arange(many, dtype=jnp.int32), data.pages.shape[1] - 1)
        return jnp.clip(data.pages[item.batch[:, None], place], 0, data.key.shape[0] - 1)


@dataclasses.dataclass(frozen=True)
class GpuCached(Cached):
    """Executes a program over a cache on a GPU kernel, the queries of a key-value head as rows; static and hashable."""

    interpret: Any = False

    @property
    def tiling(self) -> Tiling:
        """A tile: queries of one key-value head."""
        sizes = self.program.sizes
        return Tiling(min(ROWS, power(sizes.heads // sizes.kv_heads * sizes.queries)), self.block, 1)

    def fold_segments(self, data: CachedData, init, body, finish, rows, axes):
        """As :meth:`Cached.fold_segments`."""
        sizes, tiling = self.program.sizes, self.tiling
        groups = sizes.heads // sizes.kv_heads
        count = groups * sizes.queries
        more, tail = -count % tiling.bq, -sizes.keys % self.block
        some, every = tile_table(self.program, data, self.block)
        work = share_out(some, every, self.splits)
        pages = None if data.pages is None else jnp.clip(data.pages, 0, data.key.shape[0] - 1)
        length, many = data.key.shape[1], 0 if pages is None else pages.shape[1]

        def fold(x):  # [.., G, t, ..] -> [.., 1, rows, ..]
            return widen(x.reshape(*x.shape[:2], 1, count, *x.shape[4:]), 3, more, "edge")

        def operand(x, spec):
            if not spec.offset and (spec.group or spec.query):
                x = fold(jnp.broadcast_to(x, (*x.shape[:2], groups, sizes.queries, *x.shape[4:])))
            return widen(x, 4, tail, "edge") if spec.key else x

        def folded(spec):
            return spec if spec.offset else spec._replace(group=False, query=spec.group or spec.query)

        specs = jax.tree.map(folded, self.program.specs, is_leaf=lambda x: isinstance(x, Spec))
        tokens = lambda x: None if x is None else x.reshape(-1, *x.shape[2:])
        row = np.arange(count + more, dtype=np.int32)
        batch = row % sizes.queries // (sizes.queries // self.folded) if self.folded > 1 else np.zeros_like(row)
        lists = gpu.Lists(work, pages, jnp.asarray(np.minimum(row // sizes.queries, groups - 1)), jnp.asarray(batch))
        data = data._replace(
            query=fold(data.query), key=tokens(data.key), value=tokens(data.value), operands=map_operands(operand, data.operands, self.program.specs),
            query_positions=widen(jnp.tile(data.query_positions, (1, groups)), 1, more, constant_values=-1),
            key_positions=widen(data.key_positions, 1, tail, constant_values=-1))
        rows = jax.tree.map(lambda x: fold(x.reshape(x.shape[0], sizes.kv_heads, groups, sizes.queries, x.shape[2])), rows)
        plan = gpu.Plan(specs, tiling.bq, self.block, count, sizes.keys, sizes.offsets[0], False, self.interpret,
                        splits=self.splits, groups=groups, length=length, pages=many)
        tile = Tile(tiling.bq, self.block, 4, 3)
        results = gpu.fold_rows(plan, tile, lists, data, rows, partial(init, None), body, finish)
        results = jax.tree.map(lambda x: x[:, :, :count].reshape(len(x), -1, x.shape[3]), results)
        default = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (sizes.kv_heads * count, x.shape[1])), finish(init(None)))
        return results, default, work


def choose_cached(program: Program, data: CachedData, splits: int | None, block: int | None, folded: int = 1) -> Cached:
    """The executor of a call by XLA, its blocks and shares chosen."""
    sizes, (rows, page, merges) = program.sizes, _shape(program, data)
    columns = min(8192, max(1024, 2**18 // rows))  # what caches hold
    block = min(sizes.keys, block or page * max(1, columns // (sizes.kv_heads * page)))
    return Cached(program, block, splits or (1 if jax.default_backend() == "cpu" or not merges else 16), folded)


def choose_fused(program: Program, data: CachedData, splits: int | None, block: int | None, folded: int = 1) -> Cached:
    """The same by a kernel, or NotImplementedError that says what it lacks for the call."""
    interpret, platform = _check_kernel(program, data)
    return (_for_tpu if platform == "tpu" else _for_gpu)(program, data, interpret, splits, block, folded)


def _shape(program: Program, data: CachedData):
    """Rows of a tile, tokens of a page, and whether results merge."""
    rows, page = program.sizes.heads * program.sizes.queries, 1 if data.pages is None else data.key.shape[1]
    return rows, page, isinstance(program.parts.weights, Exponential)


def _for_tpu(program, data, interpret, splits, block, folded):
    sizes, (rows, page, merges) = program.sizes, _shape(program, data)
    whole = math.lcm(page, tpu.LANES // math.gcd(tpu.LANES, sizes.kv_heads))  # tokens of whole columns
    size = max(data.key.shape[-1], data.value.shape[-1]) * max(x.dtype.itemsize for x in (data.query, data.key, data.value))
    default = fused.default_sizes("decode", "tpu", data.query, data.value)
    columns = min(default.most, max(default.least, default.pairs // rows), default.memory // size)
    tokens = columns // sizes.kv_heads if data.pages is None else min(columns // sizes.kv_heads, 16 * page)
    block = block or max(1, tokens // whole) * whole
    if block < sizes.keys and block % whole:
        raise NotImplementedError(f"implementation='pallas': expected block_size a multiple of {whole}, got {block}")
    return TpuCached(program, min(block, sizes.keys), splits or (2 if merges else 1), folded, interpret)


def _for_gpu(program, data, interpret, splits, block, folded):
    merges, sizes, size = _shape(program, data)[2], program.sizes, max(data.key.shape[-1], data.value.shape[-1]) * data.query.dtype.itemsize
    if block is not None and block != power(block):
        raise NotImplementedError(f"implementation='pallas': the GPU kernel wants a block_size that is a power of two and at least 16, got {block}")
    block = min(block or min(128, max(32, power(2**15 // size + 1) // 2)), power(sizes.keys))
    executor = GpuCached(program, block, 1, folded, interpret)
    programs = sizes.kv_heads * -(-sizes.heads // sizes.kv_heads * sizes.queries // executor.tiling.bq)
    return dataclasses.replace(executor, splits=splits or (max(1, PROGRAMS // programs) if merges else 1))


def _check_kernel(program: Program, data: CachedData):
    """How the kernel is to be run, and on what platform, if it can serve the call."""
    interpret, platform = fused.target()
    lacks = "implementation='pallas': the decode kernel"
    if platform not in fused.PLATFORMS:
        raise NotImplementedError(f"{lacks} is for TPU and GPU, the backend is {platform!r}; use 'blockwise' or None (attnx.core.fused.forced() emulates it)")
    dtypes = (jnp.float32, jnp.bfloat16) + (jnp.float16,) * (platform == "gpu")
    if interpret is False and data.query.dtype not in dtypes:
        names = " and ".join(jnp.dtype(d).name for d in dtypes)
        raise NotImplementedError(f"{lacks} computes in {names} on this platform, not in {data.query.dtype}; use 'blockwise'")
    if data.value.shape[-1] == 1:
        raise NotImplementedError(f"{lacks} takes no values of size 1; use 'blockwise'")
    operands = list(zip(jax.tree.leaves(data.operands), program.flat_specs))
    if any(spec.key and x.ndim > 5 for x, spec in operands) or (platform == "gpu" and interpret is False and any(x.ndim > 5 for x, _ in operands)):
        raise NotImplementedError(f"{lacks} takes no operands that {'' if platform == 'gpu' else 'vary over keys and '}have axes of their own (None among an "
                                  "Operand's axes); hand over their entries one by one, or use 'blockwise'")
    if platform == "gpu" and any(isinstance(score, Similarity) for score in program.parts.scores) and data.query.shape[-1] != power(data.query.shape[-1]):
        raise NotImplementedError(f"{lacks} pads head sizes with zeros to a power of two from 16, which a similarity might mind; got head size "
                                  f"{data.query.shape[-1]}; use 'blockwise'")
    return interpret, platform
