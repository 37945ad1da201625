"""Selective self-attention: its temperatures, what it reduces to, its layer, and how few its parameters are."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, weights
from attnx.nn import Attention, TransformerBlock
from attnx.positions import Rotary

SIZES = dict(queries=11, keys=11)


def test_temperatures(x64):
    """A row is attention with its own scale; 0 makes weights equal, 200 takes the largest; a value of 0 keeps its share of the weight."""
    query, key, value, _ = agreement.arrays(**SIZES)
    tau = jnp.exp(jax.random.normal(jax.random.key(0), (2, 11, 4)))
    out = weights.temperature_scaled_attention(query, key, value, tau, mask=masks.causal())
    for row in (3, 10):
        alone = [attnx.attention(query[b:b + 1, row:row + 1, 2:3], key[b:b + 1, :row + 1, 1:], value[b:b + 1, :row + 1, 1:], scale=float(tau[b, row, 2]) * 5**-0.5)
                 for b in range(2)]
        np.testing.assert_allclose(out[:, row, 2], jnp.concatenate(alone)[:, 0, 0], atol=1e-12)
    ones = jnp.ones((1, 1, 1))
    even = weights.temperature_scaled_attention(query, key, value, 0 * ones, mask=masks.causal())
    np.testing.assert_allclose(even[:, 6], jnp.repeat(value[:, :7].mean(1), 2, 1), atol=1e-12)
    s = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, 2))
    best = jnp.take_along_axis(jnp.repeat(value, 2, 2).transpose(0, 2, 1, 3), jnp.argmax(s, -1)[..., None], 2).transpose(0, 2, 1, 3)
    clear = (jnp.diff(jnp.sort(s, -1)[..., -2:]) > 0.1).transpose(0, 2, 1, 3)
    hard = weights.temperature_scaled_attention(query, key, value, 200 * ones)
    np.testing.assert_allclose(jnp.where(clear, hard, 0), jnp.where(clear, best, 0), atol=1e-3)
    silent = jnp.ones((2, 11, 2)).at[:, 4].set(0)
    got = weights.temperature_scaled_attention(query, key, value, tau, silent)
    np.testing.assert_allclose(got, weights.temperature_scaled_attention(query, key, value.at[:, 4].set(0), tau), atol=1e-12)
    of_keys = weights.temperature_scaled_attention(query, key, value, key_temperature=silent)
    np.testing.assert_allclose(of_keys, attnx.attention(query, key.at[:, 4].set(0), value), atol=1e-12)


def test_position_temperature():
    """The released coefficients, 1 where one key is seen, one number a head."""
    counts = jnp.array([0, 1, 2, 1000])
    for form, beta, coefficient in (("exp", 1.5, 0.0113), ("exp", 2.0, 0.00062), ("linear", 0.3, 0.3), ("sigmoid", 0.0, 0.5)):
        got = weights.position_temperature(beta, counts, form=form)
        np.testing.assert_allclose(got[:2], 1)
        np.testing.assert_allclose(got[2:] - 1, coefficient * np.log([2, 1000]), rtol=6e-3)
    assert weights.position_temperature(jnp.zeros(4), counts[:, None], form="sigmoid").shape == (4, 4)


def test_starts_as_attention(x64):
    """Without a coefficient it is softmax attention; from another layer it takes projections, positions and mechanism."""
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    base = Attention(16, 4, num_kv_heads=2, mechanism=attnx.pairs(mask=masks.sliding_window(5), scale=0.3), position=Rotary(), qk_norm="rms", rngs=nnx.Rngs(0))
    layer = weights.SelectiveSelfAttention.from_attention(base, beta=50.0, key_temp=True, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(layer(x), base(x), atol=1e-12)
    started = weights.SelectiveSelfAttention.from_attention(base, rngs=nnx.Rngs(1))
    assert 0 < jnp.abs(started(x) - base(x)).max() < 1e-2
    with pytest.raises(TypeError, match="layer: expected"):
        weights.SelectiveSelfAttention.from_attention(Attention(16, 4, mechanism=attnx.pairs(weights=weights.relu()), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


OPTIONS = {"all": dict(key_temp=True, num_kv_heads=2, position=Rotary()), "values": dict(query_temp=False, pos_temp=None),
           "window": dict(pos_temp="sigmoid", value_temp=False, mask=masks.sliding_window(3))}


@pytest.mark.parametrize("name", OPTIONS)
def test_layer(name):
    """Prefill and steps find what the call finds, padding before the tokens and other documents do not count, and every parameter has a gradient."""
    layer = weights.SelectiveSelfAttention(16, 4, rngs=nnx.Rngs(0), **OPTIONS[name])
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    graph, params = nnx.split(layer)
    params = jax.tree.map(lambda x: x + 0.1, params)

    @jax.jit
    def run(params):
        layer = nnx.merge(graph, params)
        state, first = layer.step(layer.init_state(2, 7), x[:, :5])
        state, second = layer.step(state, x[:, 5:6])
        padded = jnp.where(jnp.arange(7) < 3, -1, jnp.arange(7) - 3)
        packed = layer(x, segment_ids=jnp.broadcast_to(jnp.arange(7) >= 3, (2, 7)).astype(jnp.int32))
        return layer(x), jnp.concatenate([first, second, layer.step(state, x[:, 6:])[1]], 1), layer(x[:, 3:]), layer(x, positions=padded), packed

    whole, stepped, last, padded, packed = run(params)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    np.testing.assert_allclose(padded[:, 3:], last, atol=1e-5)
    np.testing.assert_allclose(packed[:, 3:], last, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(run(params)[0] ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_parameters():
    """New parameters are below half a percent of a block's at the size of GPT-2."""
    def count(make):
        return sum(x.size for x in jax.tree.leaves(nnx.eval_shape(make)) if hasattr(x, "size"))

    def block(attention):
        return lambda: nnx.state(TransformerBlock(768, attention=attention(nnx.Rngs(0)), mlp=attnx.nn.MLP(768, 3072, gated=False, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))

    plain = count(block(lambda rngs: Attention(768, 12, mechanism=attnx.pairs(), rngs=rngs)))
    new = count(block(lambda rngs: weights.SelectiveSelfAttention(768, 12, key_temp=True, rngs=rngs))) - plain
    assert 0 < new < 0.005 * plain


def test_errors():
    """Wrong arguments are named."""
    query, key, value, _ = agreement.arrays(jnp.float32, **SIZES)
    attend = lambda *temperatures: weights.temperature_scaled_attention(query, key, value, *temperatures)
    for match, call in (("form: expected", lambda: weights.position_temperature(0.0, 1, form="log")),
                        ("pos_temp: expected", lambda: weights.SelectiveSelfAttention(16, 4, pos_temp="log", rngs=nnx.Rngs(0))),
                        ("query_temperature: expected", lambda: attend(jnp.ones((2, 11, 3)))), ("value_temperature: expected", lambda: attend(None, jnp.ones(11)))):
        with pytest.raises(ValueError, match=match):
            call()
