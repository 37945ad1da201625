"""Localized filtering: the filter against a convolution, its reach, its first tokens, and the layers around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from attnx import scores
from attnx.scores.localized_filtering import Filter

T, D = 7, 8


def filter_of(groups=1, seed=0, dtype=jnp.float64):
    shapes = ((2, D // groups, D // 2), (D // 2,), (2, D // 2 // groups, D), (D,), (D,))
    return Filter(*(jax.random.normal(key, shape, dtype) for key, shape in zip(jax.random.split(jax.random.key(seed), 5), shapes)))


def normal(*shape, seed=3, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def rms(u, scale=1.0):
    return u / jnp.sqrt(jnp.mean(u**2, -1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(x64, groups):
    """Two convolutions padded by one zero on the left each: before the first token the hidden one is 0, not its bias. Channels of a group are fully mixed."""
    x, params = normal(2, T, D), filter_of(groups)
    layout = ("NWC", "WIO", "NWC")
    convolve = lambda x, kernel, bias: lax.conv_general_dilated(x, kernel, (1,), ((1, 0),), dimension_numbers=layout, feature_group_count=groups) + bias
    u = convolve(convolve(x, params.first, params.first_bias), params.second, params.second_bias)
    np.testing.assert_allclose(scores.localized_filter(x, params)[0], rms(u + x, params.scale), atol=1e-12)


def test_reach(x64):
    """y_t depends on x_(t-2), x_(t-1) and x_t, on nothing else."""
    params = filter_of()
    slopes = jax.jit(jax.jacobian(lambda x: scores.localized_filter(x[None], params)[0][0].sum(-1)))(normal(T, D))
    t, s = jnp.mgrid[:T, :T]
    np.testing.assert_array_equal((slopes != 0).any(-1), (s <= t) & (s >= t - 2))


def test_streaming(x64):
    """Token by token from the first, and in pieces, with biases that are not zero."""
    x, params = normal(2, T, D), filter_of(2)
    whole = scores.localized_filter(x, params)[0]
    filter = jax.jit(scores.localized_filter)
    for cuts in ([1, 2, 3, 4, 5, 6], [2, 3, 3]):
        state, outs = scores.localized_filter_init(2, params, jnp.float64), []
        for piece in jnp.split(x, cuts, axis=1):
            out, state = filter(piece, params, state)
            outs.append(out)
        np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, atol=1e-12)


def test_documents_and_padding(x64):
    """Packed documents are as if they were apart, and so is what follows padding."""
    x, params = normal(2, T, D), filter_of()
    second = scores.localized_filter(x[:, 3:], params)[0]
    ids = jnp.broadcast_to(jnp.arange(T) >= 3, (2, T)).astype(jnp.int32)
    positions = jnp.where(jnp.arange(T) < 3, -1, jnp.arange(T) - 3)
    for options in (dict(segment_ids=ids), dict(positions=positions)):
        np.testing.assert_allclose(scores.localized_filter(x, params, **options)[0][:, 3:], second, atol=1e-12)
    layer = scores.LocalizedFilteringAttention(D, 2, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda layer, x, options: layer(x, **options))
    second = call(layer, x[:, 3:], {})
    for options in (dict(segment_ids=ids), dict(positions=positions)):
        np.testing.assert_allclose(call(layer, x, options)[:, 3:], second, atol=1e-7)


def projections(layer, x):
    """What the mechanism is given, before positions."""
    layer.position, seen = None, []
    layer(x, hooks={"qkv": lambda value, index, at: seen.append(value) or value})
    return seen[0]


def test_values_are_not_filtered():
    """With kernels and biases of 0 queries and keys are those of normalised tokens; values are of the tokens as they are, whatever the filter."""
    x = normal(2, T, D, dtype=jnp.float32)
    layer = scores.LocalizedFilteringAttention(D, 2, rngs=nnx.Rngs(0))
    before = projections(layer, x)
    for name in ("first", "second"):
        getattr(layer.filter, name)[...] *= 0
    after = projections(layer, x)
    for got, project in zip(after, (layer.query, layer.key)):
        np.testing.assert_allclose(got, project(rms(x)), atol=1e-5)
    np.testing.assert_array_equal(after[2], before[2])
    np.testing.assert_allclose(after[2], layer.value(x), atol=1e-6)
    assert jnp.abs(before[0] - after[0]).max() > 0.1


def test_yuan_layout():
    """The released code's cutting: joined, reshaped to heads of 2 H, halved."""
    x = normal(2, T, D, dtype=jnp.float32)
    plain, yuan = (projections(scores.LocalizedFilteringAttention(D, 2, layout=layout, rngs=nnx.Rngs(0)), x) for layout in ("plain", "yuan"))
    joined = jnp.concatenate([plain[0].reshape(2, T, D), plain[1].reshape(2, T, D)], axis=-1).reshape(2, T, 2, D)
    np.testing.assert_allclose(yuan[0], joined[..., :D // 2], atol=1e-6)
    np.testing.assert_allclose(yuan[1], joined[..., D // 2:], atol=1e-6)


def test_shared_projection():
    """One projection, a weight and a bias by channel for each of query and key, no filter."""
    x = normal(2, T, D, dtype=jnp.float32)
    layer = scores.LocalizedFilteringAttention(D, 2, share_qk=True, rngs=nnx.Rngs(0))
    layer.shared_weight[...], layer.shared_bias[...] = (normal(2, 2, D // 2, seed=seed, dtype=jnp.float32) for seed in (3, 4))
    for got, weight, bias in zip(projections(layer, x), layer.shared_weight[...], layer.shared_bias[...]):
        np.testing.assert_allclose(got, layer.query(x) * weight + bias, atol=1e-5)
    assert layer.key is None and layer.filter is None


OPTIONS = {"filter": dict(groups=2, num_kv_heads=1), "yuan": dict(layout="yuan", qk_norm="rms"), "shared": dict(share_qk=True)}


@pytest.mark.parametrize("name", OPTIONS)
def test_block(name):
    """The block reads whole and in steps alike, from the first token on, and every parameter has a gradient."""
    block = scores.YuanBlock(D, 2, hidden_features=12, rngs=nnx.Rngs(0), **OPTIONS[name])
    x = normal(2, T, D, dtype=jnp.float32)
    graph, params = nnx.split(block)
    leaves, structure = jax.tree.flatten(params)
    params = jax.tree.unflatten(structure, [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(jax.random.split(jax.random.key(1), len(leaves)), leaves)])

    @jax.jit
    def both(params, x):
        block = nnx.merge(graph, params)
        state, outs = block.init_state(batch=2, max_length=T), []
        for begin, end in ((0, 1), (1, 2), (2, T)):
            state, out = block.step(state, x[:, begin:end])
            outs.append(out)
        return block(x), jnp.concatenate(outs, axis=1)

    whole, stepped = both(params, x)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_state():
    """The filter adds the last token and what half as many channels made of it, at any length."""
    layer = scores.LocalizedFilteringAttention(D, 2, rngs=nnx.Rngs(0))
    sizes = [sum(x.size for x in jax.tree.leaves(layer.init_state(3, length).filter)) for length in (10, 100)]
    assert sizes == [3 * (D + D // 2)] * 2


def test_errors():
    """Wrong arguments are named."""
    with pytest.raises(ValueError, match="params.second: expected shape"):
        scores.localized_filter(jnp.ones((1, T, D)), filter_of(dtype=jnp.float32)._replace(second=jnp.ones((2, 3, D))))
    for match, options in (("layout: expected", dict(layout="other")), ("groups: expected", dict(groups=3)),
                           ("num_kv_heads: expected", dict(share_qk=True, num_kv_heads=1))):
        with pytest.raises(ValueError, match=match):
            scores.LocalizedFilteringAttention(D, 2, rngs=nnx.Rngs(0), **options)
    layer = scores.LocalizedFilteringAttention(D, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="context: expected None"):
        layer(jnp.ones((1, T, D)), jnp.ones((1, T, D)))
