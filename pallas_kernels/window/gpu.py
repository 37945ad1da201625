"""Windows on a GPU by Pallas' Triton route: a program a window and head, the map in registers, and products in steps along the features.

A step reads ``chunk`` features of all tokens of a window, adds their product to the map, and is done with them; so shared memory holds a few slices of
[S, chunk] however large heads are, and the map, of no more than 128 x 128 scores, stays in registers. For a gradient a program takes the same head of several
windows, whose gradient of a bias it sums; the sums of the programs are added up outside, without atomic operations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as _like
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.compat import results_like
from pallas_kernels.flash.gpu_quick import quickened
from pallas_kernels.parts import At, Spec
from pallas_kernels.products import accumulator_dtype, multiply
from pallas_kernels.tiles import power
from pallas_kernels.triton import whole
from pallas_kernels.window.arrays import Plan, inexact
from pallas_kernels.window.tile import weigh

PROGRAMS = 1024  # of a gradient, if there are so many windows and heads: several a multiprocessor
SMALL = 64  # tokens, at the most, of a map for the default number of warps; larger ones get twice as many


# Operands -----------------------------------------------------------------------------------------------------------


def _kind(x, spec: Spec) -> str:
    """'pair' [S, S], 'query' or 'key' [S], or 'whole' []; those that have a gradient are pairs."""
    return "pair" if inexact(x) or (spec.query and spec.key) else "query" if spec.query else "key" if spec.key else "whole"


def _lay(kind: str, length: int, x):
    """An operand [n, N or 1, 1, S or 1, S or 1] as programs read it, [n, N or 1, ..], as long as a program's rows."""
    x = x.astype(jnp.int8) if x.dtype == bool else x
    axes = {"pair": (3, 4), "query": (3,), "key": (4,), "whole": ()}[kind]
    x = jnp.broadcast_to(x, [length if axis in axes else n for axis, n in enumerate(x.shape)])
    x = jnp.pad(x, [(0, power(length) - length if axis in axes else 0) for axis in range(5)], mode="edge")
    return x.reshape(*x.shape[:2], *(x.shape[axis] for axis in axes))


class _Here(NamedTuple):
    """A window and a head of it, inside a program."""

    plan: Plan
    length: int
    window: int
    head: int

    @property
    def rows(self):
        """Which rows of a program are tokens, [rows, 1]."""
        return lax.broadcasted_iota(jnp.int32, (power(self.length), 1), 0) < self.length

    def chunks(self, size: int):
        """The steps along the features of a head."""
        chunk = min(self.plan.sizes.chunk or power(size), power(size))
        return [(start, chunk) for start in range(0, size, chunk)]

    def inside(self, size: int, columns):
        """Which entries of a slice there are."""
        start, chunk = columns
        rows = jnp.broadcast_to(self.rows, (power(self.length), chunk))
        return rows if start + chunk <= size else rows & (lax.broadcasted_iota(jnp.int32, rows.shape, 1) < size - start)

    def place(self, ref, columns):
        """A slice in memory."""
        first, (start, chunk) = self.window * 0, columns  # the interpreter wants all indices of one type
        return ref.at[self.window, pl.ds(first, power(self.length)), self.head, pl.ds(first + start, chunk)]

    def load(self, ref, size: int, columns):
        """A slice of the features of a window's tokens."""
        return plgpu.load(self.place(ref, columns), mask=self.inside(size, columns), other=0)

    def store(self, ref, size: int, columns, x):
        """Writes one."""
        plgpu.store(self.place(ref, columns), x.astype(ref.dtype), mask=self.inside(size, columns))

    def product(self, a, b, size: int):
        """``a b^T`` [rows, rows], summed over slices."""
        dtype = accumulator_dtype(a.dtype)
        total = jnp.zeros((power(self.length),) * 2, dtype)
        for columns in self.chunks(size):
            total += multiply(self.load(a, size, columns), self.load(b, size, columns), (1, 1))
        return total

    def at(self):
        """Positions of the map; -1 for what is no key."""
        place = lax.iota(jnp.int32, power(self.length))
        return At(self.window, self.head, place[:, None], jnp.where(place < self.length, place, -1)[None])

    def see(self, ref, kind: str, dtype):
        """What the parts see of a laid operand."""
        index = (lax.rem(self.window, jnp.int32(ref.shape[0])) if ref.shape[0] > 1 else 0, self.head if ref.shape[1] > 1 else 0)
        x = ref[index] if kind == "whole" else ref[(*index, *(slice(None),) * (len(ref.shape) - 2))]
        x = {"query": lambda x: x[:, None], "key": lambda x: x[None], "whole": lambda x: jnp.reshape(x, (1, 1))}.get(kind, lambda x: x)(x)
        return x.astype(dtype) if jnp.issubdtype(dtype, jnp.number) else x != 0


# Programs -----------------------------------------------------------------------------------------------------------


