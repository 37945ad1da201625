"""The ``reference`` execution: the definition, materialised.

Scores [B, N, T, S], weights by their formula, a product with the values: O(T S) memory, any derivative in either mode. It is what every
other execution is tested against, the only one that can show the weights, and where hooks on scores and weights act.
"""

import jax
import jax.numpy as jnp
from jax import lax

from attnx.core.blockwise import load
from attnx.core.operations import row_operands
from attnx.core.program import Data, Program
from attnx.core.tiling import Tiling, Where, over_lanes, pad_to_blocks
from pallas_kernels import tile
from pallas_kernels.parts import At, Exponential, Extent, Root


def scores(program: Program, data: Data):
    """Scores and which pairs are allowed, both [B, K, G, T, S]."""
    (b, k, g, t, _), s = data.query.shape, data.key.shape[2]
    if 0 in (b, k, g, t, s):
        return jnp.zeros((b, k, g, t, s), tile.accumulator_dtype(data.query.dtype)), jnp.zeros((b, k, g, t, s), bool)
    tiling = Tiling(t, s, k)
    data = pad_to_blocks(program, data, tiling)

    def head(q, k, v, rows, at, blocks):
        s = tile.shape_scores(program.parts, tile.raw_scores(program.parts, q, k, at, blocks), at, blocks)
        return s, jnp.broadcast_to(tile.visible(program.parts, at, blocks), s.shape)

    def element(b):
        where = Where(b, 0, 0, 0)
        keys, v, positions, blocks = load(program, data, where, tiling)
        return over_lanes(head, program, data, where, tiling)(data.query[b], keys, v, (), positions, blocks)

    return jax.vmap(element)(jnp.arange(b, dtype=jnp.int32))


def _over_keys(ok, x):
    return jnp.sum(jnp.where(ok, x, 0), axis=-1, keepdims=True)


def _residual(family: Exponential, s, ok, operands):
    """``(num, den, m)`` of a family over whole rows, shifted by the row's safe exponent m."""
    shift = family.shift(s, *operands)
    m = 0.0 if shift is None else lax.stop_gradient(jnp.max(jnp.where(ok, shift, tile.FLOOR), axis=-1, keepdims=True, initial=tile.FLOOR))
    num, den = family.terms(s, jnp.where(ok, m, 0), *operands)
    return num, _over_keys(ok, den), m


def _log(total, m):
    some = total > 0
    return jnp.where(some, m + jnp.log(jnp.where(some, total, 1)), -jnp.inf)


def _extent(s, ok):
    """The largest score and the number of keys of whole rows, 0 without keys."""
    count = jnp.sum(ok, axis=-1, keepdims=True).astype(s.dtype)
    top = jnp.max(jnp.where(ok, s, tile.FLOOR), axis=-1, keepdims=True, initial=tile.FLOOR)
    return lax.stop_gradient(jnp.where(count > 0, top, 0)), count


def _root(which: Root, s, ok, earlier, operands):
    """Bisection on the materialised row; ``custom_root`` supplies the implicit derivative, to any order."""
    top, count = _extent(s, ok)
    some = count > 0
    low, high = which.bracket(top, jnp.where(some, count, 1))

    def excess(r):
        total = _over_keys(ok, which.phi(s, jnp.where(ok, r, 0), earlier, *operands))
        return jnp.where(some, total - which.target, r)

    def solve(f, _):
        def halve(_, ends):
            middle = (ends[0] + ends[1]) / 2
            above = f(middle) >= 0
            return jnp.where(above, middle, ends[0]), jnp.where(above, ends[1], middle)
        low_, high_ = lax.fori_loop(0, 80, halve, (low, high))
        return jnp.where(some, (low_ + high_) / 2, 0)

    return lax.custom_root(excess, jnp.zeros_like(top), solve, lambda linear, y: y / linear(jnp.ones_like(y)))


