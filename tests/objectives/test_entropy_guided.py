"""Entropy-guided attention: entropies, the loss by hand, temperatures, the block without norms and activations."""

import functools

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, objectives
from attnx.positions import Rotary


def test_entropy(x64):
    """Of maps, and of queries and keys without maps: log n of equal weights, 0 of a certain one, the log normaliser less the mean score; with gradients."""
    query, key, _, _ = agreement.arrays()
    np.testing.assert_allclose(objectives.attention_entropy(jnp.full((1, 8), 1 / 8)), np.log(8), rtol=1e-12)
    assert objectives.attention_entropy(jnp.eye(5)).max() < 1e-7
    np.testing.assert_allclose(objectives.attention_entropy(jnp.full((1, 4), 0.25), mask=jnp.arange(4) < 2), 0.5 * np.log(4), rtol=1e-12)
    temperature = jnp.exp(jax.random.normal(jax.random.key(0), (2, 13, 4)))
    mask = masks.causal()

    def of_maps(query, key, temperature):
        w = attnx.attention_weights(query, key, mask=mask, weights=attnx.weights.softmax(temperature=temperature))
        return objectives.attention_entropy(w).transpose(0, 2, 1)

    def fused(query, key, temperature, implementation="blockwise"):
        return objectives.row_entropy(query, key, temperature=temperature, mask=mask, implementation=implementation, block_sizes=(4, 4))

    def gradients(f):
        loss = lambda *args: jnp.sum(jnp.sin(f(*args)))
        return jax.jit(lambda *args: (f(*args), jax.grad(loss, (0, 1, 2))(*args)))(query, key, temperature)

    expected = gradients(of_maps)
    agreement.assert_agree(gradients(fused), expected, 1e-11)
    agreement.assert_agree(gradients(functools.partial(fused, implementation="reference")), expected, 1e-11)
    s = jnp.einsum("btnh,bsnh->btns", query, jnp.repeat(key, 2, 2)) * 5**-0.5
    np.testing.assert_allclose(objectives.row_entropy(query, key), jax.nn.logsumexp(s, -1) - jnp.sum(jax.nn.softmax(s) * s, -1), atol=1e-12)


def test_large_scores():
    """In float32 at scores of a thousand, where the normaliser and the mean score are large and nearly equal."""
    query, key = 20 * jax.random.normal(jax.random.key(0), (2, 1, 32, 1, 8))
    exact = objectives.attention_entropy(attnx.attention_weights(query, key))[:, 0]
    np.testing.assert_allclose(objectives.row_entropy(query, key)[..., 0], exact, atol=1e-3)


def test_loss(x64):
    """By hand, for two heads of one layer and three rows; nothing within the margin; layers have thresholds of their own."""
    largest = np.log(3)
    entropies = largest * jnp.array([[0.5, 0.9], [0.6, 0.8], [0.1, 0.4]])[None, None]  # [L, B, T, N]
    thetas = jnp.array([[0.5, 0.5]])
    loss = functools.partial(objectives.entropy_reg_loss, coefficient=2.0)
    rows = largest**2 * (0.4**2 + 0.4**2 + 0.3**2) / 2  # deviations 0, 0.1, -0.4 and 0.4, 0.3, -0.1; mean over heads
    np.testing.assert_allclose(loss(entropies, thetas), 2 * rows, rtol=1e-12)
    np.testing.assert_allclose(loss(entropies, thetas, reduction="mean"), 2 * rows / 3, rtol=1e-12)
    means = largest**2 * 0.2**2 / 2  # deviations -0.1 and 0.2
    np.testing.assert_allclose(loss(entropies, thetas, granularity="head_mean", margin=0.19), 2 * means, rtol=1e-12)
    assert loss(entropies, thetas, granularity="head_mean", margin=0.21) == 0 and loss(entropies, thetas, margin=0.41) == 0
    where = jnp.array([[True, True, False]])
    np.testing.assert_allclose(loss(entropies, thetas, where=where), 2 * largest**2 * (0.4**2 + 0.3**2) / 2, rtol=1e-12)
    np.testing.assert_allclose(loss(entropies, thetas, where=where), loss(entropies.at[:, :, 2].set(jnp.nan), thetas, where=where), rtol=1e-12)
    twice = jnp.concatenate([entropies] * 2, 1)
    for granularity in ("per_query", "head_mean"):
        run = functools.partial(loss, thresholds=thetas, granularity=granularity, margin=0.05)
        np.testing.assert_allclose(run(twice), 2 * run(entropies), rtol=1e-12)
        np.testing.assert_allclose(run(twice, reduction="mean"), run(entropies, reduction="mean"), rtol=1e-12)
    two = loss(jnp.concatenate([entropies] * 2), jnp.array([[0.5, 0.5], [0.1, 0.9]]))
    np.testing.assert_allclose(two, (loss(entropies, thetas) + loss(entropies, jnp.array([[0.1, 0.9]]))) / 2, rtol=1e-12)
    slopes = jax.grad(lambda thetas: loss(entropies[:, :, :1], thetas, margin=0.0, context=3))(jnp.array([[0.2, 0.95]]))
    assert slopes[0, 0] < 0 < slopes[0, 1]  # the sign of theta log T - E
    causal = jnp.log(jnp.arange(1.0, 4))[None, None, :, None] * jnp.array([0.5, 0.5])
    assert loss(causal, thetas, per_query_max=True, margin=1e-6) == 0 and loss(causal, thetas, margin=1e-6) > 0


