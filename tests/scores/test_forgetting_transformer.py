"""Forgetting attention: what it reduces to, an oracle, its numbers in long sequences, and the layers around it."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import attnx
from attnx import masks, scores
from attnx.scores.forgetting_transformer import Remembered
from pallas_kernels.parts import Range

SIZES = dict(batch=2, queries=24, keys=24, heads=4, kv_heads=2, size=8, value_size=8)


def inputs(dtype=jnp.float64, seed=0):
    query, key, value, _ = agreement.arrays(dtype, seed=seed, **SIZES)
    return query, key, value, jax.nn.log_sigmoid(jax.random.normal(jax.random.key(seed + 1), (2, 24, 4), dtype))


attend = jax.jit(scores.forgetting_attention, static_argnames=("prune", "implementation", "block_sizes"))


def test_reductions(x64):
    """No forgetting is softmax attention, constant forgetting ALiBi."""
    q, k, v, gates = inputs()
    np.testing.assert_allclose(attend(q, k, v, 0 * gates), attnx.attention(q, k, v, mask=masks.causal()), atol=1e-12)
    slopes = jnp.array([0.5, 0.25, 0.1, 2.0])
    constant = jnp.broadcast_to(-slopes, gates.shape)
    np.testing.assert_allclose(attend(q, k, v, constant), attnx.attention(q, k, v, mask=masks.causal(), scores=scores.alibi(slopes)), atol=1e-12)


def bias(gates):
    """[B, N, T, S] written out; a key's own gate does not count."""
    between = [[gates[:, j + 1:i + 1].sum(1) for j in range(24)] for i in range(24)]
    return jnp.stack([jnp.stack(row, -1) for row in between], -2)


def dense(q, k, v, gates):
    allowed = jnp.tril(jnp.ones((24, 24), bool))
    return oracles.attend(oracles.softmax, q, k, v, allowed, lambda s: s + bias(gates))


def test_oracle(x64):
    """The bias written out, forward and backward, and jax.nn's attention with it."""
    args = inputs()
    got, expected = (jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2, 3)))(*args) for f in (scores.forgetting_attention, dense))
    agreement.assert_agree(got, expected)
    peer = jax.nn.dot_product_attention(*args[:3], bias=bias(args[3]), is_causal=True)
    np.testing.assert_allclose(attend(*args), peer, atol=2e-6)  # computes in float32


def test_last_queries(x64):
    """Fewer queries than keys are the last tokens."""
    q, k, v, gates = inputs()
    np.testing.assert_allclose(attend(q[:, -5:], k, v, gates), attend(q, k, v, gates)[:, -5:], atol=1e-12)


def test_positions(x64):
    """Order is all that positions tell: where they begin does not matter, to queries as to keys."""
    args = inputs()
    np.testing.assert_allclose(attend(*args, key_positions=jnp.arange(24, dtype=jnp.int32) + 7), attend(*args), atol=1e-12)
    layer = scores.ForgettingAttention(16, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    np.testing.assert_allclose(layer(x, positions=jnp.arange(9, dtype=jnp.int32) + 7), layer(x), atol=1e-12)


def test_documents(x64):
    """Packed documents are as if they were apart."""
    q, k, v, gates = inputs()
    ids = jnp.broadcast_to(jnp.arange(24) >= 10, (2, 24)).astype(jnp.int32)
    packed = attend(q, k, v, gates, segment_ids=ids)
    np.testing.assert_allclose(packed[:, 10:], attend(*(x[:, 10:] for x in (q, k, v, gates))), atol=1e-12)


def test_reset(x64):
    """A gate of zero at one token hides all before it from all after."""
    q, k, v, gates = inputs()
    gates = gates.at[:, 12].set(-1e4)
    other = inputs(seed=3)
    early = jnp.arange(24)[:, None, None] < 12
    changed = attend(q, jnp.where(early, other[1], k), jnp.where(early, other[2], v), jnp.where(early[..., 0], other[3], gates))
    np.testing.assert_allclose(changed[:, 12:], attend(q, k, v, gates)[:, 12:], atol=1e-12)


def test_prune(x64):
    """Automatic pruning loses no more than it says, and leaves tiles out; a threshold of one's own forbids what has decayed below it."""
    q, k, v, gates = inputs()
    gates = gates - 3.0
    full = attend(q, k, v, gates)
    for implementation in ("reference", "blockwise"):
        pruned = attend(q, k, v, gates, prune="auto", implementation=implementation, block_sizes=(4, 4))
        assert 0 < jnp.abs(pruned - full).max() <= 1e-4 * jnp.abs(full).max()
    far = attend(q, k, v, gates, prune=-1e-3)  # every gate is below e^-1e-3, so each token sees itself alone
    np.testing.assert_allclose(far, jnp.repeat(v, 2, axis=2), atol=1e-12)
    mask = Remembered(None, None, None)
    cover = mask.block(None, None, Range(-9.0, -8.0), Range(-2.0, -1.0), Range(-5.0, -5.0))
    assert not cover.some and not cover.every
    assert mask.block(None, None, Range(-2.0, -1.5), Range(-1.5, -1.0), Range(-5.0, -5.0)).every


def test_long_bfloat16():
    """In a long bfloat16 sequence the decay keeps float32: errors of the bias stay below 1e-3."""
    gates = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(0), (1, 4096, 1), jnp.float32) + 4)
    exact = np.cumsum(np.asarray(gates, np.float64), axis=1)[0, :, 0]
    c = jnp.cumsum(gates, axis=1)
    weights = attnx.attention_weights(jnp.zeros((1, 4096, 1, 8), jnp.bfloat16)[:, -64:], jnp.zeros((1, 4096, 1, 8), jnp.bfloat16),
                                      scores=scores.forgetting(c[:, -64:], c))
    expected = exact[-64:, None] - exact[None]
    seen = expected > -60
    difference = np.log(np.maximum(np.asarray(weights[0, 0], np.float64), 1e-30)) - expected
    difference -= difference[:, -1:]  # the normaliser
    assert np.abs(difference[seen]).max() < 1e-3


