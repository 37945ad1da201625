"""Cottention: its forms against the sum written out, its invariances and bounds, what is counted, and the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import linear
from attnx.core import linear as engine

B, N, K, H, HV = 2, 4, 2, 8, 6
M = jnp.array([0.5, -1.0])
attend = jax.jit(linear.cosine_linear_attention, static_argnames=("is_causal", "norm_by", "implementation", "chunk_size"))


def inputs(length, seed=0, dtype=jnp.float32):
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, HV)
    return [jax.random.normal(jax.random.key(seed + i), shape, dtype) for i, shape in enumerate(shapes)]


def naive(query, key, value, m, norm_by="key", is_causal=True, seen=None):
    """All cosines, in one matrix."""
    length, g = key.shape[1], jnp.repeat(jax.nn.sigmoid(m.astype(key.dtype)), 2)[:, None, None]
    seen = jnp.ones(key.shape[:2]) if seen is None else seen.astype(key.dtype)
    length_of = lambda x: jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    cosines = jnp.einsum("btnh,bsnh->bnts", query / length_of(query), jnp.repeat(key / length_of(key), 2, axis=2)) * seen[:, None, None]
    count = jnp.maximum(jnp.cumsum(seen, axis=1) if is_causal else jnp.broadcast_to(seen.sum(1, keepdims=True), seen.shape), 1)[:, None]
    weights = cosines * (count[:, :, None] if norm_by == "key" else count[..., None]) ** -g
    weights = weights * jnp.tril(jnp.ones((length, length))) if is_causal else weights
    return jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(value, 2, axis=2))


def steps(*args, norm_by="key", prefill=0):
    state = linear.cosine_attention_init(B, K, H, HV)
    *tokens, m = args
    step = lambda state, token: linear.cosine_attention_step(state, *token, m, norm_by=norm_by)
    state, first = step(state, [x[:, :prefill] for x in tokens])
    _, rest = jax.lax.scan(step, state, [jnp.moveaxis(x[:, prefill:], 1, 0)[:, :, None] for x in tokens])
    return jnp.concatenate([first, jnp.moveaxis(rest[:, :, 0], 0, 1)], 1)


@pytest.mark.parametrize("norm_by", ["key", "query"])
def test_forms(norm_by):
    """At a length that is no multiple of a chunk, forward and backward; and token by token, after a prefill too."""
    args = (*inputs(257), M)
    graded = lambda f: jax.jit(jax.value_and_grad(lambda *a: (lambda out: (jnp.sum(jnp.sin(out)), out))(f(*a)), (0, 1, 2, 3), has_aux=True))(*args)
    (_, expected), slopes = graded(lambda *a: naive(*a, norm_by=norm_by))
    (_, got), got_slopes = graded(lambda *a: linear.cosine_linear_attention(*a, norm_by=norm_by, chunk_size=32))
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    for a, b in zip(got_slopes, slopes):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    for prefill in (0, 100):
        stepped = jax.jit(steps, static_argnames=("norm_by", "prefill"))(*args, norm_by=norm_by, prefill=prefill)
        np.testing.assert_allclose(stepped, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_lengths_of_vectors_do_not_matter(x64):
    query, key, value = inputs(17, dtype=jnp.float64)
    for is_causal in (True, False):
        out = attend(query, key, value, M, is_causal=is_causal)
        stretched = attend(query.at[0, 5, 1].mul(7.0), key.at[1, 3, 0].mul(0.01), value, M, is_causal=is_causal)
        np.testing.assert_allclose(stretched, out, atol=1e-6)
        np.testing.assert_allclose(out, naive(query, key, value, M, is_causal=is_causal), atol=1e-12)


def test_limits():
    """g = 1 by query is a mean with weights of at most one, so never longer than the longest value; g = 0 is the plain sum."""
    query, key, value = inputs(17)
    length = lambda x: jnp.linalg.norm(x, axis=-1)
    out = attend(query, key, value, jnp.full(K, 40.0), norm_by="query")
    assert (length(out) <= jnp.repeat(jax.lax.cummax(length(value), axis=1), 2, axis=2) + 1e-6).all()
    plain = engine.linear_attention(query, key, value, feature_map=linear.unit)
    for norm_by in ("key", "query"):
        np.testing.assert_allclose(attend(query, key, value, jnp.full(K, -40.0), norm_by=norm_by), plain, atol=1e-5)


def test_the_two_norms_differ():
    args = (*inputs(17), M)
    by_key, by_query = (attend(*args, norm_by=norm_by) for norm_by in ("key", "query"))
    np.testing.assert_allclose(by_key[:, 0], by_query[:, 0], atol=1e-6)
    assert jnp.abs(by_key - by_query)[:, 1:].max() > 0.1


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_is_not_counted(x64, is_causal):
    """Tokens that are not there, before, between or behind, are as if they were cut out; nor do documents count each other's."""
    args = inputs(17, dtype=jnp.float64)
    seen = jnp.arange(17) % 3 != 0
    out = attend(*args, M, is_causal=is_causal, key_mask=jnp.broadcast_to(seen, (B, 17)))
    expected = naive(*args, M, is_causal=is_causal, seen=jnp.broadcast_to(seen, (B, 17)))
    np.testing.assert_allclose(out, expected, atol=1e-12)
    ids = jnp.broadcast_to(jnp.where(seen, jnp.arange(17) >= 7, -1), (B, 17)).astype(jnp.int32)
    packed = attend(*args, M, is_causal=is_causal, segment_ids=ids)
    for part in (slice(0, 7), slice(7, 17)):
        alone = naive(*(x[:, part] for x in args), M, is_causal=is_causal, seen=jnp.broadcast_to(seen[part], (B, len(seen[part]))))
        np.testing.assert_allclose(packed[:, part], jnp.where(seen[part][:, None, None], alone, 0), atol=1e-12)


