"""Weights against exact formulas, forward and backward, their own parameters included."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from agreement import arrays, assert_agree

import attnx
from attnx import masks, weights

pytestmark = pytest.mark.usefixtures("x64")
T, S, N = 13, 11, 4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def heads(x):
    return x[:, None, None]


# name: (weights of parameters, formula of scores, allowed and parameters, parameters)
MEMBERS = {
    "softmax": (lambda: weights.softmax(), oracles.softmax, ()),
    "softmax with one sink": (lambda a: weights.softmax(a), oracles.softmax, (0.3,)),
    "softmax with a sink a head": (lambda a: weights.softmax(a), lambda s, ok, a: oracles.softmax(s, ok, heads(a)), (normal(0, N),)),
    "softmax with one temperature": (lambda t: weights.softmax(temperature=t), lambda s, ok, t: oracles.softmax(s, ok, None, t), (1.7,)),
    "softmax with a temperature a query": (lambda t: weights.softmax(temperature=t), lambda s, ok, t: oracles.softmax(s, ok, None, t[:, None]),
                                           (np.linspace(0.5, 2, T),)),
    "softmax with everything": (lambda a, t: weights.softmax(a, t), lambda s, ok, a, t: oracles.softmax(s, ok, heads(a), t.transpose(0, 2, 1)[..., None]),
                                (normal(0, N), jnp.exp(normal(1, 2, T, N) / 2))),
    "sigmoid": (lambda: weights.sigmoid(), oracles.sigmoid, ()),
    "sigmoid with a bias a head": (lambda b: weights.sigmoid(b), lambda s, ok, b: oracles.sigmoid(s, ok, heads(b)), (normal(0, N),)),
    "relu": (lambda: weights.relu(), oracles.relu, ()),
    "softpick": (lambda: weights.softpick(), oracles.softpick, ()),
    "clipped softmax": (lambda g, z: weights.clipped_softmax(g, z), oracles.clipped_softmax, (-0.06, 1.2)),
    "sparsemax": (lambda: weights.sparsemax(), oracles.sparsemax, ()),
    "entmax-1.5": (lambda: weights.entmax15(), oracles.entmax15, ()),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_formula(name):
    """Output and gradients of a random loss, with forbidden pairs and a row without any key."""
    make, formula, parameters = MEMBERS[name]
    parameters = tuple(jnp.asarray(p) for p in parameters)
    query, key, value, cotangent = arrays()
    allowed = (normal(5, T, S) > -0.7).at[4].set(False)

    def gradients(attend):
        loss = lambda *args: (jnp.vdot(out := attend(*args), cotangent), out)
        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(2 * query, key, value, parameters)

    got, expected = jax.jit(lambda: (
        gradients(lambda q, k, v, p: attnx.attention(q, k, v, mask=masks.explicit(allowed), weights=make(*p), implementation="reference")),
        gradients(lambda q, k, v, p: oracles.attend(lambda s, ok: formula(s, ok, *p), q, k, v, allowed))))()
    assert_agree(got, expected, 1e-12)


@jax.jit
def of_scores(part, s):
    """The weights of rows of scores."""
    return attnx.attend_scores(jnp.asarray(s, jnp.float64), jnp.eye(jnp.shape(s)[-1]), weights=part)


def test_known_values():
    """Worked by hand."""
    log = np.log
    row = lambda *s: np.array([s])
    np.testing.assert_allclose(of_scores(weights.softmax(sink=0.0), log(row(1.0, 2.0, 1.0)))[0], [0.2, 0.4, 0.2])
    np.testing.assert_allclose(of_scores(weights.softpick(), log(row(3.0, 0.5, 1.0)))[0], [0.8, 0, 0], atol=1e-15)
    np.testing.assert_allclose(of_scores(weights.sparsemax(), row(1.0, 0.5, -1.0))[0], [0.75, 0.25, 0])
    # z = s / 2 = (1, 1/2, -2): tau solves (1 - tau)^2 + (1/2 - tau)^2 = 1
    tau = 0.75 - np.sqrt(0.4375)
    np.testing.assert_allclose(of_scores(weights.entmax15(), row(2.0, 1.0, -4.0))[0], [(1 - tau) ** 2, (0.5 - tau) ** 2, 0], atol=1e-15)
    np.testing.assert_allclose(of_scores(weights.clipped_softmax(-0.1, 1.1), log(row(1.0, 1.0, 98.0)))[0], [0, 0, 1])


EQUAL = {"softmax": (weights.softmax(), 1 / S), "sink": (weights.softmax(sink=0.0), 1 / (S + 1)), "sigmoid": (weights.sigmoid(), 1 / 2),
         "relu": (weights.relu(), 0), "softpick": (weights.softpick(), 0), "clipped": (weights.clipped_softmax(-0.03, 1.0), 1.03 / S - 0.03),
         "sparsemax": (weights.sparsemax(), 1 / S), "entmax": (weights.entmax15(), 1 / S)}


@pytest.mark.parametrize("name", EQUAL)
def test_all_zero_scores(name):
    """Every key weighs the same, and gradients are finite."""
    part, expected = EQUAL[name]
    value, gradient = jax.jit(lambda s: (of_scores(part, s), jax.jacrev(lambda s: of_scores(part, s))(s)))(jnp.zeros((1, S)))
    np.testing.assert_allclose(value, np.full((1, S), expected), atol=1e-15)
    assert np.isfinite(gradient).all()


LARGEST = {"softmax": (weights.softmax(), 1.0), "sink": (weights.softmax(sink=0.0), 1.0), "sigmoid": (weights.sigmoid(), 1.0), "relu": (weights.relu(), 1e4),
           "softpick": (weights.softpick(), 1.0), "clipped": (weights.clipped_softmax(-0.03, 1.0), 1.0), "sparsemax": (weights.sparsemax(), 1.0),
           "entmax": (weights.entmax15(), 1.0)}


@pytest.mark.parametrize("name", LARGEST)
def test_huge_scores(name):
    """At scores of +-1e4 the largest takes all, and gradients are finite."""
    part, expected = LARGEST[name]
    s = jnp.array([[1e4, 9e3, -1e4, 0.0]])
    value, gradient = jax.jit(lambda s: (of_scores(part, s), jax.jacrev(lambda s: of_scores(part, s))(s)))(s)
    np.testing.assert_allclose(value[0, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(value[0, 2], 0, atol=1e-15)
    assert np.isfinite(gradient).all()
    if name != "sink":
        alone = of_scores(part, jnp.array([[-1e4, -2e4]]))[0]
        np.testing.assert_allclose(alone, {"sigmoid": [0, 0], "relu": [0, 0], "softpick": [0, 0]}.get(name, [1, 0]), atol=1e-15)


@pytest.mark.parametrize("part", [weights.softmax(), weights.softmax(sink=0.5), weights.sigmoid(), weights.sigmoid(0.5), weights.relu()], ids=repr)
def test_vanishes(part):
    """What a part promises at a score of -inf, the level of a row without keys included."""
    assert part.vanishes and not weights.softpick().vanishes and not weights.softmax(temperature=2.0).vanishes
    operands = [x.array for x in part.operands(None)]

    def terms(s, rows):
        return part.weight(s, rows[:len(part.statistics)], *operands)

    for row in (-1e30, 0.0, 1e30):
        value, slopes = jax.value_and_grad(terms, argnums=(0, 1))(-jnp.inf, (jnp.asarray(row),))
        assert value == 0 and slopes == (0, (0,))


def test_entmax_between_softmax_and_sparsemax():
    """Close to softmax near alpha = 1, and a distribution for every alpha."""
    s = normal(3, 4, S)
    np.testing.assert_allclose(of_scores(weights.entmax(1.0001), s), jax.nn.softmax(s), atol=1e-3)
    for alpha in (1.2, 1.7):
        w = of_scores(weights.entmax(alpha), s)
        np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-10)
        assert (w >= 0).all() and (jnp.diff(jnp.take_along_axis(w, jnp.argsort(s), -1)) >= 0).all()