def test_temperature(x64):
    """1 is softmax attention, near 0 entropies vanish, large ones are log n; too small ones are held."""
    query, key, value, _ = agreement.arrays(queries=11)
    run = functools.partial(objectives.temperature_attention, query, key, value, mask=masks.causal())
    np.testing.assert_allclose(run(jnp.ones((4, 11))), attnx.attention(query, key, value, mask=masks.causal()), atol=1e-13)
    np.testing.assert_allclose(run(jnp.full((4, 11), -1.0)), run(jnp.full((4, 11), 1e-3)), atol=1e-13)
    entropy = functools.partial(objectives.row_entropy, query, key, mask=masks.causal())
    assert jnp.median(entropy(temperature=1e-3)) < 1e-6
    np.testing.assert_allclose(entropy(temperature=1e6), jnp.broadcast_to(jnp.log(jnp.arange(1.0, 12))[:, None], (2, 11, 4)), atol=1e-5)


def test_bins():
    """Quarters of what there can be."""
    np.testing.assert_allclose(objectives.head_entropy_bins(np.log(100) * jnp.array([[0.0, 0.2], [0.3, 1.0], [0.76, 0.6]]), 100), [2 / 6, 1 / 6, 1 / 6, 2 / 6], rtol=1e-6)


@pytest.mark.parametrize("norm", ["scaled", "weight", "spectral", None])
def test_block(norm):
    """Attention and one matrix, each added; prefill and steps find what the call finds; temperatures go by position, and beyond the last are its own."""
    attention = objectives.TemperatureAttention(16, 4, max_length=5, initial=0.5, num_kv_heads=2, position=Rotary(), rngs=nnx.Rngs(0))
    attention.temperature[...] = jnp.exp(jax.random.normal(jax.random.key(1), (4, 5)))
    block = objectives.SoftmaxOnlyBlock(16, attention=attention, ffn_norm=norm, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    graph, params = nnx.split(block)

    @jax.jit
    def run(params):
        block = nnx.merge(graph, params)
        state, first = block.step(block.init_state(2, 7), x[:, :4])
        state, second = block.step(state, x[:, 4:6])
        _, third = block.step(state, x[:, 6:])
        return block(x), jnp.concatenate([first, second, third], 1), block.attention(x[:, 3:], positions=jnp.arange(3, 7)), block.attention(x)

    whole, stepped, moved, found = run(params)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    kernel = block.kernel[...]
    kernel = {"weight": kernel / jnp.linalg.norm(kernel, axis=0), "spectral": kernel / np.linalg.svd(kernel)[1][0]}.get(norm, kernel)
    np.testing.assert_allclose(whole, (x + found) @ (jnp.eye(16) + kernel), atol=1e-5)
    query, key = Rotary()(attention.query(x), attention.key(x), None, None)
    table = attention.temperature[...][:, jnp.minimum(jnp.arange(7), 4)]
    for got, first in ((found, 0), (moved, 3)):
        inputs = [a[:, first:] for a in (query, key, attention.value(x))]
        by_hand = attention.out(objectives.temperature_attention(*inputs, table[:, first:], mask=masks.causal()))
        np.testing.assert_allclose(got, by_hand, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(run(params)[0] ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))
    if norm == "scaled":
        block.alpha[...], block.beta[...] = 2.0, 0.25
        np.testing.assert_allclose(block(x), 0.25 * (x + found) + (x + found) @ kernel / 2, atol=1e-5)


def test_errors():
    """Wrong arguments are named."""
    e, theta = jnp.ones((2, 1, 3, 4)), jnp.ones((2, 4))
    query, key, value, _ = agreement.arrays(jnp.float32)
    for match, call in (("thresholds: expected", lambda: objectives.entropy_reg_loss(e, theta[:1])), ("granularity: expected", lambda: objectives.entropy_reg_loss(
            e, theta, granularity="row")), ("reduction: expected", lambda: objectives.entropy_reg_loss(e, theta, reduction="max")),
                        ("per_query_max: expected", lambda: objectives.entropy_reg_loss(e, theta, granularity="head_mean", per_query_max=True)),
                        ("temperature: expected", lambda: objectives.temperature_attention(query, key, value, jnp.ones((4, 3)))),
                        ("ffn_norm: expected", lambda: objectives.SoftmaxOnlyBlock(4, attention=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), ffn_norm="rms", rngs=nnx.Rngs(0)))):
        with pytest.raises(ValueError, match=match):
            call()