OPTIONS = {"full": {}, "bias_only": dict(forget="bias_only"), "fixed": dict(forget="fixed"), "none": dict(forget="none"),
           "pro": dict(pro=True, num_kv_heads=2), "pruned": dict(prune="auto")}


@pytest.mark.parametrize("name", OPTIONS)
def test_layer(name):
    """Prefill and steps find what the call finds, and every parameter has a gradient."""
    layer = scores.ForgettingAttention(16, 4, rngs=nnx.Rngs(0), **OPTIONS[name])
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        state = layer.init_state(batch=2, max_length=9)
        state, first = layer.step(state, x[:, :6])
        outs = [first]
        for t in range(6, 9):
            state, out = layer.step(state, x[:, t:t + 1])
            outs.append(out)
        return layer(x), jnp.concatenate(outs, axis=1)

    whole, stepped = both(params, x)
    np.testing.assert_allclose(stepped, whole, atol=2e-6)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_decay_times():
    """Fixed heads forget over the times they are given."""
    layer = scores.ForgettingAttention(15, 3, forget="fixed", decay_times=(2.0, 200.0), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.extras(jnp.ones((1, 1, 15)))["log_forget"][0, 0], [-1 / 2, -1 / 20, -1 / 200], rtol=1e-5)


def test_pro():
    """Keys and values are mixed with the token before, then keys normalised by head; what heads find is normalised by head before the gate."""
    layer = scores.ForgettingAttention(16, 4, pro=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 16))
    key, value = layer._key_value(x)
    for got, project, gate in ((key, layer.key, layer.key_shift), (value, layer.value, layer.value_shift)):
        plain, a = project(x), jax.nn.sigmoid(gate(x))[..., None]
        mixed = a * jnp.pad(plain, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1] + (1 - a) * plain
        if got is key:
            mixed = mixed / jnp.sqrt(jnp.mean(mixed**2, -1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(got, mixed, atol=1e-5)
    assert layer.key_norm.scale.shape == (4, 4) and layer.output_norm.scale.shape == (4, 4)


def test_errors():
    """Wrong arguments are named."""
    q, k, v, gates = inputs(jnp.float32)
    fewer = dict(key=k[:, 1:], value=v[:, 1:], log_forget=gates[:, 1:])
    for match, change in (("log_forget: expected shape", dict(log_forget=gates[:, 1:])), ("query: expected at most", fewer),
                          ("prune: expected", dict(prune="some")), ("prune: expected", dict(prune=1.0))):
        with pytest.raises(ValueError, match=match):
            scores.forgetting_attention(**{**dict(query=q, key=k, value=v, log_forget=gates), **change})
    with pytest.raises(ValueError, match="forget: expected"):
        scores.ForgettingAttention(16, 4, forget="some", rngs=nnx.Rngs(0))
