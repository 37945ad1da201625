"""Slim attention against multi-head attention written out: both orders, rotary positions, biases, decoding, conversion, what cannot be converted, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, memory
from attnx.core import cache
from attnx.nn import Attention, Stack, TransformerBlock
from attnx.positions import Rotary

B, T, N, H = 2, 9, 2, 4
D = N * H


def arrays(dtype=jnp.float64, seed=0):
    """Inputs, and projections with biases."""
    shapes = dict(x=(B, T, D), query=(D, N, H), key=(D, N, H), value=(D, N, H), key_bias=(N, H), value_bias=(N, H))
    return {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in zip(jax.random.split(jax.random.key(seed), 6), shapes.items())}


def project(x, kernel, bias=None):
    return jnp.einsum("bsd,dnh->bsnh", x, kernel) + (0 if bias is None else bias)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("position", [None, Rotary()], ids=["plain", "rotary"])
def test_exact(biased, position):
    """Both orders are multi-head attention to 1e-12."""
    a = arrays()
    biases = (a["key_bias"], a["value_bias"]) if biased else (None, None)
    q, k, v = project(a["x"], a["query"]), project(a["x"], a["key"], biases[0]), project(a["x"], a["value"], biases[1])
    slim = memory.slim_from_mha(a["key"], a["value"], *biases)
    turned = (q, k) if position is None else position(q, k)
    expected = attnx.attention(*turned, v, mask=masks.causal())
    for option in ("late", "early"):
        out = memory.slim_attend(q, k, slim, option=option, position=position, mask=masks.causal())
        np.testing.assert_allclose(out, expected, atol=1e-12 * slim.condition)


@pytest.mark.usefixtures("x64")
def test_values_need_the_keys_of_all_heads():
    """An inverse by head is wrong, and so are keys that are turned already."""
    a = arrays()
    slim = memory.slim_from_mha(a["key"], a["value"])
    np.testing.assert_allclose(jnp.einsum("de,env->dnv", a["key"].reshape(D, D), slim.kernel), a["value"], rtol=1e-6, atol=1e-9)
    assert slim.condition == pytest.approx(np.linalg.cond(np.asarray(a["key"]).reshape(D, D)))
    k, v = project(a["x"], a["key"]), project(a["x"], a["value"])
    np.testing.assert_allclose(slim.values(k), v, atol=1e-9)
    by_head = jnp.stack([k[:, :, n] @ jnp.linalg.pinv(a["key"][:, n]) @ a["value"][:, n] for n in range(N)], axis=2)
    assert jnp.abs(by_head - v).max() > 0.1 and jnp.abs(slim.values(Rotary()(k, k)[1]) - v).max() > 0.1


def test_condition():
    a = arrays(jnp.float32)
    singular = a["key"].at[:, 0].set(a["key"][:, 1])
    with pytest.raises(ValueError, match="invertible"):
        memory.slim_from_mha(np.asarray(a["key"]).reshape(D, D)[:, [0] * D].reshape(D, N, H), a["value"])
    with pytest.warns(UserWarning, match="condition number"):
        memory.slim_from_mha(np.asarray(singular, np.float64) + 1e-9 * np.asarray(a["key"], np.float64), a["value"])
    with pytest.raises(ValueError, match="key_kernel: expected shape"):
        memory.slim_from_mha(a["key"][:, :1], a["value"][:, :1])


@pytest.mark.parametrize("option", ["late", "early"])
def test_layer(option):
    """A converted layer calls and decodes as the other, with half the cache."""
    options = dict(position=Rotary(), qk_norm="rms", output_gate="head", use_bias=True, bias_init=nnx.initializers.normal(1.0))
    layer = Attention(D, N, mechanism=attnx.pairs(mask=masks.causal()), rngs=nnx.Rngs(0), **options)
    slim = memory.slim_convert(layer, option)
    x = arrays(jnp.float32)["x"]
    expected = layer(x)
    np.testing.assert_allclose(slim(x), expected, atol=2e-5)
    state, other = slim.init_state(B, T), layer.init_state(B, T)
    count = lambda state: sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)
    assert count(state) == B * T * D and count(other) == 2 * count(state)
    step = nnx.jit(lambda layer, state, x: layer.step(state, x))
    state, first = step(slim, state, x[:, :6])
    outs = [first]
    for t in range(6, T):
        state, out = step(slim, state, x[:, t:t + 1])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, atol=2e-5)


def test_models():
    """Layers of a model are converted where they are, also those that one scan evaluates."""
    make = lambda *, rngs: TransformerBlock(D, attention=Attention(D, N, mechanism=attnx.pairs(), use_bias=True, rngs=rngs), rngs=rngs)
    stack = Stack(make, 3, rngs=nnx.Rngs(0))
    x = arrays(jnp.float32)["x"]
    expected = stack(x)
    assert memory.slim_convert(stack) is stack
    attention = stack.blocks[0].attention
    assert isinstance(attention, memory.SlimAttention) and len(attention.condition) == 3 and attention.kernel.shape == (3, D, N, H)
    np.testing.assert_allclose(stack(x), expected, atol=2e-5)


def test_not_for_grouped_heads():
    with pytest.raises(ValueError, match="layer: expected as many key heads"):
        memory.slim_convert(Attention(D, 2, num_kv_heads=1, mechanism=attnx.pairs(), rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="pairs engine"):
        memory.slim_convert(Attention(D, 2, mechanism=attnx.recurrent(), rngs=nnx.Rngs(0)))


@pytest.mark.usefixtures("x64")
def test_inputs_kept():
    """Cross-attention of two layers to one context, grouped heads and biases; and rotary self-attention to inputs in a cache."""
    context = jax.random.normal(jax.random.key(5), (B, 7, 6))
    for seed in (1, 2):
        a = arrays(seed=seed)
        kernels = dict(key_kernel=a["key"][:6, :1], value_kernel=a["value"][:6, :1], key_bias=a["key_bias"][:1], value_bias=a["value_bias"][:1])
        q = project(a["x"], a["query"])
        k, v = (project(context, kernels[f"{name}_kernel"], kernels[f"{name}_bias"]) for name in ("key", "value"))
        for option in ("folded", "recompute"):
            np.testing.assert_allclose(memory.x_attend(q, context, **kernels, option=option), attnx.attention(q, k, v), atol=1e-12)
    kept = cache.append(cache.init(B, 12, 1, D, 0, jnp.float64), a["x"][:, :, None], a["x"][:, :, None, :0])
    q, k, v = (project(a["x"], a[name]) for name in ("query", "key", "value"))
    expected = attnx.attention(*Rotary()(q, k), v, mask=masks.causal())
    positions = dict(query_positions=jnp.arange(T, dtype=jnp.int32), key_positions=kept.positions)
    out = memory.x_attend(q, kept.key[:, :, 0], a["key"], a["value"], position=Rotary(), mask=masks.causal(), **positions)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    with pytest.raises(NotImplementedError, match="folded"):
        memory.x_attend(q, context, **kernels, option="folded", position=Rotary())


def test_memory_report():
    """Half for a decoder; nothing to gain for one of three grouped heads by keeping keys alone."""
    plain = memory.memory_report(512, 8, layers=6, tokens=1000, batch=3, itemsize=4)
    assert plain.standard == 6 * 1000 * 2 * 512 * 3 * 4 and plain.slim * 2 == plain.standard and plain.inputs == plain.slim
    assert memory.memory_report(576, 9, num_kv_heads=3, layers=30, tokens=100).slim is None
