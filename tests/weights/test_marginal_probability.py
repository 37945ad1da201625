"""Attention as posterior marginals: every structure against enumeration, what they reduce to, and two edges of queries and keys."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import masks, weights

pytestmark = pytest.mark.usefixtures("x64")
T, S = 3, 4
STRUCTURES = ("categorical", "bernoulli", "competition", "pairs", "chain", "map")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_enumeration(structure):
    """The marginals of all configurations, with a prior that forbids an edge; the means of values; the log of the sum over structures has them as its gradient."""
    s, prior, value = 2 * normal(0, T, S), normal(1, T, S).at[1, 2].set(-jnp.inf), normal(2, 1, S, 1, 5)
    transition = 2 * normal(3, S, S) if structure == "chain" else None
    expected = weights.brute_force_marginals(s, structure=structure, log_prior=prior, transition=transition)
    out, m = weights.marginal_attention(s[None, None], value, structure=structure, log_prior=prior, transition=transition)
    np.testing.assert_allclose(m[0, 0], expected, atol=1e-12)
    divisor = {"pairs": 2, "competition": expected.sum(-1, keepdims=True)}.get(structure, 1)
    np.testing.assert_allclose(out[0, :, 0], expected / divisor @ value[0, :, 0], atol=1e-7)
    if structure != "map":
        step, direction = 1e-5, normal(4, T, S)
        slope = np.vdot(expected, direction)
        ahead, behind = (log_total(s + sign * step * direction, structure, prior, transition) for sign in (1, -1))
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, atol=1e-8)


def log_total(s, structure, prior, transition):
    """The log of the sum over all structures, in closed form."""
    s = s + prior
    if structure in ("categorical", "competition"):
        return jax.nn.logsumexp(s, axis=-1 if structure == "categorical" else 0).sum()
    if structure == "bernoulli":
        return jnp.sum(jnp.where(jnp.isfinite(s), jax.nn.softplus(s), 0))
    if structure == "pairs":
        e = jnp.exp(s)
        return jnp.sum(jnp.log((e.sum(-1) ** 2 - (e**2).sum(-1)) / 2))
    chain = s[0]
    for row in s[1:]:
        chain = jax.nn.logsumexp(chain[:, None] + transition, axis=0) + row
    return jax.nn.logsumexp(chain)


def test_reductions():
    """One edge with a causal prior is causal attention; a chain without transitions is one edge; columns of competition sum to 1, rows of pairs to 2."""
    query, key, value, _ = agreement.arrays(queries=11, value_size=5)
    s = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, 2)) * 5**-0.5
    prior = jnp.where(jnp.tri(11, dtype=bool), 0.0, -jnp.inf)
    out, m = weights.marginal_attention(s, value, log_prior=prior)
    np.testing.assert_allclose(out, attnx.attention(query, key, value, mask=masks.causal()), atol=1e-12)
    narrow = weights.marginal_attention(s.astype(jnp.float32), value.astype(jnp.float32))[0]
    np.testing.assert_allclose(narrow, jax.nn.dot_product_attention(query, key, value), atol=1e-5)
    chain = weights.posterior_edges(s, structure="chain", transition=jnp.zeros((11, 11)), log_prior=prior)
    np.testing.assert_allclose(chain, m, atol=1e-12)
    np.testing.assert_allclose(weights.posterior_edges(s, structure="competition").sum(-2), 1, atol=1e-12)
    np.testing.assert_allclose(weights.posterior_edges(s, structure="pairs").sum(-1), 2, atol=1e-12)


def test_hard():
    """The likeliest edge: one-hot, with the gradient of one edge."""
    s, g = normal(0, 2, 5, 7)
    hard = weights.posterior_edges(s, structure="map")
    np.testing.assert_allclose(hard, jax.nn.one_hot(s.argmax(-1), 7), atol=1e-12)
    slopes = [jax.grad(lambda s: jnp.vdot(weights.posterior_edges(s, structure=structure), g))(s) for structure in ("map", "categorical")]
    np.testing.assert_allclose(*slopes, atol=1e-14)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_extremes(structure):
    """Potentials of hundreds neither overflow nor vanish; rows without edges are zero and no link of a chain; gradients are finite."""
    s = jnp.array([[900.0, 700.0, -500.0, 3.0], [0, 0, 0, 0], [-900, -905, -901, -3000]])
    transition = jnp.zeros((4, 4)).at[0, 0].set(-400.0) if structure == "chain" else None
    mask = jnp.array([True, False, True])[:, None]
    run = lambda s: weights.posterior_edges(s, structure=structure, transition=transition, mask=mask)
    m, slopes = run(s), jax.grad(lambda s: jnp.sum(run(s) ** 2))(s)
    assert np.isfinite(m).all() and np.isfinite(slopes).all() and not m[1].any()
    if structure == "pairs":
        np.testing.assert_allclose(m[0], [1, 1, 0, 0], atol=1e-12)
        np.testing.assert_allclose(m[2].sum(), 2)
    if structure == "chain":
        np.testing.assert_allclose(m[jnp.array([0, 2])], weights.brute_force_marginals(s[jnp.array([0, 2])], structure="chain", transition=transition), atol=1e-12)
        np.testing.assert_allclose(m[2, 0], weights.posterior_edges(s[2:].at[0, 0].add(-400.0), structure="categorical")[0, 0], atol=1e-12)


def test_edge_pairs():
    """Of queries and keys it is the structure of potentials, forward and backward, in tiles; a key alone has all; no more than half where one is certain."""
    query, key, value, cotangent = agreement.arrays(queries=11)

    def materialised(query, key, value):
        s = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, 2)) * 5**-0.5
        return weights.marginal_attention(s, value, structure="pairs", mask=jnp.tri(11, dtype=bool))[0]

    def tiled(*args):
        return attnx.attention(*args, weights=weights.edge_pairs(), mask=masks.causal(), implementation="blockwise", block_sizes=(4, 4))

    got, expected = (jax.jit(jax.value_and_grad(lambda *a: jnp.vdot(f(*a), cotangent), (0, 1, 2)))(query, key, value) for f in (tiled, materialised))
    agreement.assert_agree(got, expected, 1e-10)
    of_scores = lambda *s: attnx.attend_scores(jnp.array([s], jnp.float32), jnp.eye(len(s), dtype=jnp.float32), weights=weights.edge_pairs())[0]
    np.testing.assert_allclose(of_scores(3.0), [1])
    np.testing.assert_allclose(of_scores(2.0, 2.0, -30.0), [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(of_scores(40.0, 1.0, 0.0), [0.5, 0.5 / (1 + np.exp(-1)), 0.5 / (1 + np.e)], atol=1e-6)


def test_edge_pairs_of_certain_keys():
    """However far one key is ahead, slopes are those of the structure, until the others are below the smallest number; then the key has all, and slopes are finite."""
    s, value = jnp.array([0.0, 1.0, 0.0, -2.0], jnp.float32), jnp.arange(4, dtype=jnp.float32).reshape(1, 4, 1, 1)
    one = jnp.ones((1, 1, 1, 1), jnp.float32)
    tiled = lambda s: attnx.attention(one, s.reshape(1, 4, 1, 1), value, weights=weights.edge_pairs(), scale=1.0, implementation="blockwise").sum()
    found = jax.jit(jax.value_and_grad(tiled))
    expected = jax.jit(jax.value_and_grad(lambda s: weights.marginal_attention(s[None, None, None], value, structure="pairs")[0].sum()))
    for gap in (5.0, 30.0, 60.0, 76.0):
        for x, y in zip(found(s.at[0].set(gap)), expected(s.at[0].set(gap))):
            np.testing.assert_allclose(x, y, atol=1e-6)
    for gap in (82.0, 88.0, 110.0):
        out, slopes = found(s.at[0].set(gap))
        assert abs(out) < 1e-6 and jnp.isfinite(slopes).all()


def test_errors():
    """Wrong arguments are named."""
    s, v = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 4, 1, 5))
    for error, match, call in ((ValueError, "structure: expected", lambda: weights.posterior_edges(s, structure="tree")),
                               (ValueError, "transition: expected", lambda: weights.posterior_edges(s, structure="chain")),
                               (ValueError, "transition: expected", lambda: weights.posterior_edges(s, transition=jnp.zeros((4, 4)))),
                               (ValueError, "transition: expected", lambda: weights.posterior_edges(s, structure="chain", transition=jnp.zeros((3, 3)))),
                               (ValueError, "mask, log_prior: expected", lambda: weights.posterior_edges(s, mask=jnp.ones(3, bool))),
                               (TypeError, "mask: expected", lambda: weights.posterior_edges(s, mask=jnp.ones(4))),
                               (ValueError, "value: expected", lambda: weights.marginal_attention(s, v[:, 1:])),
                               (ValueError, "structure: expected", lambda: weights.brute_force_marginals(s[0, 0], structure="tree"))):
        with pytest.raises(error, match=match):
            call()
