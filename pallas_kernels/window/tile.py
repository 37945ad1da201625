"""The mathematics of a window: whole rows of scores on chip, so the weights take one pass, and their gradient needs nothing from the forward pass.

    w_ij = num(s_ij, m_i) / sum_j den(s_ij, m_i),      m_i >= s_ij        (elementwise weights: w_ij as it is)
    ds_ij = (g_ij dnum/ds + c_i dden/ds) / sum_j den,            g_ij = do_i . v_j,  c_i = - sum_j w_ij g_ij

with the parts of :mod:`pallas_kernels.parts`, as in :mod:`pallas_kernels.tile`. The products stay with the caller: a TPU takes several heads in one, a
GPU cuts them along the features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tile
from pallas_kernels.parts import At, Blocks, Exponential
from pallas_kernels.static import Parts

SLAB = 8  # rows of a vector register


def weigh(parts: Parts, raw, at: At, blocks: Blocks, *, keys: int, axis: int) -> tuple[jax.Array, Callable]:
    """The weights of whole rows of raw scores, and the function from their cotangent to ``(draw, dblocks)``.

    Args:
      raw: scaled products; the keys of a row lie along ``axis``: [bq, bk], or turned [bk, bq] with all of ``at`` and ``blocks``.
      keys: how many there are; the rest is padding, which weighs nothing.

    Returns:
      Weights like ``raw``; ``dblocks`` as in :func:`pallas_kernels.tile.backward_tile`.
    """
    (to_scores, join_scores), (to_mask, _), (to_weights, join_weights) = map(tile.split, blocks)
    s, pull_shape = jax.vjp(lambda s, operands: tile.shape_scores(parts, s, at, blocks._replace(scores=join_scores(operands))), raw, to_scores)
    ok = None if parts.mask is None else parts.mask.tile(at, *blocks.mask)
    weights = parts.weights
    if weights.vanishes:
        s, ok = _hide(s if ok is None else jnp.where(ok, s, -jnp.inf), keys, axis), None
    elif raw.shape[axis] > keys:
        ok = at.key >= 0 if ok is None else ok & (at.key >= 0)
    m = jnp.zeros((1, 1), s.dtype)
    if isinstance(weights, Exponential):
        shift = weights.shift(s, *blocks.weights)
        if shift is not None:
            shift = shift if ok is None else jnp.where(ok, shift, tile.FLOOR)
            m = lax.stop_gradient(jnp.maximum(jnp.max(shift, axis=axis, keepdims=True), tile.FLOOR))
    same = []

    def terms(s, operands):
        s, rows = (s, m) if ok is None else (jnp.where(ok, s, 0), jnp.where(ok, m, 0))
        if isinstance(weights, Exponential):
            num, den = weights.terms(s, rows, *join_weights(operands))
        else:
            num, den = weights.weight(s, (), *join_weights(operands)), None
        same.append(den is num)
        return tuple(x if ok is None else jnp.where(ok, x, 0) for x in ((num,) if same[-1] or den is None else (num, den)))

    found, pull_terms = jax.vjp(terms, s, to_weights)
    if isinstance(weights, Exponential):
        total = jnp.sum(found[-1], axis=axis, keepdims=True)
        inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
        w = found[0] * inverse
    else:
        (w,) = found

    def pull(g):
        if isinstance(weights, Exponential):
            c = -jnp.sum(w * g, axis=axis, keepdims=True)
            cotangents = ((g + c) * inverse,) if same[0] else (g * inverse, jnp.broadcast_to(c * inverse, g.shape))
        else:
            cotangents = (g,)
        ds, of_weights = pull_terms(cotangents)
        draw, of_scores = pull_shape(ds)
        return draw, [*of_scores, *(jnp.zeros_like(x) for x in to_mask), *of_weights]

    return w, pull


def _hide(s, keys: int, axis: int):
    """-inf at the padding, of which only the last registers hold any where keys are rows."""
    if s.shape[axis] == keys:
        return s
    first = keys - keys % SLAB if axis == 0 else 0
    last = s[first:] if first else s
    last = jnp.where(lax.broadcasted_iota(jnp.int32, last.shape, axis) < keys - first, last, -jnp.inf)
    return jnp.concatenate([s[:first], last]) if first else last