def forward(plan: Plan, query, key, value, operands):
    """As :func:`pallas_kernels.window.attend`."""
    nw, length, heads, size = query.shape

    def weights(raw, at, blocks):
        return weigh(plan.parts, raw, at, blocks, keys=length, axis=1)[0]

    def program(head, w, tokens, blocks, outputs):
        q, k, v = tokens
        here = _Here(plan, length, w, head)
        found = quickened(weights, plan.interpret)(here.product(q, k, size) * plan.parts.scale, here.at(), blocks(here)).astype(v.dtype)
        for columns in here.chunks(value.shape[3]):
            here.store(outputs[0], value.shape[3], columns, multiply(found, here.load(v, value.shape[3], columns), (1, 0)))

    return _launch(plan, (query, key, value), operands, (heads, nw), program, [_like(value.shape, query.dtype)], [], "window_forward")[0]


def backward(plan: Plan, query, key, value, operands, cotangent):
    """The gradients of query, key and value, and a list of those of the operands that have one."""
    (nw, length, heads, size), value_size, rows = query.shape, value.shape[3], power(query.shape[1])
    chosen = [x for x in jax.tree.leaves(operands) if inexact(x)]
    dtype = accumulator_dtype(query.dtype)
    windows = max(1, min(plan.sizes.windows, nw * heads // PROGRAMS)) if chosen else 1
    laid, pulls = zip(*(jax.vjp(lambda x: _lay("pair", length, x), x.astype(dtype)) for x in chosen)) if chosen else ((), ())
    folded = [x.shape[0] == 1 for x in laid]  # summed over windows

    def both(raw, g, at, blocks):
        found, pull = weigh(plan.parts, raw, at, blocks, keys=length, axis=1)
        return found, *pull(g)

    def program(head, group, tokens, blocks, outputs):
        q, k, v, do = tokens
        (dq, dk, dv), sums = outputs[:3], outputs[3:]

        def visit(n, totals):
            here = _Here(plan, length, group * windows + jnp.asarray(n, jnp.int32), head)
            raw, g = here.product(q, k, size) * plan.parts.scale, here.product(do, v, value_size)
            found, ds, dblocks = quickened(both, plan.interpret)(raw, g, here.at(), blocks(here))
            found = found.astype(v.dtype)
            for columns in here.chunks(value_size):
                here.store(dv, value_size, columns, multiply(found, here.load(do, value_size, columns), (0, 0)))
            narrow = ds.astype(q.dtype)
            for columns in here.chunks(size):
                here.store(dq, size, columns, multiply(narrow, here.load(k, size, columns), (1, 0)) * plan.parts.scale)
                here.store(dk, size, columns, multiply(narrow, here.load(q, size, columns), (0, 0)) * plan.parts.scale)
            for ref, x, fold in zip(sums, dblocks, folded):
                if not fold:
                    ref[here.window, head, :, :] = x
            return [total + x for total, x in zip(totals, (x for x, fold in zip(dblocks, folded) if fold))]

        totals = [jnp.zeros((rows, rows), dtype) for fold in folded if fold]
        totals = lax.fori_loop(0, jnp.minimum(windows, nw - group * windows), visit, totals) if windows > 1 else visit(0, totals)
        for ref, x in zip((ref for ref, fold in zip(sums, folded) if fold), totals):
            ref[group, head, :, :] = x

    groups = -(-nw // windows)
    sums = [_like((groups if fold else nw, heads, rows, rows), dtype) for fold in folded]
    dq, dk, dv, *found = _launch(plan, (query, key, value, cotangent), operands, (heads, groups), program,
                                 [_like(x.shape, x.dtype) for x in (query, key, value)], sums, "window_backward")
    over = [tuple(axis for axis in range(2) if like.shape[axis] == 1) for like in laid]
    return dq, dk, dv, [pull(x.sum(axes, keepdims=True))[0] for x, axes, pull in zip(found, over, pulls)]


def _launch(plan: Plan, tokens, operands, grid: tuple[int, int], program, outputs, sums, name: str):
    """Runs ``program(head, id, token refs, blocks(here), output refs)`` over a grid of heads and windows, or groups of them."""
    length = tokens[0].shape[1]
    leaves, structure = jax.tree.flatten(operands)
    kinds = [_kind(x, spec) for x, spec in zip(leaves, plan.flat_specs(), strict=True)]
    laid = [_lay(kind, length, x) for x, kind in zip(leaves, kinds)]
    wide = lambda x: pl.BlockSpec((x.shape[0], power(length), x.shape[2], power(x.shape[3])), lambda h, w: (0, 0, 0, 0))

    def kernel(*refs):
        ins, refs = refs[:len(tokens)], refs[len(tokens):]
        given, outs = refs[:len(laid)], refs[len(laid):]

        def blocks(here):
            return jax.tree.unflatten(structure, [here.see(ref, kind, x.dtype) for ref, kind, x in zip(given, kinds, leaves)])

        program(pl.program_id(0), pl.program_id(1), ins, blocks, outs)

    warps = plan.sizes.warps * (1 if length <= SMALL else 2)
    return pl.pallas_call(
        kernel, results_like([*outputs, *sums], [*tokens, *laid]), grid=grid, in_specs=[*map(wide, tokens), *map(whole, laid)],
        out_specs=[*map(wide, outputs), *map(whole, sums)], compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=plan.interpret, name=name)(*tokens, *laid)
