"""The ``pallas`` execution: folds on fused TPU kernels (:mod:`pallas_kernels.flash`).

The folds of :class:`attnx.core.blockwise.Blockwise` with the carry on chip: what is folded comes from :mod:`attnx.core.operations` either way, and tiles
are skipped or left unmasked by the same table. Results are written once, in the dtype of the inputs.
"""

import contextlib
import contextvars
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnx.core.blockwise import Blockwise
from attnx.core.program import Data, Program, partition
from attnx.core.tiling import Tiling, cover, pad_rows, pad_to_blocks, unpad_operand
from pallas_kernels import flash

_forced = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(interpret: Any = True):
    """Within it, ``implementation="pallas"`` is served whatever the backend.

    Args:
      interpret: True emulates the kernels in XLA, a ``pltpu.InterpretParams`` simulates a TPU core (slow, for tests), False compiles for a TPU: with
        ``jax.jit(...).trace(...).lower(lowering_platforms=("tpu",))`` also where there is none.

    >>> import attnx, jax.numpy as jnp
    >>> x = jnp.ones((1, 16, 2, 8))
    >>> with attnx.core.fused.forced():
    ...     attnx.attention(x, x, x, implementation="pallas").shape
    (1, 16, 2, 8)
    """
    token = _forced.set((interpret,))
    try:
        yield
    finally:
        _forced.reset(token)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Executes a program on TPU kernels; static and hashable."""

    program: Program
    tiling: Tiling
    interpret: Any = False

    @property
    def plan(self) -> flash.Plan:
        """What the kernels want to know."""
        program, sizes = self.program, self.program.sizes
        return flash.Plan(program.specs, self.tiling.bq, self.tiling.bk, sizes.queries, sizes.keys, sizes.offsets[0], program.contiguous, self.interpret)

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
        results = flash.fold_rows(self.plan, cover(self.program, data, self.tiling), data, partial(init, None), body, finish, rows)
        return jax.tree.map(lambda x: x[:, :, :, :t], results)

    def fold_keys(self, data: Data, body, rows, gradient_of):
        """As :meth:`Blockwise.fold_keys`, with the gradients of query, key and value in their own dtypes."""
        program, tiling = self.program, self.tiling
        (t, s), unpadded = (data.query.shape[3], data.key.shape[2]), partition(data.operands)[0]
        data, rows, gradient_of = pad_to_blocks(program, data, tiling), pad_rows(rows, tiling), pad_rows(gradient_of, tiling)
        dq, dk, dv, drows, doperands = flash.fold_keys(self.plan, cover(program, data, tiling), data, body, rows, gradient_of)
        dq, drows = jax.tree.map(lambda x: x[:, :, :, :t], (dq, drows))
        dk, dv = jax.tree.map(lambda x: x[:, :, :s], (dk, dv))
        return dq, dk, dv, drows, [unpad_operand(*args, tiling) for args in zip(doperands, unpadded, program.inexact_specs(data.operands))]


def choose_fused(program: Program, data: Data, block_sizes=None) -> Fused:
    """The executor of a call, or NotImplementedError that says what the kernels lack for it."""
    setting = _forced.get()
    if setting is None and jax.default_backend() != "tpu":
        raise NotImplementedError(f"implementation='pallas': the kernels are for TPU, the backend is {jax.default_backend()!r}; use 'blockwise' or None "
                                  "(attnx.core.fused.forced() emulates them)")
    (interpret,) = setting or (False,)
    specs = jax.tree.leaves(program.specs, is_leaf=lambda x: hasattr(x, "offset"))
    if any(spec.offset for spec in specs) and not program.contiguous:
        raise NotImplementedError("implementation='pallas': offset tables (relative position biases) need consecutive positions; "
                                  "leave out query_positions and key_positions, or use 'blockwise'")
    if interpret is False and data.query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"implementation='pallas': a TPU computes in float32 and bfloat16, not in {data.query.dtype}; use 'blockwise'")
    if data.value is not None and data.value.shape[-1] == 1:
        raise NotImplementedError("implementation='pallas': values of size 1 are no matrix to the kernels; use 'blockwise'")
    sizes = [min(512, _power(n)) for n in (program.sizes.queries, program.sizes.keys)] if block_sizes is None else block_sizes
    for n in sizes:
        if n != _power(n):
            raise NotImplementedError(f"implementation='pallas': block_sizes must be powers of two and at least 128, got {tuple(sizes)}")
    return Fused(program, Tiling(*sizes, 1), interpret)


def _power(n: int) -> int:
    """The least power of two that is at least n and 128."""
    return max(128, 1 << (n - 1).bit_length())