def test_nothing_to_see():
    """A row of padding, and queries of zero, find exact zeros; all slopes are finite."""
    query, key, value = inputs(17)
    ids = jnp.stack([jnp.full(17, -1), jnp.zeros(17, int)]).astype(jnp.int32)

    def loss(query, key, value, m):
        out = linear.cosine_linear_attention(query, key, value, m, segment_ids=ids)
        return jnp.sum(out**2), out

    slopes, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(query.at[1, 4].set(0), key.at[1, 2].set(0), value, M)
    assert not out[0].any() and not out[1, 4].any() and out[1, 3].any()
    assert all(jnp.isfinite(x).all() for x in slopes)


def test_the_state_does_not_grow():
    layer = linear.CottentionAttention(32, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    short, long = (jax.eval_shape(lambda length=length: layer.init_state(1, length)) for length in (64, 4096))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), short) == jax.tree.map(lambda x: (x.shape, x.dtype), long)


def test_layer():
    """Prefill and steps find what the call finds; exponents start at sigmoid(1/2) and are trained; an encoder does not stream."""
    layer = linear.CottentionAttention(16, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    assert (layer.mechanism.m[...] == 0.5).all() and layer.query.bias is None
    x = jax.random.normal(jax.random.key(0), (B, 9, 16))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        state, first = layer.step(layer.init_state(batch=B, max_length=9), x[:, :8])
        return layer(x), jnp.concatenate([first, layer.step(state, x[:, 8:])[1]], 1)

    whole, stepped = both(params, x)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))
    encoder = linear.CottentionAttention(16, N, is_causal=False, rngs=nnx.Rngs(0))
    places = jnp.where(jnp.arange(9) < 6, jnp.arange(9), -1)
    np.testing.assert_allclose(encoder(x, positions=places)[:, :6], encoder(x[:, :6]), atol=1e-6)
    with pytest.raises(NotImplementedError, match="is_causal=False"):
        encoder.init_state(1, 4)


def test_errors():
    args = inputs(5)
    with pytest.raises(ValueError, match=r"m: expected shape \[2\]"):
        linear.cosine_linear_attention(*args, jnp.ones(4))
    with pytest.raises(ValueError, match="norm_by: expected one of"):
        linear.cosine_linear_attention(*args, M, norm_by="length")