def statistics(program: Program, data: Data, s, ok):
    """Every row statistic of the call's weights from materialised scores, in order: a tuple of [B, K, G, T, 1]."""
    operands = data.operands.weights
    rows: tuple[jax.Array, ...] = ()
    for which in program.parts.weights.statistics:
        given = tuple(jnp.where(ok, tile.given_rows(r), 0) for r in rows)
        if isinstance(which, Extent):
            r = _extent(s, ok)[which.value]
        elif isinstance(which, Exponential):
            _, total, m = _residual(which, s, ok, operands)
            r = _log(total, m)
        elif isinstance(which, Root):
            r = _root(which, s, ok, given, operands)
        else:
            r = which.finish(_over_keys(ok, which.phi(s, given, *operands)), rows, *row_operands(program, data))
        rows = (*rows, r)
    return rows


def weights(program: Program, data: Data, s, ok):
    """The weights of given scores [B, K, G, T, S], 0 where forbidden, and the residual of exponential ones (else None)."""
    chosen, operands = program.parts.weights, data.operands.weights
    s = jnp.where(ok, s, 0)
    if isinstance(chosen, Exponential):
        num, total, m = _residual(chosen, s, ok, operands)
        return jnp.where(ok & (total > 0), num / jnp.where(total > 0, total, 1), 0), _log(total, m)
    return given(program, data, s, ok, statistics(program, data, s, ok)), None


def given(program: Program, data: Data, s, ok, rows):
    """The weights at given row statistics."""
    chosen = program.parts.weights
    rows = tuple(jnp.where(ok, tile.given_rows(r), 0) for r in rows)
    w = jnp.where(ok, chosen.weight(s, rows, *data.operands.weights), 0)
    if chosen.normalized:
        total = _over_keys(ok, w)
        w = w / jnp.where(total > 0, total, 1)
    return w


def at_pairs(program: Program, data: Data):
    """An ``At`` whose integer arrays broadcast against [B, K, G, T, S]."""
    b, k, g, _, _ = data.query.shape
    return At(jnp.arange(b).reshape(b, 1, 1, 1, 1), jnp.arange(k * g).reshape(1, k, g, 1, 1),
              data.query_positions[:, None, None, :, None], data.key_positions[:, None, None, None, :])


def dropout(program: Program, data: Data, w):
    """The weights with dropout applied."""
    return w * tile.dropout_multiplier(program.parts, at_pairs(program, data), data.seed) if program.parts.dropout_rate else w


def values(program: Program, data: Data, w, unit=1.0):
    """Weighed values [B, K, G, T, Hv]. Where products are rounded, weights are multiples of ``unit``, as of a whole row in one tile."""
    if program.parts.products.exact:
        return jnp.einsum("bkgts,bksv->bkgtv", w.astype(data.value.dtype), data.value, preferred_element_type=w.dtype)
    heads = jax.vmap(program.parts.products.weigh, in_axes=(0, 0, None))
    return jax.vmap(jax.vmap(heads))(w, jnp.broadcast_to(unit, (*w.shape[:-1], 1)), data.value)


def _unit(program: Program, data: Data, s, ok):
    """The weight of a fold's term 1: e^(m - r) for exponential weights, m the row's safe exponent."""
    family = program.parts.weights
    if program.parts.products.exact or not isinstance(family, Exponential):
        return 1.0
    _, total, _ = _residual(family, jnp.where(ok, s, 0), ok, data.operands.weights)
    return 1 / jnp.where(total > 0, total, 1)


def output(program: Program, data: Data, hooks=None):
    """Output and residual; ``hooks`` maps 'scores' and 'weights' to functions ``(value [B, N, T, S], at) -> value``."""
    def hooked(stage, x):
        if not hooks or stage not in hooks:
            return x
        b, k, g, t, s = x.shape
        flat = lambda y: y.reshape(y.shape[0], -1, *y.shape[3:])
        return hooks[stage](flat(x), At(*map(flat, at_pairs(program, data)))).reshape(x.shape)

    s, ok = scores(program, data)
    s = hooked("scores", s)
    w, r = weights(program, data, s, ok)
    return values(program, data, dropout(program, data, hooked("weights", w)), _unit(program, data, s, ok)), r
