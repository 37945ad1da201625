"""Parts that a user writes - a member of the exponential family, a similarity, statistics, operands of every kind - against dense formulas."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import oracles
import pytest
from agreement import arrays, assert_agree, blockwise, reference
from jax import lax

import attnx
from attnx import masks, scores, weights
from attnx.core import edges, halves
from pallas_kernels.parts import part

pytestmark = pytest.mark.usefixtures("x64")
B, T, S, N, K = 2, 13, 11, 4, 2


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_is(weigh, call, parameters, pair=oracles.dot_products, tolerance=1e-12):
    """Both executions of ``attnx.attention(**call(parameters))``, causal, with all gradients, are the dense formula.

    ``weigh(pair scores, allowed, parameters)`` gives the weights and the log of the normaliser (None outside the exponential family).
    """
    query, key, value, cotangent = arrays()
    allowed = jnp.broadcast_to(jnp.tril(jnp.ones((T, S), bool)), (B, N, T, S))

    @jax.jit
    def dense(query, key, value, parameters):
        def loss(query, key, value, parameters):
            w, r = weigh(pair(query, key), allowed, parameters)
            out = jnp.einsum("bnts,bsnv->btnv", w, jnp.repeat(value, N // K, axis=2))
            r = None if r is None else r.transpose(0, 2, 1)
            return jnp.vdot(out, cotangent) + (0 if r is None else jnp.sum(jnp.sin(r) * cotangent.mean(-1))), (out, r)
        gradients, (out, r) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(query, key, value, parameters)
        return {"out": out, "r": r, "gradients": jax.tree.leaves(gradients)}

    expected = dense(query, key, value, parameters)
    for execute in (blockwise, reference):
        assert_agree(execute(query, key, value, cotangent, mask=masks.causal(), **call(parameters)), expected, tolerance)


# A member of the signed exponential family, with weights of either sign -----------------------------------------------


@part
class Cog(weights.Exponential):
    """w = sgn(s) e^|s| / sum e^|s|."""

    def shift(self, s):
        return jnp.abs(s)

    def terms(self, s, m):
        e = jnp.where(s == 0, 0, jnp.exp(jnp.abs(s) - m))
        return jnp.sign(s) * e, e


def test_signed_exponential():
    """Negative weights, through the fold, its residual and its merging."""
    def weigh(s, ok, _):
        return oracles.cog(s, ok), oracles.log_normaliser(jnp.abs(s), ok)

    assert_is(weigh, lambda _: dict(weights=Cog()), ())


def test_signed_exponential_of_huge_and_no_scores():
    """Scores of +-1e4 neither overflow nor lose their sign; all-zero scores weigh nothing."""
    q, k, v, cotangent = arrays()
    for factor in (1e5, 0.0):
        got, expected = (execute(q * factor, k, v, cotangent, mask=masks.causal(), weights=Cog()) for execute in (blockwise, reference))
        assert_agree(got, expected, 1e-9)
    assert (got["out"] == 0).all() and (got["r"] == -jnp.inf).all()


# A similarity -----------------------------------------------------------------------------------------------------------


@part
class Distance(scores.Similarity):
    """s = -width_n |q - k|^2."""

    width: Any

    def operands(self, sizes):
        return (attnx.Operand(self.width, ("head",)),)

    def pair(self, q, k, at, width):
        return -width * ((q[:, None] - k[None]) ** 2).sum(-1)


def test_similarity():
    """It replaces the dot product (its scale too) wherever it stands among the scores; those that follow see its result."""
    def pair(query, key):
        return ((query[:, :, None] - jnp.repeat(key, N // K, axis=2)[:, None]) ** 2).sum(-1).transpose(0, 3, 1, 2)

    def weigh(distance, ok, parameters):
        bias, width = parameters
        s = bias - width[:, None, None] * distance
        return oracles.softmax(s, ok), oracles.log_normaliser(s, ok)

    assert_is(weigh, lambda p: dict(scores=(scores.bias(p[0]), Distance(p[1]))), (normal(1, T, S), jnp.exp(normal(2, N))), pair)


# Weights given row statistics -------------------------------------------------------------------------------------------


def _square(s, earlier, epsilon):
    return jnp.maximum(s, 0) ** 2


def _plus(total, earlier, epsilon):
    return total + epsilon


@part
class Power(weights.Weights):
    """w = relu(s)^2 / (epsilon + sum relu(s)^2)."""

    epsilon: Any
    statistics = (weights.Sum(_square, _plus),)

    def operands(self, sizes):
        return (attnx.Operand(self.epsilon, ("head",)),)

    def weight(self, s, statistics, epsilon):
        return jnp.maximum(s, 0) ** 2 / jnp.where(statistics[0] > 0, statistics[0], 1)


def test_explicit_statistic():
    """A sum, with a learned constant per head in its finish."""
    assert_is(lambda s, ok, epsilon: (oracles.power(s, ok, epsilon[:, None, None]), None), lambda p: dict(weights=Power(p)), jnp.exp(normal(3, N)))


def _one(s, earlier):
    return jnp.ones_like(s)


def _itself(s, earlier):
    return s


def _deviation(s, earlier):
    return (s - earlier[1]) ** 2


def _keep(total, earlier):
    return total


def _mean(total, earlier):
    return total / jnp.maximum(earlier[0], 1)


@part
class Standardised(weights.Weights):
    """w = sigmoid((s - mean) / (1 + variance)) over the allowed keys."""

    statistics = (weights.Sum(_one, _keep), weights.Sum(_itself, _mean), weights.Sum(_deviation, _mean))

    def weight(self, s, statistics):
        return jax.nn.sigmoid((s - statistics[1]) / (1 + statistics[2]))


def test_chained_statistics():
    """Count, mean and variance of a row's scores, each using those before it."""
    def weigh(s, ok, _):
        mean = jnp.mean(s, -1, keepdims=True, where=ok)
        variance = jnp.mean((s - mean) ** 2, -1, keepdims=True, where=ok)
        return oracles.sigmoid((s - mean) / (1 + variance), ok), None

    assert_is(weigh, lambda _: dict(weights=Standardised()), ())


