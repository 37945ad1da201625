"""The ``pallas`` execution: folds on fused kernels (:mod:`pallas_kernels.flash`), for TPU and for GPU.

The folds of :class:`attnx.core.blockwise.Blockwise` with the carry on chip: what is folded comes from :mod:`attnx.core.operations` either way, and tiles
are skipped or left unmasked by the same table. Results are written once, in the dtype of the inputs.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnx.core.blockwise import Blockwise
from attnx.core.checks import check_choice, describe
from attnx.core.program import Data, Program, partition
from attnx.core.tiling import Tiling, check_products, cover, pad_rows, pad_to_blocks, unpad_operand, without_padding
from pallas_kernels import flash, native
from pallas_kernels.parts import Similarity, Softmax
from pallas_kernels.tiles import Tiles, choose_tiles, look_up, power

PLATFORMS = ("tpu", "gpu")
PADDING = 1.05  # times as many pairs, at the most, for the sake of larger tiles
_forced = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(interpret: Any = True, platform: str = "tpu"):
    """Within it kernels serve, by name or as what None picks, whatever the backend. What jit has traced before stays as it is.

    Args:
      interpret: True emulates the kernels in XLA, a ``pltpu.InterpretParams`` simulates a TPU core (slow, for tests), False compiles for the platform:
        with ``jax.jit(...).trace(...).lower(lowering_platforms=("tpu",))``, or ``("cuda",)``, also where there is none.
      platform: whose kernels, "tpu" or "gpu".

    >>> import attnx, jax.numpy as jnp
    >>> x = jnp.ones((1, 16, 2, 8))
    >>> with attnx.core.fused.forced():
    ...     attnx.attention(x, x, x, implementation="pallas").shape
    (1, 16, 2, 8)
    """
    check_choice("platform", platform, PLATFORMS)
    token = _forced.set((interpret, platform))
    try:
        yield
    finally:
        _forced.reset(token)


def target() -> tuple[Any, str]:
    """How and for what platform kernels are to be run here: what :func:`forced` says, or compiled for the backend."""
    return _forced.get() or (False, jax.default_backend())


def check_native(implementation: str, kernels: str):
    """Raises NotImplementedError where ``kernels`` in Triton itself cannot be run or compiled."""
    interpret, platform = target()
    if platform != "gpu" or interpret is not False:
        backend = f"{platform!r}{' emulated' * bool(interpret)}"
        raise NotImplementedError(f"implementation={implementation!r}: {kernels} in Triton itself are for a GPU, the backend is {backend}; use 'pallas' or None")
    native.check_installed()


def prefer(implementation: str | None, kernels: Callable, otherwise: Callable):
    """``kernels()`` where they are named or, with no implementation named, serve the call on the platform at hand; else ``otherwise()``."""
    if implementation in ("pallas", "triton"):
        return kernels()
    if implementation is None and target()[1] in PLATFORMS:
        try:
            return kernels()
        except NotImplementedError:  # what kernels lack matters to those alone who name them
            pass
    return otherwise()


def default_sizes(kernel: str, platform: str, *arrays, length: int = 0):
    """The entry of the table of sizes for a kernel on the device at hand, the widest of some arrays [.., H] (or None), and a length (see ``look_up``)."""
    chosen = jax.config.jax_default_device
    chosen = chosen if isinstance(chosen, jax.Device) else jax.devices()[0]
    device = chosen.device_kind if chosen.platform == platform else ""
    arrays = [x for x in arrays if x is not None]
    return look_up(f"{kernel}, {platform}", device, max(x.shape[-1] for x in arrays), max(x.dtype.itemsize for x in arrays), length)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Executes a program on fused kernels; static and hashable.

    Attributes:
      tiling: the tiles of a forward fold.
      tiles: those of all kernels on a GPU; None on a TPU, where gradients have the same.
      interpret: as for ``pallas_call``.
    """

    program: Program
    tiling: Tiling
    tiles: Tiles | None = None
    interpret: Any = False

    def maximum(self, x):
        """The largest entry."""
        return jnp.max(x, initial=0)

    def stored(self, x):
        """A result as it is kept: in the dtype of the query."""
        return x.astype(self.program.sizes.dtype)

    def fold_rows(self, data: Data, init, body, finish, rows=(), *, differentiable: bool = False):
        """As :meth:`Blockwise.fold_rows`, which also serves where derivatives of the fold are wanted (second derivatives)."""
        if differentiable:
            return Blockwise(self.program, self.tiling).fold_rows(data, init, body, finish, rows, differentiable=True)
        t = data.query.shape[3]
        data, rows = pad_to_blocks(self.program, data, self.tiling), pad_rows(rows, self.tiling)
        results = self._kernels("fold_rows", self.tiling, data)(data, partial(init, None), body, finish, rows)
        return jax.tree.map(lambda x: x[:, :, :, :t], results)

    def fold_keys(self, data: Data, body, rows, gradient_of):
        """As :meth:`Blockwise.fold_keys`, with the gradients of query, key and value in their own dtypes."""
        program, tiling = self.program, self.tiling if self.tiles is None else Tiling(*self.tiles.largest, 1)
        (t, s), unpadded = (data.query.shape[3], data.key.shape[2]), partition(data.operands)[0]
        data, rows, gradient_of = pad_to_blocks(program, data, tiling), pad_rows(rows, tiling), pad_rows(gradient_of, tiling)
        dq, dk, dv, drows, doperands = self._kernels("fold_keys", tiling, data)(data, body, rows, gradient_of)
        dq, drows = jax.tree.map(lambda x: x[:, :, :, :t], (dq, drows))
        dk, dv = jax.tree.map(lambda x: x[:, :, :s], (dk, dv))
        return dq, dk, dv, drows, [unpad_operand(*args, tiling) for args in zip(doperands, unpadded, program.inexact_specs(data.operands))]

    def _kernels(self, name: str, tiling: Tiling, data: Data):
        """A fold of the platform, given what both kinds want of a call that was padded to ``tiling``."""
        program, sizes = self.program, self.program.sizes
        plan = flash.Plan(program.specs, tiling.bq, tiling.bk, sizes.queries, sizes.keys, sizes.offsets[0], program.contiguous, self.interpret)
        if self.tiles is None:
            return partial(getattr(flash.tpu, name), plan, cover(program, data, tiling))
        return partial(getattr(flash.gpu, name), plan, self.tiles, lambda bq, bk: cover(program, data, Tiling(bq, bk, 1)))


