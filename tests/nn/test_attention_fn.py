import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import attnx
from attnx import masks, pairs, scores
from attnx.nn import as_attention_fn

B, T, S, D, N = 2, 6, 5, 16, 4
X = jax.random.normal(jax.random.key(0), (B, T, D))
CONTEXT = jax.random.normal(jax.random.key(1), (B, S, D))
MASK = jax.random.bernoulli(jax.random.key(2), 0.7, (B, 1, T, T)) | jnp.eye(T, dtype=bool)


def nnx_layer(fn=None, **options):
    options = dict(decode=False, **options) if fn is None else dict(decode=False, attention_fn=fn, **options)
    return nnx.MultiHeadAttention(N, D, rngs=nnx.Rngs(0), **options)


@nnx.jit
def with_gradient(layer, args, inputs):
    """The output and the gradient of a scalar of it with respect to the parameters and the first input."""
    def loss(layer, x):
        out = layer(x, *args[1:], **inputs)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    (_, out), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, args[0])
    return out, gradients


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


@pytest.mark.parametrize("args, inputs", [((X,), dict()), ((X, CONTEXT), dict()), ((X,), dict(mask=MASK))])
def test_nnx_module_agrees_with_its_default(args, inputs):
    assert_same(with_gradient(nnx_layer(as_attention_fn(pairs())), args, inputs), with_gradient(nnx_layer(), args, inputs))


def test_nnx_causality_stated_or_called():
    theirs = nnx.jit(lambda m: m(X, is_causal=True))(nnx_layer())
    for mechanism, stated, called in [(pairs(), True, False), (pairs(), False, True), (pairs(mask=masks.causal()), False, False)]:
        ours = nnx.jit(lambda m: m(X, is_causal=called))(nnx_layer(as_attention_fn(mechanism, is_causal=stated)))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_nnx_grouped_and_normalised_heads():
    options = dict(num_kv_heads=2, normalize_qk=True)
    assert_same(with_gradient(nnx_layer(as_attention_fn(pairs()), **options), (X,), {}), with_gradient(nnx_layer(**options), (X,), {}))


@pytest.mark.parametrize("fn, mask", [
    (as_attention_fn(pairs()), None), (as_attention_fn(pairs()), MASK),
    (as_attention_fn(pairs(), is_causal=True), linen.make_causal_mask(X[..., 0])),
    (as_attention_fn(pairs(), is_causal=True), MASK & linen.make_causal_mask(X[..., 0], dtype=bool))])
def test_linen_module_agrees_with_its_default(fn, mask):
    theirs = linen.MultiHeadDotProductAttention(N)
    variables = theirs.init(jax.random.key(0), X)
    ours = linen.MultiHeadDotProductAttention(N, attention_fn=fn)
    run = [jax.jit(jax.value_and_grad(lambda v, m=m: (m.apply(v, X, mask=mask) ** 2).sum())) for m in (ours, theirs)]
    assert_same(*(f(variables) for f in run))


def test_linen_more_leading_axes_and_broadcast_masks():
    x = jnp.stack([jnp.stack([X, -X]), jnp.stack([2 * X, X + 1]), jnp.stack([X * X, X - 1])])  # [3, 2, B, T, D]
    theirs, ours = linen.MultiHeadDotProductAttention(N), linen.MultiHeadDotProductAttention(N, attention_fn=as_attention_fn(pairs()))
    variables = theirs.init(jax.random.key(0), X)
    for mask in (MASK, jnp.broadcast_to(MASK, (3, 2, B, 1, T, T)), MASK[0, 0], None):
        run = [jax.jit(lambda v, m=m: m.apply(v, x, mask=mask))(variables) for m in (ours, theirs)]
        np.testing.assert_allclose(*run, atol=1e-5)


def test_without_batch_axes_and_with_bias():
    q, k, v = jax.random.normal(jax.random.key(3), (3, T, N, 4))
    bias = jax.random.normal(jax.random.key(4), (N, T, T))
    for inputs in (dict(), dict(bias=bias), dict(bias=bias[:1], mask=MASK[0], dtype=jnp.float32)):
        np.testing.assert_allclose(as_attention_fn(pairs())(q, k, v, **inputs), nnx.dot_product_attention(q, k, v, **inputs), atol=1e-5)
    slopes = jax.grad(lambda b, f: (f(q, k, v, bias=b) ** 2).sum())
    np.testing.assert_allclose(slopes(bias, as_attention_fn(pairs())), slopes(bias, nnx.dot_product_attention), atol=1e-5)