def _softplus(s, r, earlier):
    return jax.nn.softplus(s - r)


def _around(top, count):
    return top - jnp.log(jnp.expm1(2.0)), top - jnp.log(jnp.expm1(2.0 / count))


@part
class Budget(weights.Weights):
    """w = softplus(s - r), r such that a row's weights sum to 2."""

    statistics = (weights.Root(_softplus, 2.0, _around),)

    def weight(self, s, statistics):
        return jax.nn.softplus(s - statistics[0])


def test_root_statistic():
    """A root without a closed form; the dense derivative is that of one exact Newton step."""
    def weigh(s, ok, _):
        def excess(r):
            return jnp.sum(jnp.where(ok, jax.nn.softplus(s - r), 0), -1, keepdims=True) - 2

        def halve(_, ends):
            middle = (ends[0] + ends[1]) / 2
            above = excess(middle) > 0
            return jnp.where(above, middle, ends[0]), jnp.where(above, ends[1], middle)

        low = jnp.full(s.shape[:-1] + (1,), -20.0)
        r = lax.stop_gradient(lax.fori_loop(0, 70, halve, (low, -low))[0])
        slope = lax.stop_gradient(jnp.sum(jnp.where(ok, jax.nn.sigmoid(s - r), 0), -1, keepdims=True))
        return jnp.where(ok, jax.nn.softplus(s - (r + excess(r) / slope)), 0), None

    assert_is(weigh, lambda _: dict(weights=Budget()), (), tolerance=1e-10)


@part
class Peaked(weights.Weights):
    """w = e^((s - top) log n) over its sum, n the number of allowed keys and top a scale that cancels."""

    statistics = (weights.Extent.MAXIMUM, weights.Extent.COUNT)
    normalized = True

    def weight(self, s, statistics):
        top, count = statistics
        return jnp.exp((s - top) * jnp.log(jnp.maximum(count, 1)))


