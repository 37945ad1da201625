"""One launch of a Triton program for every block of columns, slab, state and batch element: its place, and what it reads and writes there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.compat import results_like
from pallas_kernels.linear import gpu_tile
from pallas_kernels.linear.arrays import Tokens
from pallas_kernels.tile import accumulator_dtype
from pallas_kernels.tiles import power
from pallas_kernels.triton import load, store, whole

ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call.

    Attributes:
      states: M, of a batch element.
      chunk: tokens of a chunk, a power of two and at least 16.
      chunks: chunks of a slab, a multiple of ``kept``.
      kept: chunks of which a gradient keeps the first state, and from it recomputes the others'.
      columns: of the values and the state that a program has, a power of two and at least 16.
      scale: a factor of the output.
      floor: of the denominator, see :func:`pallas_kernels.linear_tile.divide`.
      interpret: as for ``pallas_call``.
      language: "triton" for the forward pass in Triton itself (:mod:`pallas_kernels.linear.triton_launch`).
    """

    states: int
    chunk: int
    chunks: int
    kept: int
    columns: int
    scale: float = 1.0
    floor: float | None = None
    interpret: Any = False
    language: str = "pallas"

    @property
    def slab(self):
        """Tokens of a slab."""
        return self.chunk * self.chunks


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """An array, how wide programs have it, and inside one the reference to it."""

    array: Any
    width: int | None = None
    ref: Any = None

    def read(self, *at):
        """A block: an index of each axis."""
        return load(self.ref, self.array, at[:-1], at[-1])

    def write(self, x, *at):
        """The same, written."""
        store(self.ref, self.array, x, at[:-1], at[-1])


@dataclasses.dataclass(frozen=True)
class Here:
    """A program's place - batch element, state, slab, block of columns - and what it reads and writes there."""

    plan: Plan
    groups: int  # queries of a state
    share: int  # states of a key head
    v: Any
    s: Any
    m: Any
    b: Any

    @property
    def columns(self):
        """Those of values and states."""
        return pl.ds(self.v * self.plan.columns, self.plan.columns)

    def span(self, c):
        """The tokens of a chunk of the slab."""
        return pl.ds((self.s * self.plan.chunks + c) * self.plan.chunk, self.plan.chunk)

    def queries(self, c, n):
        """Where the n-th query of each of a chunk's tokens is."""
        return self.b, self.span(c), self.m * self.groups + n

    def keys(self, tokens, c):
        """Key [C, H], value [C, columns] and log-decay of a chunk."""
        head = lax.div(self.m, jnp.int32(self.share))
        key, value = tokens.key.read(self.b, self.span(c), head, ALL), tokens.value.read(self.b, self.span(c), head, self.columns)
        return *(x.astype(accumulator_dtype(x.dtype)) for x in (key, value)), self.decay(tokens, c)

    def decay(self, tokens, c):
        """The log-decay of a chunk: None, [1, C] or [C, H]."""
        if tokens.log_decay is None:
            return None
        if tokens.log_decay.array.ndim == 4:
            return jnp.maximum(tokens.log_decay.read(self.b, self.span(c), self.m, ALL), gpu_tile.LOWEST)
        return jnp.maximum(tokens.log_decay.ref[self.b, self.span(c), self.m], gpu_tile.LOWEST)[None]

    def query(self, tokens, c, n):
        """The n-th query of each of a chunk's tokens, [C, H]."""
        x = tokens.query.read(*self.queries(c, n), ALL)
        return x.astype(accumulator_dtype(x.dtype))

    def cotangents(self, dout, rows, c, n):
        """Those of the numerators [C, columns] and of the denominators [C, 1], the latter in one program alone; or None."""
        x = dout.read(*self.queries(c, n), self.columns)
        x = x.astype(accumulator_dtype(x.dtype))
        if rows is None:
            return x * self.plan.scale, None
        factor, denominator = (row.read(self.b, self.m, n, self.span(c))[:, None] for row in rows)
        return x * factor, jnp.where(self.v == 0, denominator, 0)

    def put_gradients(self, dtokens, c, key, value, log_decay):
        """Writes those of what :meth:`keys` has read, as this program has them."""
        dtokens.key.write(key, self.v, self.b, self.span(c), self.m, ALL)
        dtokens.value.write(value, self.b, self.span(c), self.m, self.columns)
        if log_decay is not None and log_decay.shape[0] > 1:
            dtokens.log_decay.write(log_decay, self.v, self.b, self.span(c), self.m, ALL)
        elif log_decay is not None:
            dtokens.log_decay.ref[self.v, self.b, self.span(c), self.m] = log_decay[0]

    def get(self, states, n):
        """The n-th of the states along the sequence."""
        memory = states.memory.read(self.b, self.m, n, ALL, self.columns)
        return memory, None if states.normalizer is None else states.normalizer.read(self.b, self.m, n, 0, ALL)[None]

    def put(self, states, n, state):
        """Writes it; normalisers, of which all programs have the same, by one."""
        states.memory.write(state[0], self.b, self.m, n, ALL, self.columns)
        if states.normalizer is not None:
            pl.when(self.v == 0)(lambda: states.normalizer.write(state[1][0], self.b, self.m, n, 0, ALL))


def launch(plan, tokens, name, program: Callable, inputs, outputs):
    """``program(here, inputs, outputs)`` for every block of columns, slab, state and batch element; pytrees of :class:`Field`, outputs of arrays."""
    (b, t, n, h), m = tokens.query.shape, plan.states
    is_field = lambda x: isinstance(x, Field)
    (read, in_tree), (written, out_tree) = (jax.tree.flatten(x, is_leaf=is_field) for x in (inputs, outputs))

    def kernel(*refs):
        fields = [dataclasses.replace(field, ref=ref) for field, ref in zip((*read, *written), refs)]
        ids = [pl.program_id(axis) for axis in range(4)]
        program(Here(plan, n // m, m // tokens.key.shape[2], *ids), jax.tree.unflatten(in_tree, fields[:len(read)]), jax.tree.unflatten(out_tree, fields[len(read):]))

    specs = lambda fields: [whole(field.array, field.width) for field in fields]
    arrays = [field.array for field in read]
    results = pl.pallas_call(
        kernel, results_like([field.array for field in written], arrays), grid=(width(plan, tokens.value) // plan.columns, t // plan.slab, m, b),
        in_specs=specs(read), out_specs=specs(written), interpret=plan.interpret, name=name,
        compiler_params=plgpu.CompilerParams(num_warps=8 if power(h) * plan.columns > 4096 else 4, num_stages=2))(*arrays)
    return jax.tree.unflatten(out_tree, results)


def slabs_of(plan, tokens):
    """How many slabs the tokens make."""
    return tokens.query.shape[1] // plan.slab


def width(plan, value):
    """Columns of values and states, in whole blocks."""
    return value.shape[3] + -value.shape[3] % plan.columns


def token_fields(plan, tokens):
    """The tokens' arrays, each as wide as its products take."""
    decay = tokens.log_decay
    return Tokens(Field(tokens.query, power(tokens.query.shape[3])), Field(tokens.key, power(tokens.key.shape[3])),
                  Field(tokens.value, width(plan, tokens.value)), None if decay is None else Field(decay, power(decay.shape[3]) if decay.ndim == 4 else None))


def plain(states):
    """States as they are."""
    return jax.tree.map(Field, states)


def stacked(x, count):
    """So many of the states [B, M, any, ...], to be written."""
    return Field(jax.ShapeDtypeStruct((*x.shape[:2], count, *x.shape[3:]), x.dtype))