def choose_fused(program: Program, data: Data, block_sizes=None) -> Fused:
    """The executor of a call, or NotImplementedError that says what the kernels lack for it."""
    interpret, platform = target()
    if platform not in PLATFORMS:
        raise NotImplementedError(f"implementation='pallas': the kernels are for TPU and GPU, the backend is {platform!r}; use 'blockwise' or None "
                                  "(attnx.core.fused.forced() emulates them)")
    if any(spec.offset for spec in program.flat_specs) and not program.contiguous:
        raise NotImplementedError("implementation='pallas': offset tables (relative position biases) need consecutive positions; "
                                  "leave out query_positions and key_positions, or use 'blockwise'")
    if data.value is not None and data.value.shape[-1] == 1:
        raise NotImplementedError("implementation='pallas': values of size 1 are no matrix to the kernels; use 'blockwise'")
    return (_for_tpu if platform == "tpu" else _for_gpu)(program, data, block_sizes, interpret)


def _for_tpu(program, data, block_sizes, interpret):
    if interpret is False and program.sizes.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"implementation='pallas': a TPU computes in float32 and bfloat16, not in {program.sizes.dtype}; use 'blockwise'")
    if interpret is False and "float16" in program.parts.products.dtypes:
        raise NotImplementedError(f"implementation='pallas': a TPU lacks float16, which {describe(program.parts.products)} rounds to; use 'blockwise'")
    lengths = program.sizes.queries, program.sizes.keys
    check_products(program, data, block_sizes)
    most, scaled = _most(program, data), program.parts.products.blocks
    chosen = [min(max(size, block), power(n, 128)) for size, block, n in zip((most.bq, most.bk), scaled, lengths)] if block_sizes is None else _powers(block_sizes, 128)
    tiling = Tiling(*chosen, 1)
    return Fused(without_padding(program, tiling), tiling, None, interpret)


