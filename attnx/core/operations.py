"""What an execution of the pairs engine computes, as differentiable operations over whole arrays.

* :func:`attend` - output and residual of an exponential weight, in one sweep;
* :func:`weigh` - sums over keys at given row statistics: weighed values, or what a statistic is made of;
* :func:`root` - a row statistic that solves an equation, by safeguarded Newton steps.

They are written over an *executor* (:class:`attnx.core.blockwise.Blockwise`, :class:`attnx.core.ring.Ring`) that can fold rows and
keys. Each has a gradient of one sweep, :func:`backward`, at fixed row statistics; how the statistics themselves depend on the scores
enters through its coefficients, or through the statistics' own gradient. The gradient of :func:`backward` differentiates a plain scan, so
derivatives of any order exist in reverse mode. Forward mode does not (JAX raises TypeError): use ``reference``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnx.core.compat import psum_like
from attnx.core.program import Data, partition
from pallas_kernels import tile
from pallas_kernels.parts import Exponential, Extent, Root
from pallas_kernels.terms import FusedTerms, SlopeTerms, StatisticTerms, WeightTerms


def _cotangent(tree, inexact_gradients):
    """Gradients of the inexact leaves, in their dtypes, among zeros for the integers."""
    inexact, others, join = partition(tree)
    return join([psum_like(g, x).astype(x.dtype) for g, x in zip(inexact_gradients, inexact)],
                [np.zeros(x.shape, jax.dtypes.float0) for x in others])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(executor, family: Exponential, data: Data):
    """``(output [B, K, G, T, Hv] or None without values, residual [B, K, G, T, 1])`` of an exponential family."""
    parts, dtype = executor.program.parts, tile.accumulator_dtype(data.query.dtype)
    size = 1 if data.value is None else data.value.shape[-1]

    def body(carry, q, k, v, rows, at, blocks, seed, masked):
        return tile.attend_tile(parts, family, carry, q, k, v, at, blocks, seed, masked=masked)

    def finish(carry):
        out, r = tile.attend_finish(carry)
        return executor.stored(out), r

    out, r = executor.fold_rows(data, lambda _: tile.attend_init(executor.tiling.bq, size, dtype), body, finish)
    return None if data.value is None else out, r


def _attend_forward(executor, family, data):
    out, r = attend(executor, family, data)
    return (out, r), (data, out, r)


def _attend_backward(executor, family, saved, cotangents):
    (data, out, r), (do, coefficient) = saved, cotangents
    terms = FusedTerms(family) if data.value is not None else StatisticTerms(family)
    if do is not None:
        coefficient = coefficient - jnp.sum(do.astype(r.dtype) * out.astype(r.dtype), axis=-1, keepdims=True)
    gradients, _ = backward(executor, terms, False, data, (tile.given_rows(r),), do, (coefficient,))
    return (_cotangent(data, gradients),)


attend.defvjp(_attend_forward, _attend_backward)


def _weigh(executor, terms, data, rows, differentiable=False):
    parts, dtype, bq = executor.program.parts, tile.accumulator_dtype(data.query.dtype), executor.tiling.bq

    def init(_):
        acc = jnp.zeros((bq, data.value.shape[-1]), dtype) if terms.weighs_values else None
        return acc, (jnp.zeros((bq, 1), dtype),) * terms.sums

    def body(carry, q, k, v, rows, at, blocks, seed, masked):
        return tile.weigh_tile(parts, terms, carry, q, k, v, rows, at, blocks, seed, masked=masked, differentiable=differentiable)

    def finish(carry):
        acc, totals = carry
        return None if acc is None else executor.stored(acc), totals

    return executor.fold_rows(data, init, body, finish, rows, differentiable=differentiable)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weigh(executor, terms, data: Data, rows):
    """``(sum_j num_ij v_j [B, K, G, T, Hv] or None, tuple of sum_j [B, K, G, T, 1])`` of ``terms`` at row statistics ``rows``."""
    return _weigh(executor, terms, data, rows)


def _weigh_forward(executor, terms, data, rows):
    return weigh(executor, terms, data, rows), (data, rows)


def _weigh_backward(executor, terms, saved, cotangents):
    (data, rows), (do, coefficients) = saved, cotangents
    gradients, drows = backward(executor, terms, True, data, rows, do, coefficients)
    return _cotangent(data, gradients), drows


weigh.defvjp(_weigh_forward, _weigh_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def backward(executor, terms, want_rows: bool, data: Data, rows, do, coefficients):
    """The gradient of ``weigh`` in one sweep: of the inexact leaves of ``data`` (as the executor keeps them), and of ``rows`` or ()."""
    parts = executor.program.parts
    do = None if do is None else do.astype(data.value.dtype)

    def body(q, k, v, given, at, blocks, seed, masked, **orientation):
        rows, do, coefficients = given
        return tile.backward_tile(parts, terms, q, k, v, do, rows, coefficients, at, blocks, seed, masked=masked, want_rows=want_rows, **orientation)

    dq, dk, dv, drows, doperands = executor.fold_keys(data, body, (rows, do, coefficients), rows if want_rows else ())
    return [dq, dk, *([] if dv is None else [dv]), *doperands], drows


def _backward_forward(executor, terms, want_rows, data, rows, do, coefficients):
    return backward(executor, terms, want_rows, data, rows, do, coefficients), (data, rows, do, coefficients)


def _backward_backward(executor, terms, want_rows, saved, cotangents):
    data, rows, do, coefficients = saved
    inexact, others, join = partition(data)

    def gradient(inexact, rows, do, coefficients):
        _, pull = jax.vjp(lambda inexact, rows: _weigh(executor, terms, join(inexact, others), rows, differentiable=True), inexact, rows)
        dinexact, drows = pull((do, coefficients))
        return [x.astype(c.dtype) for x, c in zip(dinexact, cotangents[0])], drows if want_rows else ()

    _, pull = jax.vjp(gradient, inexact, rows, do, coefficients)
    dinexact, *others = pull(cotangents)
    return _cotangent(data, dinexact), *others


backward.defvjp(_backward_forward, _backward_backward)


def extent(executor, data: Data):
    """The largest score of every row and the number of its keys, [B, K, G, T, 1] each; 0 for a row without keys. They have no gradient."""
    parts, dtype, bq = executor.program.parts, tile.accumulator_dtype(data.query.dtype), executor.tiling.bq

    def body(carry, q, k, v, rows, at, blocks, seed, masked):
        return tile.maximum_tile(parts, carry, q, k, at, blocks, masked=masked)

    init = lambda _: (jnp.full((bq, 1), tile.FLOOR, dtype), jnp.zeros((bq, 1), dtype))
    top, count = executor.fold_rows(jax.tree.map(lax.stop_gradient, data), init, body, lambda carry: carry)
    return jnp.where(count > 0, top, 0), count


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def root(executor, which: Root, data: Data, earlier):
    """The row statistic [B, K, G, T, 1] at which ``sum_j phi(s_ij, r) = target``; 0 for a row without keys."""
    top, count = extent(executor, data)
    some = count > 0
    low, high = which.bracket(top, jnp.where(some, count, 1))

    def step(state):
        low, high, r, _, n = state
        _, (value, slope) = _weigh(executor, SlopeTerms(which), data, (*earlier, r))
        excess = value - which.target
        low, high = jnp.where(excess >= 0, r, low), jnp.where(excess <= 0, r, high)
        new = r - excess / jnp.where(slope < 0, slope, -1)
        new = jnp.where((new >= low) & (new <= high) & (slope < 0), new, (low + high) / 2)
        new = jnp.where(some, new, 0)
        return low, high, new, executor.maximum(jnp.abs(new - r) / (1 + jnp.abs(r))), n + 1

    settled = 4 * jnp.finfo(top.dtype).eps
    state = (low, high, jnp.where(some, low, 0), executor.maximum(top - top + 1), 0)
    return lax.while_loop(lambda state: (state[3] > settled) & (state[4] < 64), step, state)[2]


def _root_forward(executor, which, data, earlier):
    r = root(executor, which, data, earlier)
    return r, (data, earlier, r)


def _root_backward(executor, which, saved, cotangent):
    data, earlier, r = saved
    _, (_, slope) = weigh(executor, SlopeTerms(which), data, (*earlier, r))
    coefficient = jnp.where(slope < 0, -cotangent / jnp.where(slope < 0, slope, -1), 0)
    gradients, drows = backward(executor, StatisticTerms(which), True, data, (*earlier, r), None, (coefficient,))
    return _cotangent(data, gradients), drows[:-1]


root.defvjp(_root_forward, _root_backward)


# From parts to results ----------------------------------------------------------------------------------------------


def statistics(executor, data: Data):
    """Every row statistic of the call's weights, in order: a tuple of [B, K, G, T, 1]."""
    data = data._replace(value=None)
    rows: tuple[jax.Array, ...] = ()
    extents = None
    for which in executor.program.parts.weights.statistics:
        if isinstance(which, Extent):
            extents = extents or extent(executor, data)
            r = extents[which.value]
        elif isinstance(which, Exponential):
            r = attend(executor, which, data)[1]
        elif isinstance(which, Root):
            r = root(executor, which, data, _given(rows))
        else:
            total = weigh(executor, StatisticTerms(which), data, _given(rows))[1][0]
            r = which.finish(total, rows, *row_operands(executor.program, data))
        rows = (*rows, r)
    return rows


def row_operands(program, data: Data):
    """The weights' operands as row quantities, broadcastable to [B, K, G, T, 1]."""
    return tuple(x for x, spec in zip(data.operands.weights, program.specs.weights) if not (spec.key or spec.offset))


def apply(executor, data: Data, rows):
    """The output at given row statistics, [B, K, G, T, Hv]."""
    out, totals = weigh(executor, WeightTerms(executor.program.parts.weights), data, _given(rows))
    for total in totals:  # of normalised weights
        out = out / jnp.where(total > 0, total, 1)
    return out


def _given(rows):
    return tuple(tile.given_rows(r) for r in rows)


def output(executor, data: Data):
    """Output and residual (None for weights outside the exponential family)."""
    weights = executor.program.parts.weights
    if isinstance(weights, Exponential):
        return attend(executor, weights, data)
    return apply(executor, data, statistics(executor, data)), None