def test_own_parts_remain():
    q, k, v = jax.random.normal(jax.random.key(3), (3, B, T, N, 4))
    bias = jax.random.normal(jax.random.key(4), (N, T, T))
    window, cap = masks.sliding_window(3), scores.soft_cap(1.0)
    out = as_attention_fn(pairs(mask=window, scores=cap))(q, k, v, bias=bias, mask=MASK)
    expected = attnx.attention(q, k, v, scores=(cap, scores.bias(bias)), mask=window & masks.explicit(MASK))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_flax_decoding_by_cache():
    layer = nnx_layer(as_attention_fn(pairs()))
    expected = nnx.jit(lambda m: m(X, is_causal=True))(nnx_layer())
    layer.init_cache((B, T, D))
    step = nnx.jit(lambda m, x: m(x, decode=True))
    outs = [step(layer, X[:, t:t + 1]) for t in range(T)]
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=1e-5)


def test_dropout():
    layer = nnx_layer(as_attention_fn(pairs()), dropout_rate=0.5, broadcast_dropout=False, use_bias=False)
    a, b = (layer(X, deterministic=False, rngs=nnx.Rngs(seed)) for seed in (1, 2))
    assert (a != b).any() and (a == layer(X, deterministic=False, rngs=nnx.Rngs(1))).all()
    np.testing.assert_allclose(layer(X, deterministic=True), nnx_layer(use_bias=False)(X), atol=1e-5)
    q = jnp.zeros((1, 64, N, 4))
    kept = as_attention_fn(pairs())(q, q, jnp.ones((1, 64, N, 1)), dropout_rng=jax.random.key(0), dropout_rate=0.25, broadcast_dropout=False)
    assert abs(kept.mean() - 1) < 0.05 and kept.std() > 0.01


@dataclasses.dataclass(frozen=True)
class Averages:
    """A mechanism of no engine."""

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        return jnp.broadcast_to(value.mean(1, keepdims=True), query.shape)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        return ()

    def step(self, state, query, key, value):
        return state, value


def test_other_mechanisms_and_what_they_refuse():
    q, k, v = jax.random.normal(jax.random.key(3), (3, 3, B, T, N, 4))
    out = as_attention_fn(Averages())(q, k, v)
    np.testing.assert_allclose(out[1, 1, 2], v[1, 1].mean(0), atol=1e-6)
    for inputs, named in [(dict(mask=MASK), "mask: Averages has no place"), (dict(bias=MASK, is_causal=True), "bias, is_causal: Averages")]:
        with pytest.raises(NotImplementedError, match=named):
            as_attention_fn(Averages())(q, k, v, **inputs)


def test_wrong_inputs_are_named():
    fn = as_attention_fn(pairs())
    q = k = v = jnp.ones((B, T, N, 4))
    with pytest.raises(NotImplementedError, match="precision: expected None"):
        nnx_layer(fn, precision="highest")(X)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        nnx_layer(fn)(X, sow_weights=True)
    with pytest.raises(NotImplementedError, match="broadcast_dropout: expected False"):
        nnx_layer(fn, dropout_rate=0.1)(X, deterministic=False)
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \[..., N, T, S\] = \(2, 4, 6, 6\), got \(3, 6\)"):
        fn(q, k, v, mask=jnp.ones((3, T)))
    with pytest.raises(ValueError, match="bias: expected a shape"):
        fn(q, k, v, bias=jnp.ones((1, B, N, T, T)))
    with pytest.raises(ValueError, match="is_causal: expected as many queries as keys, got 1 and 6"):
        as_attention_fn(pairs(), is_causal=True)(q[:, :1], k, v)
    with pytest.raises(ValueError, match="query, key, value: expected"):
        fn(q, k[0], v)
    with pytest.raises(TypeError, match="mechanism: expected an attnx.Mechanism, got str"):
        as_attention_fn("softmax")
