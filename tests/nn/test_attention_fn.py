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
FULL = pairs(implementation="reference")  # the quickest to compile
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


def assert_agree(mechanism, *args, mask=None, **options):
    inputs = {"mask": mask}
    assert_same(with_gradient(nnx_layer(as_attention_fn(mechanism), **options), args, inputs),
                with_gradient(nnx_layer(**options), args, inputs))


def test_nnx_module_agrees_with_its_default():
    assert_agree(pairs(), X)
    assert_agree(FULL, X, mask=MASK)


def test_nnx_cross_attention_with_grouped_and_normalised_heads():
    assert_agree(FULL, X, CONTEXT, num_kv_heads=2, normalize_qk=True)


def test_nnx_causality_stated_or_called():
    theirs = nnx.jit(lambda m: m(X, is_causal=True))(nnx_layer())
    own = pairs(mask=masks.causal(), implementation="reference")
    for mechanism, stated, called in [(FULL, True, False), (FULL, False, True), (own, False, False)]:
        ours = nnx.jit(lambda m: m(X, is_causal=called))(nnx_layer(as_attention_fn(mechanism, is_causal=stated)))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.fixture(scope="module")
def theirs():
    """Linen's module with its own attention, its parameters, and the module's function of (parameters, x, mask)."""
    module = linen.MultiHeadDotProductAttention(N)
    return jax.jit(module.init)(jax.random.key(0), X), jax.jit(lambda v, x, mask: module.apply(v, x, mask=mask))


def ours(mechanism, **options):
    module = linen.MultiHeadDotProductAttention(N, attention_fn=as_attention_fn(mechanism, **options))
    return jax.jit(lambda v, x, mask: module.apply(v, x, mask=mask))


def test_linen_module_agrees_with_its_default(theirs):
    variables, default = theirs
    causal = linen.make_causal_mask(X[..., 0])
    np.testing.assert_allclose(ours(pairs())(variables, X, None), default(variables, X, None), atol=1e-5)
    stated = ours(FULL, is_causal=True)
    np.testing.assert_allclose(stated(variables, X, causal), default(variables, X, causal), atol=1e-5)
    np.testing.assert_allclose(stated(variables, X, MASK * causal), default(variables, X, MASK * causal), atol=1e-5)
    gradient = [jax.jit(jax.grad(lambda v: (f(v, X, MASK) ** 2).sum()))(variables) for f in (ours(FULL), default)]
    assert_same(*gradient)


def test_linen_more_leading_axes_and_broadcast_masks(theirs):
    variables, default = theirs
    fn = ours(FULL)
    x = jnp.stack([jnp.stack([X, -X]), jnp.stack([2 * X, X + 1]), jnp.stack([X * X, X - 1])])  # [3, 2, B, T, D]
    for mask in (jnp.broadcast_to(MASK, (3, 2, B, 1, T, T)), MASK[0, 0]):
        np.testing.assert_allclose(fn(variables, x, mask), default(variables, x, mask), atol=1e-5)


def test_without_batch_axes_and_with_bias():
    q, k, v = jax.random.normal(jax.random.key(3), (3, T, N, 4))
    bias = jax.random.normal(jax.random.key(4), (N, T, T))

    def run(fn):
        return jax.jit(jax.value_and_grad(lambda b: (fn(q, k, v, bias=b, mask=MASK[0], dtype=jnp.float32) ** 2).sum()))(bias)

    assert_same(run(as_attention_fn(FULL)), run(nnx.dot_product_attention))
    assert as_attention_fn(FULL)(q, k, v, bias=bias[:1]).shape == q.shape


def test_own_parts_remain():
    q, k, v = jax.random.normal(jax.random.key(3), (3, B, T, N, 4))
    bias = jax.random.normal(jax.random.key(4), (N, T, T))
    window, cap = masks.sliding_window(3), scores.soft_cap(1.0)
    out = as_attention_fn(pairs(mask=window, scores=cap, implementation="reference"))(q, k, v, bias=bias, mask=MASK)
    expected = attnx.attention(q, k, v, scores=(cap, scores.bias(bias)), mask=window & masks.explicit(MASK), implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_flax_decoding_by_cache():
    layer = nnx_layer(as_attention_fn(FULL))
    expected = nnx.jit(lambda m: m(X, is_causal=True))(nnx_layer())
    layer.init_cache((B, T, D))
    step = nnx.jit(lambda m, x: m(x, decode=True))
    outs = [step(layer, X[:, t:t + 1]) for t in range(T)]
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=1e-5)


def test_dropout():
    layer = nnx_layer(as_attention_fn(FULL), dropout_rate=0.5, broadcast_dropout=False)
    run = nnx.jit(lambda m, rngs: m(X, deterministic=False, rngs=rngs))
    a, b, again = (run(layer, nnx.Rngs(seed)) for seed in (1, 2, 1))
    assert (a != b).any() and (a == again).all()
    np.testing.assert_allclose(layer(X, deterministic=True), nnx_layer()(X), atol=1e-5)
    q = jnp.zeros((1, 64, N, 4))
    kept = as_attention_fn(FULL)(q, q, jnp.ones((1, 64, N, 1)), dropout_rng=jax.random.key(0), dropout_rate=0.25, broadcast_dropout=False)
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
    decayed = attnx.recurrent(log_decay=jnp.full(N, -0.5))
    np.testing.assert_allclose(as_attention_fn(decayed, is_causal=True)(q, k, v)[1], decayed(q[1], k[1], v[1]), atol=1e-6)
    with pytest.raises(NotImplementedError, match="mask: Recurrent has no place"):
        as_attention_fn(decayed)(q, k, v, mask=MASK)
    out = as_attention_fn(Averages())(q, k, v)
    np.testing.assert_allclose(out[1, 1, 2], v[1, 1].mean(0), atol=1e-6)
    for inputs, named in [(dict(mask=MASK), "mask: Averages has no place"), (dict(bias=MASK, is_causal=True), "bias, is_causal: Averages has no place")]:
        with pytest.raises(NotImplementedError, match=named):
            as_attention_fn(Averages())(q, k, v, **inputs)


def test_wrong_inputs_are_named():
    fn = as_attention_fn(FULL)
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