def test_extents_and_normalised_weights():
    """The largest score and the number of keys of a row; weights that are divided by their sum."""
    def weigh(s, ok, _):
        return oracles.softmax(s * jnp.log(ok.sum(-1, keepdims=True)), ok), None

    assert_is(weigh, lambda _: dict(weights=Peaked()), ())


def test_extents_and_normalised_weights_over_edges():
    """Over edges, the same weights are softmax with the number of edges as its temperature's inverse."""
    s, ids = normal(0, 9, 2), jnp.array([0, 2, 2, 0, -1, 2, 0, 2, 3])
    count = jnp.array([3, 0, 4, 1, 0])
    expected = edges.segment_softmax(s * jnp.log(jnp.maximum(count, 1))[ids][:, None], ids, 4)
    assert_agree(edges.segment_weights(s, ids, 4, Peaked()), expected, 1e-12)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(4), masks.causal() & masks.documents(jnp.arange(T)[None] // 5)], ids=repr)
def test_visible_counts(mask):
    """By formula, and by a pass over the pairs, padding left out."""
    query, key = jnp.zeros((B, T, N, 1)), jnp.zeros((B, T, K, 1))
    for positions in (None, jnp.where(jnp.arange(T) < T - 3, jnp.arange(T), -1)):
        given = dict(query_positions=positions, key_positions=positions)
        seen = attnx.attention_weights(query, key, mask=mask, weights=weights.sigmoid(), **given) > 0
        got = halves.visible_counts(mask, B, T, T, heads=N, **given)
        assert_agree(got, seen.sum(-1).transpose(0, 2, 1))


# Operands ---------------------------------------------------------------------------------------------------------------


def _add(s, at, full, columns, offsets, level, rows, basis, whole, constant):
    return s + full + columns * level + offsets + jnp.sum(rows * basis, axis=-1) + whole[0, 0, 1, at.head] + constant


def test_operands():
    """One of every kind: full, per key-value head, over offsets, a size-1 offset, rows and columns with an axis of their own, whole, scalar."""
    parameters = [normal(1, B, N, T, S), normal(2, S, K), normal(3, T + S - 1, N), normal(4, 1), normal(5, T, 3), normal(6, 3, B, S), normal(7, 2, N), normal(8)]
    axes = [("batch", "head", "query", "key"), ("key", "kv_head"), ("offset", "head"), ("offset",), ("query", None), (None, "batch", "key"), (None, None), ()]

    def weigh(s, ok, parameters):
        full, columns, offsets, level, rows, basis, whole, constant = parameters
        offset = jnp.arange(S) - jnp.arange(T)[:, None] + T - 1
        s = (s + full + jnp.repeat(columns.T, N // K, axis=0)[:, None] * level + offsets[offset].transpose(2, 0, 1)
             + jnp.einsum("tc,cbs->bts", rows, basis)[:, None] + whole[1][:, None, None] + constant)
        return oracles.softmax(s, ok), oracles.log_normaliser(s, ok)

    call = lambda parameters: dict(scores=scores.elementwise(_add, *(attnx.Operand(p, a) for p, a in zip(parameters, axes))))
    assert_is(weigh, call, parameters)


def _near(at, widths, factor):
    return jnp.abs(at.query - at.key) <= widths * factor


def test_predicate_with_operands():
    """A predicate sees its parameters by block; its real ones have a gradient of zero."""
    q, k, v, _ = arrays()
    widths = jax.random.randint(jax.random.key(1), (B, N, T), -1, 6)
    allowed = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S)) <= widths[..., None] * 1.5

    def ours(implementation, q, factor):
        mask = masks.predicate(_near, attnx.Operand(widths, ("batch", "head", "query")), factor)
        out = attnx.attention(q, k, v, mask=mask, implementation=implementation, block_sizes=(4, 4))
        return jnp.sin(out).sum(), out

    def formula(q, factor):
        out = oracles.attend(oracles.softmax, q, k, v, allowed)
        return jnp.sin(out).sum() + 0 * factor, out

    run = lambda f: jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(q, jnp.asarray(1.5))
    got, expected = jax.jit(lambda: ([run(partial(ours, name)) for name in ("blockwise", "reference")], run(formula)))()
    assert_agree(got, [expected] * 2, 1e-12)
