"""The mathematics of one tile, written once: what every execution of attention folds.

Attention over allowed pairs is

    out_i = sum_j  weight(s_ij, statistics of row i) * dropout_ij * v_j,      s_ij = score(q_i, k_j)

and every execution (materialised, folded over key blocks, fused kernel, split decoding, ring of devices) evaluates it tile by
tile: a few queries against a few keys of one head. This module holds the functions of one tile, on two-dimensional blocks
and in plain ``jax.numpy``, so the same code runs under XLA and inside a Pallas kernel. The parts they call (scores, masks,
weights) obey the protocol of :mod:`pallas_kernels.parts`, matrix products that of :mod:`pallas_kernels.products`.

Two operations cover the field:

* :func:`attend_tile` - the fused fold of an :class:`~pallas_kernels.parts.Exponential` weight. The carry ``(m, sum den,
  sum num * v)`` is a commutative monoid, so tiles may come in any order and from any device, and finished results
  merge (:func:`merge`).
* :func:`weigh_tile` - sums over a row's keys given row statistics: weighed values, or what another statistic is made of.

:func:`backward_tile` is the gradient of both: with ``do`` the output's cotangent and ``den`` the summand of a row statistic,

    ds_ij = dropout_ij (do_i . v_j) dnum/ds + c_i dden/ds,         c_i = rbar_i - <do_i, o_i>  for a fused fold

(rbar: the residual's cotangent), at fixed row statistics. Only the residual ``r`` and ``o`` are needed from the forward pass.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.parts import At, Blocks, Exponential, Similarity
from pallas_kernels.products import accumulator_dtype as accumulator_dtype
from pallas_kernels.static import Parts

# The running maximum starts here: finite, so that a row that has seen no key needs no special case, and low enough that
# no real score lies below it.
FLOOR = -1e30


def across(column, width: int):
    """A column [rows, 1], or one that a kernel keeps repeated over vector lanes, [rows, L], so that it broadcasts to [rows, width]."""
    lanes = column.shape[1]
    if lanes in (1, width):
        return column
    return jnp.tile(column, (1, -(-width // lanes)))[:, :width]


# Scores -------------------------------------------------------------------------------------------------------------


def raw_scores(parts: Parts, q, k, at: At, blocks: Blocks, *, transposed: bool = False):
    """``scale * q k^T`` [bq, bk], or what the leading :class:`Similarity` puts in its place."""
    if parts.scores and isinstance(parts.scores[0], Similarity):
        if transposed:
            turned = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), blocks)
            return raw_scores(parts, q, k, at._replace(query=at.query.T, key=at.key.T), turned).T
        if jnp.issubdtype(q.dtype, jnp.floating):
            q, k = (x.astype(accumulator_dtype(x.dtype)) for x in (q, k))
        return parts.scores[0].pair(q, k, at, *blocks.scores[0])
    exact = math.frexp(parts.scale)[0] == 0.5 or q.dtype == accumulator_dtype(q.dtype)
    if exact and parts.products.any_scale:  # scaling the query loses nothing, and is less work
        q, scale = q if parts.scale == 1.0 else q * parts.scale, 1.0
    else:
        scale = parts.scale
    a, b = (k, q) if transposed else (q, k)
    s = parts.products.dot("scores", a, b, (1, 1), transposed=transposed)
    return s if scale == 1.0 else s * scale


def shape_scores(parts: Parts, s, at: At, blocks: Blocks):
    """The raw scores after every additive or elementwise score part, in order."""
    for part, operands in zip(parts.scores, blocks.scores):
        if not isinstance(part, Similarity):
            s = part.tile(s, at, *operands)
    return s


def visible(parts: Parts, at: At, blocks: Blocks):
    """Which pairs of the tile are allowed, [bq, bk]: real positions on both sides and the mask."""
    if parts.real and parts.mask is not None:
        return parts.mask.tile(at, *blocks.mask)
    ok = (at.query >= 0) & (at.key >= 0)
    return ok if parts.mask is None else ok & parts.mask.tile(at, *blocks.mask)


def dropout_multiplier(parts: Parts, at: At, seed):
    """0 with probability ``dropout_rate``, else ``1 / (1 - dropout_rate)``: a hash of (seed, batch, head, query and key position).

    Counting in logical positions makes the pattern the same in every execution, tile size and recomputation.
    """
    def mix(x):  # the finaliser of MurmurHash3: each input bit flips each output bit with probability close to 1/2
        x = (x ^ lax.shift_right_logical(x, jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
        x = (x ^ lax.shift_right_logical(x, jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        return x ^ lax.shift_right_logical(x, jnp.uint32(16))

    def word(x):
        return jnp.asarray(x).astype(jnp.uint32)

    lane = mix(word(at.batch) * jnp.uint32(0x9E3779B1) + word(at.head) + seed[0])
    row = mix(word(at.query) * jnp.uint32(0x85EBCA77) + lane)
    column = mix(word(at.key) * jnp.uint32(0xC2B2AE3D) + seed[1])
    bits = lax.shift_right_logical(mix(row + column), jnp.uint32(8)).astype(jnp.int32)
    keep = bits >= jnp.int32(round(parts.dropout_rate * 2**24))
    return jnp.where(keep, 1.0 / (1.0 - parts.dropout_rate), 0.0)


def _guard(ok, s, rows):
    """Harmless numbers at the pairs that are not allowed, so that a zero cotangent there never meets an infinite slope."""
    if ok is None:
        return s, rows
    return jnp.where(ok, s, 0), tuple(jnp.where(ok, r, 0) for r in rows)


def _only(ok, x):
    return x if ok is None else jnp.where(ok, x, 0)


def _silence(vanishes: bool, s, ok):
    """Scores at which forbidden pairs weigh nothing by themselves, and no mask left to apply; else the two as they are."""
    return (jnp.where(ok, s, -jnp.inf), None) if vanishes and ok is not None else (s, ok)


def _tile(parts, q, k, at, blocks, masked):
    s = shape_scores(parts, raw_scores(parts, q, k, at, blocks), at, blocks)
    return s, visible(parts, at, blocks) if masked else None


# Forward ------------------------------------------------------------------------------------------------------------


def attend_init(rows: int, value_size: int, dtype):
    """The empty carry ``(m [rows, 1], sum den [rows, 1], sum num * v [rows, value_size])``; columns may be repeated, see :func:`across`."""
    return (jnp.full((rows, 1), FLOOR, dtype), jnp.zeros((rows, 1), dtype), jnp.zeros((rows, value_size), dtype))


def attend_tile(parts: Parts, family: Exponential, carry, q, k, v, at: At, blocks: Blocks, seed, *, masked: bool):
    """Folds one tile into the carry of an exponential ``family`` (the call's weights, or a statistic of theirs).

    ``v=None`` folds the row statistic alone. ``masked=False`` promises that every pair of the tile is allowed.
    """
    m, total, acc = carry
    s, ok = _silence(family.vanishes, *_tile(parts, q, k, at, blocks, masked))
    operands = blocks.weights
    shift = family.shift(s, *operands)
    if shift is None:  # a weight that cannot overflow needs no running maximum
        m_new = jnp.zeros_like(m)
    else:
        shift = shift if ok is None else jnp.where(ok, shift, FLOOR)
        m_new = jnp.maximum(m, jnp.max(shift, axis=1, keepdims=True))
    num, den = family.terms(s, across(m_new, s.shape[1]), *operands)
    same = den is num
    num = _only(ok, num)
    den = num if same else _only(ok, den)
    decay = jnp.exp(m - m_new)
    total = decay * total + jnp.sum(den, axis=1, keepdims=True)
    if v is not None:
        if parts.dropout_rate:
            num = num * dropout_multiplier(parts, at, seed)
        acc = across(decay, acc.shape[1]) * acc + parts.products.dot("values", num, v, (1, 0))
    return m_new, total, acc


def attend_finish(carry):
    """The output and the residual ``r = m + log sum den`` of a carry; 0 and -inf for a row that weighs nothing."""
    m, total, acc = carry
    total = across(total, acc.shape[1])
    out = jnp.where(total > 0, acc / jnp.where(total > 0, total, 1), 0)
    m, total = m[:, :1], total[:, :1]
    return out, jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def merge(a, b):
    """Two finished results ``(out [..., Hv], r [...])`` over disjoint keys as one, under one normaliser.

    ``r = logaddexp(r_a, r_b)``, ``out = out_a e^(r_a - r) + out_b e^(r_b - r)``. Associative, commutative and differentiable in
    all four arguments; a row empty on both sides gives 0 and -inf, with zero gradients.
    """
    (out_a, r_a), (out_b, r_b) = a, b
    top = lax.stop_gradient(jnp.maximum(jnp.maximum(r_a, r_b), FLOOR))
    w_a, w_b = (jnp.where(r > FLOOR, jnp.exp(jnp.where(r > FLOOR, r, top) - top), 0) for r in (r_a, r_b))
    total = w_a + w_b
    safe = jnp.where(total > 0, total, 1)
    out = out_a * (w_a / safe)[..., None] + out_b * (w_b / safe)[..., None]
    return out.astype(jnp.result_type(out_a, out_b)), jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


def maximum_tile(parts: Parts, carry, q, k, at: At, blocks: Blocks, *, masked: bool):
    """Folds ``(max_j s_ij, number of allowed keys)``, each [bq, 1]: what brackets a root."""
    top, count = carry
    s, ok = _tile(parts, q, k, at, blocks, masked)
    ones = jnp.ones_like(s)
    s = s if ok is None else jnp.where(ok, s, FLOOR)
    return jnp.maximum(top, jnp.max(s, axis=1, keepdims=True)), count + jnp.sum(_only(ok, ones), axis=1, keepdims=True)


def weigh_tile(parts: Parts, terms, carry, q, k, v, rows, at: At, blocks: Blocks, seed, *, masked: bool, differentiable: bool = False):
    """Adds a tile to sums over keys, given row statistics.

    Args:
      terms: ``terms(s, rows, *weight operands) -> (num, sums)``: the weight of the values (or None) and a tuple of summands.
      carry: ``(sum num * v [bq, Hv] or None, tuple of sums [bq, 1])``.
      rows: row statistics, a tuple of [bq, 1].
      differentiable: guards forbidden pairs for the sake of automatic differentiation.
    """
    acc, totals = carry
    s, ok = _silence(terms.vanishes, *_tile(parts, q, k, at, blocks, masked))
    if differentiable:
        s, rows = _guard(ok, s, rows)
    num, sums = terms(s, rows, *blocks.weights)
    totals = tuple(t + jnp.sum(_only(ok, x), axis=1, keepdims=True) for t, x in zip(totals, sums))
    if num is None:
        return None, totals
    num = _only(ok, num)
    if parts.dropout_rate:
        num = num * dropout_multiplier(parts, at, seed)
    return acc + parts.products.dot("values", num, v, (1, 0)), totals


# Backward -----------------------------------------------------------------------------------------------------------


def given_rows(r):
    """The residual as the backward pass wants it: a row that weighs nothing (r = -inf) gets a level at which all terms vanish."""
    return jnp.where(r > FLOOR, r, -FLOOR)


def split(blocks):
    """The inexact operands of some parts, and a function that puts them back among the integer ones (which have no cotangent)."""
    leaves, tree = jax.tree.flatten(blocks)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def join(chosen):
        chosen = iter(chosen)
        return jax.tree.unflatten(tree, [next(chosen) if f else x for f, x in zip(inexact, leaves)])

    return [x for f, x in zip(inexact, leaves) if f], join


def backward_tile(parts: Parts, terms, q, k, v, do, rows, coefficients, at: At, blocks: Blocks, seed, *, masked: bool, want_rows: bool,
                  transposed: bool = False):
    """The gradient of :func:`weigh_tile`: ``(dq, dk, dv, drows, dblocks)``.

    Args:
      terms, rows: as there.
      v, do: value block [bk, Hv] and cotangent of the weighed values [bq, Hv]; None when the terms have no ``num``.
      coefficients: cotangents of the sums, a tuple of [bq, 1].
      want_rows: whether the row statistics get a gradient (a fused fold's do not: theirs is in the coefficient).
      transposed: the tile is evaluated as [bk, bq], and whatever broadcasts against it comes and leaves so: rows, coefficients, positions, operand
        blocks and the gradients of rows and blocks. Then dk and dv need no transposition of a whole tile.

    Returns:
      ``dq`` [bq, H], ``dk`` [bk, H], ``dv`` [bk, Hv] (None without ``num``), ``drows`` like ``rows`` (or empty), and ``dblocks``: a list
      with the gradient of each inexact operand block, in tree order.
    """
    dtype, dot = accumulator_dtype(q.dtype), partial(parts.products.dot, transposed=transposed)
    (to_scores, join_scores), (to_mask, _), (to_weights, join_weights) = map(split, blocks)
    ok = visible(parts, at, blocks) if masked else None

    def with_scores(operands):
        return blocks._replace(scores=join_scores(operands))

    def weigh(s, given, operands):
        s, given = _guard(left, s, given if want_rows else rows)
        num, sums = terms(s, given, *join_weights(operands))
        kept = None if num is None else _only(left, num)
        return kept, tuple(kept if x is num else _only(left, x) for x in sums)

    replaced = parts.scores and isinstance(parts.scores[0], Similarity)
    if replaced:
        raw, pull_pair = jax.vjp(lambda q, k, operands: raw_scores(parts, q, k, at, with_scores(operands), transposed=transposed), q, k, to_scores)
    else:
        raw = raw_scores(parts, q, k, at, blocks, transposed=transposed)
    s, pull_shape = jax.vjp(lambda s, operands: shape_scores(parts, s, at, with_scores(operands)), raw, to_scores)
    s, left = _silence(terms.vanishes, s, ok)  # between the two: where slopes vanish, the gradient needs no mask
    to_rows, to_keys = ((0, 0), (1, 0)) if transposed else ((1, 0), (0, 0))
    (num, _), pull = jax.vjp(weigh, s, rows if want_rows else (), to_weights)
    dv = g_num = None
    if num is not None:
        a, b = (v, do) if transposed else (do, v)
        g_num = dot("dp", a, b, (1, 1))
        if parts.dropout_rate:
            drop = dropout_multiplier(parts, at, seed)
            g_num, num = g_num * drop, num * drop
        dv = dot("dv", num, do, to_keys)
    ds, drows, of_weights = pull((g_num, tuple(jnp.broadcast_to(c, raw.shape) for c in coefficients)))
    ds, of_scores = pull_shape(ds)
    others = [jnp.zeros_like(x) for x in to_mask] + of_weights
    if replaced:
        dq, dk, of_pair = pull_pair(ds)
        return dq.astype(dtype), dk.astype(dtype), dv, drows, [a + b for a, b in zip(of_scores, of_pair)] + others
    early = parts.products.exact and ds.size < q.size + k.size  # the scale enters where there are fewer numbers, but what is rounded is one thing in all tiles
    ds = ds * parts.scale if early and parts.scale != 1.0 else ds
    dq, dk = dot("dq", ds, k, to_rows), dot("dk", ds, q, to_keys)
    if parts.scale != 1.0 and not early:
        dq, dk = dq * parts.scale, dk * parts.scale
    return dq, dk, dv, drows, of_scores + others
