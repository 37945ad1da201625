"""Cog attention: what it reduces to, its gradient, its numbers, other people's code, the layers of a Cogformer; the measures that go with it."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import analysis, masks, weights
from attnx.models import Decoder, TransformerConfig

SIZES = dict(queries=48, keys=48)


@jax.jit
def cog(s, mask=None):
    return attnx.attend_scores(s, jnp.eye(s.shape[-1], dtype=s.dtype), mask=mask, weights=weights.cog())


def test_reductions(x64):
    """Softmax where no score is negative; odd in the query; absolute weights of sum 1; a constant added to a row changes it."""
    s = jax.random.normal(jax.random.key(0), (20, 12))
    np.testing.assert_allclose(cog(jnp.abs(s)), jax.nn.softmax(jnp.abs(s)), atol=1e-14)
    np.testing.assert_allclose(cog(-s), -cog(s), atol=0)
    np.testing.assert_allclose(jnp.abs(cog(s)).sum(-1), 1, atol=1e-14)
    assert (jnp.abs(cog(s).sum(-1)) < 1).all() and jnp.abs(cog(s + 1) - cog(s)).max() > 0.05


def test_gradient(x64):
    """Softmax's Jacobian in |s| between signs."""
    s, g = jax.random.normal(jax.random.key(1), (2, 7, 9))
    sign, p = jnp.sign(s), jax.nn.softmax(jnp.abs(s))
    signed = g * sign
    expected = sign * p * (signed - jnp.sum(p * signed, -1, keepdims=True))
    np.testing.assert_allclose(jax.jit(jax.grad(lambda s: jnp.vdot(cog(s), g)))(s), expected, atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
def test_tiles(x64, dtype, tolerance):
    """Tiles of any size agree with the definition at scores up to 50, forward and backward."""
    query, key, value, cotangent = agreement.arrays(dtype, **SIZES)
    s = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, 2)) * 5**-0.5
    args = query * (50 / jnp.abs(s).max()).astype(dtype), key, value, cotangent
    expected = agreement.reference(*args, mask=masks.causal(), weights=weights.cog())
    for size in (16, 64):
        got = agreement.blockwise(*args, mask=masks.causal(), weights=weights.cog(), block_sizes=(size, size))
        np.testing.assert_allclose(got["out"], expected["out"], atol=tolerance)
        agreement.assert_agree(got, expected, 10 * tolerance)


def test_extremes():
    """Scores of +-1e4 do not overflow, rows without keys are zero, a masked key is as if it were not there - not a weight at |-inf| or at 0; a score of 0."""
    s = jnp.array([[1e4, -1e4, 3.0, 0.0], [1.0, -2.0, 0.0, 0.5]])
    seen = jnp.array([[True, True, True, True], [False] * 4])
    value, slopes = jax.value_and_grad(lambda s: jnp.sum(cog(s, seen) ** 2))(s)
    assert np.isfinite(value) and np.isfinite(slopes).all() and not slopes[1].any()
    np.testing.assert_allclose(cog(s, seen), [[0.5, -0.5, 0, 0], [0, 0, 0, 0]], atol=1e-7)
    np.testing.assert_allclose(cog(s, jnp.arange(4) != 1)[1, [0, 2, 3]], cog(s[1:, jnp.array([0, 2, 3])])[0], atol=1e-7)
    kept = attnx.attend_scores(jnp.array([[0.0, -jnp.log(3.0)]]), jnp.eye(2), weights=weights.cog(zero="keep"))
    np.testing.assert_allclose(kept, [[0.25, -0.75]], atol=1e-6)
    np.testing.assert_allclose(cog(jnp.array([[0.0, -jnp.log(3.0)]])), [[0, -1]], atol=1e-6)


def test_oracle():
    """Another library's."""
    attend = pytest.importorskip("x_transformers.attend")
    torch = pytest.importorskip("torch")
    query, key, value, _ = agreement.arrays(jnp.float32, heads=4, kv_heads=4, queries=11)
    turned = lambda x: torch.tensor(np.asarray(x)).permute(0, 2, 1, 3)
    expected, _ = attend.Attend(cog_signed=True, causal=True, heads=4)(*map(turned, (query, key, value)))
    got = attnx.attention(query, key, value, mask=masks.causal(), weights=weights.cog())
    np.testing.assert_allclose(got.transpose(0, 2, 1, 3), expected, atol=1e-5)


def test_cogformer():
    """Softmax where it is kept, Cog elsewhere; a model of them reads token by token what it reads at once."""
    layers = weights.cogformer_mechanisms(3)
    assert [type(layer.weights).__name__ for layer in layers] == ["Softmax", "Cog", "Softmax"]
    chosen = weights.cogformer_mechanisms(3, keep_softmax_layers=(1,), mask=None, zero="keep")
    assert [type(layer.weights).__name__ for layer in chosen] == ["Cog", "Softmax", "Cog"] and chosen[0].mask is None and chosen[0].weights.zero == "keep"
    model = Decoder(TransformerConfig(features=16, num_layers=3, num_heads=2), layers, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, 6), 0, 256)
    graph, params = nnx.split(model)

    @jax.jit
    def both(params):
        model = nnx.merge(graph, params)
        state, first = model.step(model.init_state(1, 6), tokens[:, :4])
        _, second = model.step(state, tokens[:, 4:5])
        return model(tokens)[:, :5], jnp.concatenate([first, second], 1)

    whole, stepped = both(params)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)


def test_measures():
    """Counted by hand."""
    w = jnp.array([[0.6, -0.4, 9.0], [-0.5, 0.5, -9.0]])
    np.testing.assert_allclose(analysis.negative_mass(w, where=jnp.arange(3) < 2), 0.9 / 2, rtol=1e-6)
    assert analysis.negative_mass(jnp.zeros((2, 2))) == 0
    states = jnp.array([[1.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])
    np.testing.assert_allclose(analysis.layer_cosine_collapse(jnp.stack([states, 0 * states])), [(0.5**0.5 - 1) / 2, 0], atol=1e-6)


def test_errors():
    """Wrong arguments are named."""
    keep = lambda layer: weights.cogformer_mechanisms(3, keep_softmax_layers=(layer,))
    for match, call in (("zero: expected", lambda: weights.cog("some")), ("keep_softmax_layers: expected", lambda: keep(3)),
                        ("keep_softmax_layers: expected", lambda: keep("middle")),
                        ("states: expected", lambda: analysis.layer_cosine_collapse(jnp.ones((1, 4))))):
        with pytest.raises(ValueError, match=match):
            call()