def _most(program, data):
    """The largest tile for a call. Where nothing but a softmax has to fit on the chip, and no pairs are left out but those of the future, it grows with the
    lengths, unless blocks of padding would undo it."""
    parts, lengths = program.parts, (program.sizes.queries, program.sizes.keys)
    sizes = partial(default_sizes, "flash", "tpu", data.query, data.value)
    least, whole = sizes(), parts.mask is None or (not program.specs.mask and parts.mask.as_jax_nn() == {"is_causal": True})
    if _busy(parts) or not parts.products.exact or not whole or not program.contiguous:
        return least
    most = sizes(length=min(lengths))
    padded = lambda tile: math.prod(n + -n % size for n, size in zip(lengths, (tile.bq, tile.bk)))
    return most if padded(most) <= PADDING * padded(least) else least


def _busy(parts) -> bool:
    """Whether more is done to a score than a plain softmax does."""
    return bool(parts.scores or parts.dropout_rate or parts.weights.arity or not isinstance(parts.weights, Softmax))


def _for_gpu(program, data, block_sizes, interpret):
    h = data.query.shape[-1]
    if h == 1:
        raise NotImplementedError("implementation='pallas': heads of size 1 are no matrix to the kernels; use 'blockwise'")
    if any(isinstance(score, Similarity) for score in program.parts.scores) and h != power(h):
        raise NotImplementedError("implementation='pallas': the GPU kernels pad head sizes with zeros to a power of two from 16, which a similarity might mind; "
                                  f"got head size {h}; use 'blockwise'")
    if interpret is False:
        _check_gpu(program, data)
    check_products(program, data, block_sizes)
    parts = program.parts
    if parts.products.cut:
        block_sizes = parts.products.blocks if block_sizes is None else block_sizes
        if interpret is False and any(n > block for n, block in zip(block_sizes, parts.products.blocks)):
            raise NotImplementedError(f"implementation='pallas': the GPU kernels cannot cut a tile into the blocks {parts.products.blocks} of "
                                      f"{describe(parts.products)}; leave out block_sizes, got {tuple(block_sizes)}")
    if block_sizes is not None:
        _powers(block_sizes, 16)
    chosen = choose_tiles(default_sizes("flash", "gpu", data.query, data.value), program.sizes.queries, program.sizes.keys, _busy(parts), block_sizes,
                          parts.products.blocks)
    tiling = Tiling(chosen.rows.bq, chosen.rows.bk, 1)
    largest = Tiling(*(max(pair) for pair in zip(tiling, chosen.largest)), 1)
    return Fused(without_padding(program, largest), tiling, chosen, interpret)


def _check_gpu(program, data):
    """What only a compiler for GPUs minds."""
    if program.sizes.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"implementation='pallas': the GPU kernels compute in float32, bfloat16 and float16, not in {program.sizes.dtype}; use 'blockwise'")
    if any(x.ndim > 5 for x in jax.tree.leaves(data.operands)):
        raise NotImplementedError("implementation='pallas': the GPU kernels take no operands with axes of their own (None among an Operand's axes); "
                                  "hand over their entries one by one, or use 'blockwise'")


def _powers(block_sizes, least: int):
    for n in block_sizes:
        if n != power(n, least):
            raise NotImplementedError(f"implementation='pallas': block_sizes must be powers of two and at least {least}, got {tuple(block_sizes)}")
    return block_sizes
