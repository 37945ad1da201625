"""Clipped softmax and gated heads: what they reduce to, their exact zeros, the layers around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, weights
from attnx.nn import Attention

GAMMA, ZETA = -0.06, 1.2


@jax.jit
def of_scores(part, s, mask=None):
    return attnx.attend_scores(s, jnp.eye(s.shape[-1], dtype=s.dtype), mask=mask, weights=part)


def test_clipped(x64):
    """Softmax at (0, 1); else within [0, 1], exactly 0 below the threshold and without gradient there."""
    s = 2 * jax.random.normal(jax.random.key(0), (5, 9))
    np.testing.assert_allclose(of_scores(weights.clipped_softmax(0.0, 1.0), s), jax.nn.softmax(s), atol=1e-14)
    part = weights.clipped_softmax(GAMMA, ZETA)
    w, slopes = jax.jit(lambda s: (of_scores(part, s), jax.vmap(jax.jacrev(lambda s: of_scores(part, s[None])[0]))(s)))(s)
    low, high = jax.nn.softmax(s) < -GAMMA / (ZETA - GAMMA), jax.nn.softmax(s) > (1 - GAMMA) / (ZETA - GAMMA)
    assert low.any() and high.any() and (w >= 0).all() and (w <= 1).all()
    assert (w[low] == 0).all() and (slopes[low] == 0).all() and (w[high] == 1).all() and (slopes[high] == 0).all()
    assert (w[~low] > 0).all() and (jnp.abs(w.sum(-1) - 1) > 1e-3).all()  # not normalised again


def test_uniform_and_masked(x64):
    """A uniform row, and keys that are masked: they weigh 0, never gamma."""
    for length, alpha in ((8, 2.0), (8, 9.0)):
        w = of_scores(weights.clipped_softmax(alpha=alpha, length=length), jnp.zeros((1, length)))
        np.testing.assert_allclose(w, np.full((1, length), max(0, (1 + alpha / length) / length - alpha / length)), atol=1e-15)
    q = k = jnp.zeros((1, 6, 1, 4))
    w = attnx.attention_weights(q, k, mask=masks.causal(), weights=weights.clipped_softmax(GAMMA, ZETA))[0, 0]
    assert (w[jnp.triu_indices(6, 1)] == 0).all()
    np.testing.assert_allclose(w[2, :3], (ZETA - GAMMA) / 3 + GAMMA, rtol=1e-12)


SHAPES = {"linear": (4, 4), "mlp": (4, 1), "all_heads": (16, 4)}


def gate_by_hand(x, p, predictor):
    """Logits a head at a time."""
    logits = []
    for n in range(4):
        own = x[..., 4 * n:4 * n + 4]
        if predictor == "mlp":
            own = np.maximum(own @ p["hidden_kernel"][n] + p["hidden_bias"][n], 0)
        logits.append((x @ p["kernel"][:, n] if predictor == "all_heads" else own @ p["kernel"][n]) + p["bias"][n])
    return np.stack(logits, -1)


@pytest.mark.parametrize("predictor", SHAPES)
def test_gates(x64, predictor):
    """Every predictor and kind against the formula, head by head; +40 opens all, -40 closes all."""
    x, found = jax.random.normal(jax.random.key(0), (2, 5, 16)), jax.random.normal(jax.random.key(1), (2, 5, 4, 3))
    p = weights.init_gate(jax.random.key(2), 16, 4, predictor=predictor, initial=0.3, dtype=jnp.float64)
    p = {name: value + 0.1 for name, value in p.items()}
    assert p["kernel"].shape == SHAPES[predictor]
    logits = gate_by_hand(np.asarray(x), jax.tree.map(np.asarray, p), predictor)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    where = jnp.arange(5) < jnp.array([[5], [3]])
    mean = lambda counts: np.sum(logits * counts[..., None], 1, keepdims=True) / np.sum(counts, 1)[:, None, None]
    for kind, seen, expected in (("per_token", None, logits), ("per_head", None, logits.mean(1, keepdims=True)), ("per_head", where, mean(np.asarray(where))),
                                 ("unconditional", None, np.asarray(p["bias"]))):
        got = weights.gated_attention(found, x, p, kind=kind, predictor=predictor, where=seen, scale=2.0)
        np.testing.assert_allclose(got, 2 * found * sigmoid(expected)[..., None], atol=1e-13)
    for bias, expected in ((40.0, found), (-40.0, 0 * found)):
        still = {name: jnp.zeros_like(value) for name, value in p.items()} | {"bias": jnp.full(4, bias)}
        np.testing.assert_allclose(weights.gated_attention(found, x, still, predictor=predictor), expected, atol=1e-12)


@pytest.mark.parametrize("predictor", SHAPES)
def test_fine_tuning(predictor):
    """Gates put into a layer leave it as it was to 1e-2, whatever they start from."""
    base = Attention(16, 4, mechanism=attnx.pairs(), rngs=nnx.Rngs(0))
    x = 0.2 * jax.random.normal(jax.random.key(0), (1, 6, 16))
    layer = weights.GatedAttention(16, 4, mechanism=attnx.pairs(), predictor=predictor, fine_tune=True, initial=0.25, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        setattr(layer, name, getattr(base, name))
    assert 0 < jnp.abs(layer(x) - base(x)).max() < 1e-2


def test_layer():
    """The gate reads the layer's input; steps find what the call finds; a gate by head leaves padding out and has no steps."""
    causal = attnx.pairs(mask=masks.causal())
    layer = weights.GatedAttention(16, 4, mechanism=causal, predictor="mlp", num_kv_heads=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    state = layer.init_state(2, 6)
    state, first = layer.step(state, x[:, :4])
    _, rest = layer.step(state, x[:, 4:])
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), layer(x), atol=1e-6)
    seen = []
    layer(x, hooks={"output": lambda found, layer, at: seen.append(found) or found})
    np.testing.assert_allclose(layer(x), layer.out(layer.head_gate(seen[0], x)), atol=1e-6)
    by_head = weights.GatedAttention(16, 4, mechanism=attnx.pairs(), kind="per_head", rngs=nnx.Rngs(0))
    positions = jnp.where(jnp.arange(6) < 4, jnp.arange(6), -1)
    np.testing.assert_allclose(by_head(x, positions=positions)[:, :4], by_head(x[:, :4]), atol=1e-6)
    with pytest.raises(NotImplementedError, match="per_head"):
        by_head.init_state(2, 6)


def test_errors():
    """Wrong arguments are named."""
    found, x = jnp.ones((1, 5, 4, 3)), jnp.ones((1, 5, 16))
    p = weights.init_gate(jax.random.key(0), 16, 4)
    for match, call in (("kind: expected", lambda: weights.gated_attention(found, x, p, kind="token")),
                        ("predictor: expected", lambda: weights.gated_attention(found, x, p, predictor="none")),
                        ("x: expected shape", lambda: weights.gated_attention(found, x[:, 1:], p)),
                        ("x: expected a number", lambda: weights.gated_attention(found, x[..., 1:], p)),
                        ("num_heads: expected", lambda: weights.init_gate(jax.random.key(0), 15, 4)),
                        ("initial: expected", lambda: weights.init_gate(jax.random.key(0), 16, 4, initial=1.0)),
                        ("alpha: expected", lambda: weights.clipped_softmax(-0.1, alpha=4.0, length=8)),
                        ("alpha: expected", lambda: weights.clipped_softmax(alpha=4.0))):
        with pytest.raises(ValueError, match=match):
            call()
