"""Softpick: its bounds, Jacobian and limits, tiles and masks; the measures that go with it."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import analysis, masks, weights

pytestmark = pytest.mark.usefixtures("x64")


@jax.jit
def softpick(s, mask=None):
    return attnx.attend_scores(s, jnp.eye(s.shape[-1], dtype=s.dtype), mask=mask, weights=weights.softpick())


def released(s, epsilon=1e-8):
    """The authors' formula, with the largest score taken out."""
    top = s.max(-1, keepdims=True)
    e = np.exp(s - top) - np.exp(-top)
    return np.maximum(e, 0) / (np.abs(e).sum(-1, keepdims=True) + epsilon)


def test_bounds():
    """Weights from 0 to below 1, rows of at most 1; nothing for rows of negative scores, with finite gradients; the released formula."""
    s = 2 * jax.random.normal(jax.random.key(0), (50, 12))
    w = softpick(s)
    assert (w >= 0).all() and (w < 1).all() and (w.sum(-1) <= 1).all() and ((w == 0) == (s <= 0)).all()
    np.testing.assert_allclose(w, released(np.asarray(s)), atol=1e-6)
    negative = -jnp.abs(s) - jnp.array([0.1, 200.0] * 6)
    value, slopes = jax.value_and_grad(lambda s: jnp.sum(softpick(s) ** 2))(negative)
    assert value == 0 and np.isfinite(slopes).all()


def test_jacobian():
    """dw_i / ds_j = e^s_j / Z ([s_i > 0][i = j] - sgn(s_j) w_i)."""
    s = jax.random.normal(jax.random.key(1), (9,))
    w, total = softpick(s[None])[0], jnp.sum(jnp.abs(jnp.exp(s) - 1))
    expected = jnp.exp(s) / total * (jnp.diag((s > 0).astype(float)) - jnp.sign(s) * w[:, None])
    np.testing.assert_allclose(jax.jit(jax.jacrev(lambda s: softpick(s[None])[0]))(s), expected, atol=1e-12)


def test_limits():
    """Softmax where all scores are large; a shift of the scores changes the weights."""
    s = jax.random.normal(jax.random.key(2), (4, 9))
    np.testing.assert_allclose(softpick(s + 30), jax.nn.softmax(s), atol=1e-6)
    assert jnp.abs(softpick(s + 1) - softpick(s)).max() > 0.05


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
def test_tiles(dtype, tolerance):
    """Tiles of any size agree with the definition at scores up to 200 of either sign, forward and backward."""
    query, key, value, cotangent = agreement.arrays(dtype, queries=48, keys=48)
    s = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, 2)) * 5**-0.5
    args = query * (200 / jnp.abs(s).max()).astype(dtype), key, value, cotangent
    expected = agreement.reference(*args, mask=masks.causal(), weights=weights.softpick())
    for size in (16, 48):
        got = agreement.blockwise(*args, mask=masks.causal(), weights=weights.softpick(), block_sizes=(size, size))
        np.testing.assert_allclose(got["out"], expected["out"], atol=tolerance)
        agreement.assert_agree(got, expected, 10 * tolerance)


def test_masked():
    """Masked keys add nothing to the denominator: it is as if they were not there."""
    s = jax.random.normal(jax.random.key(3), (5, 12))
    seen = jnp.arange(12) % 3 > 0
    np.testing.assert_allclose(softpick(s, jnp.broadcast_to(seen, s.shape))[:, seen], softpick(s[:, seen]), atol=1e-14)


def test_measures():
    """Sinks, kurtosis and zeros, counted by hand."""
    w = jnp.stack([jnp.eye(6), jnp.full((6, 6), 1 / 6), jnp.zeros((6, 6)).at[:, 0].set(0.31)])
    np.testing.assert_allclose(analysis.sink_rate(w), 1 / 3)
    np.testing.assert_allclose(analysis.sink_rate(w, threshold=0.15), 1)
    np.testing.assert_allclose(analysis.sparsity(w), (30 + 30) / 108)
    spike = jnp.zeros(1000).at[0].set(1.0)
    np.testing.assert_allclose(analysis.activation_kurtosis(spike), np.mean((spike - 1e-3) ** 4) / np.var(spike) ** 2)
    assert analysis.activation_kurtosis(spike) > 900
