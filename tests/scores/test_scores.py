"""Scores against their formulas and against published facts."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from agreement import arrays, assert_agree

import attnx
from attnx import scores

T, S, N = 13, 11, 4
OFFSET = np.arange(S) - np.arange(T)[:, None]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def buckets(offset, count, furthest, bidirectional):
    """The T5 bucket in whole numbers: exact + floor((count - exact) log(d / exact) / log(furthest / exact)), without a logarithm."""
    start = 0
    if bidirectional:
        count //= 2
        start = count if offset > 0 else 0
    distance = abs(offset) if bidirectional else max(-offset, 0)
    exact = count // 2
    if distance < exact:
        return start + distance
    steps = [i for i in range(count - exact) if distance ** (count - exact) * exact**i >= furthest**i * exact ** (count - exact)]
    return start + exact + steps[-1]


CHANGES = {
    "bias": (scores.bias, lambda s, bias: s + bias, lambda: normal(0, 2, N, T, S)),
    "bias of heads and rows": (scores.bias, lambda s, bias: s + bias, lambda: normal(0, N, T, 1)),
    "alibi": (scores.alibi, lambda s, slopes: s - slopes[:, None, None] * np.abs(OFFSET), lambda: normal(0, N)),
    "soft_cap": (scores.soft_cap, lambda s, cap: cap * jnp.tanh(s / cap), lambda: jnp.asarray(0.7)),
    "t5, both directions": (lambda table: scores.t5_bias(table, max_distance=9),
                            lambda s, table: s + table[np.vectorize(buckets)(OFFSET, 8, 9, True)].transpose(2, 0, 1), lambda: normal(0, 8, N)),
    "t5, one direction": (lambda table: scores.t5_bias(table, max_distance=9, bidirectional=False),
                          lambda s, table: s + table[np.vectorize(buckets)(OFFSET, 8, 9, False)].transpose(2, 0, 1), lambda: normal(0, 8, N)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CHANGES)
def test_formula(name):
    """The attention and its gradients, the score's own parameters included."""
    make, formula, parameters = CHANGES[name]
    query, key, value, cotangent = arrays()

    def gradients(attend):
        loss = lambda *args: (jnp.vdot(attend(*args), cotangent), attend(*args))
        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(query, key, value, parameters())

    got, expected = jax.jit(lambda: (
        gradients(lambda q, k, v, p: attnx.attention(q, k, v, scores=make(p), implementation="reference")),
        gradients(lambda q, k, v, p: oracles.attend(oracles.softmax, q, k, v, change=lambda s: formula(s, p)))))()
    assert_agree(got, expected, 1e-12)


def test_alibi_slopes():
    """The paper's: 1/2 ... 1/256 for 8 heads; for 12, those and every other one of 16 heads."""
    np.testing.assert_allclose(scores.alibi_slopes(8), 0.5 ** np.arange(1, 9), rtol=1e-7)
    np.testing.assert_allclose(scores.alibi_slopes(12)[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]), rtol=1e-6)
    np.testing.assert_allclose(scores.alibi_slopes(1), [2.0**-8], rtol=1e-7)
    assert all(len(scores.alibi_slopes(n)) == n for n in range(1, 40))
    np.testing.assert_array_equal(scores.alibi(16).slopes, scores.alibi_slopes(16))


def test_t5_buckets_of_the_published_models():
    """32 buckets, distance 128: 8 near ones a side, far ones from distances 8, 12, 16, 23, 32, 46, 64, 91 (encoder), 16 and 16, 19, ... (decoder)."""
    starts = lambda offsets, **kw: [int(offsets[i]) for i in np.flatnonzero(np.diff(scores.t5_bucket(offsets, **kw), prepend=-1))]
    distances = np.arange(300)
    assert starts(distances)[1:] == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(scores.t5_bucket(distances[1:]), 16 + scores.t5_bucket(-distances[1:]))
    assert starts(-distances, bidirectional=False)[15:] == [-15, -16, -19, -21, -24, -27, -31, -35, -40, -46, -52, -59, -67, -77, -87, -99, -113]
    assert (scores.t5_bucket(distances, bidirectional=False) == 0).all()


@pytest.mark.parametrize("count, furthest, bidirectional", [(32, 128, True), (32, 128, False), (64, 512, True), (6, 30, True), (5, 20, False)])
def test_t5_buckets(count, furthest, bidirectional):
    """Exact arithmetic, at every power that float32 logarithms could round across."""
    offsets = np.arange(-2 * furthest, 2 * furthest + 1)
    expected = [buckets(int(o), count, furthest, bidirectional) for o in offsets]
    np.testing.assert_array_equal(scores.t5_bucket(offsets, count, furthest, bidirectional), expected)
