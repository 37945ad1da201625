"""FAST: its two forms and its steps, its weights, what it approximates and how well, dropout, and the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import linear, masks

B, T, N, K, H, HV = 2, 17, 4, 2, 8, 6
STATIC = ("order", "is_causal", "normalize", "tau", "form", "implementation", "chunk_size", "dropout_rate", "return_residual", "return_state")
attend = jax.jit(linear.fastmax_attention, static_argnames=STATIC)


def inputs(dtype=jnp.float64, size=H, scale=1.0, seed=0):
    shapes = (B, T, N, size), (B, T, K, size), (B, T, K, HV)
    return [scale * jax.random.normal(jax.random.key(seed + i), shape, dtype) for i, shape in enumerate(shapes)]


def normalised(x, normalize, tau=8.0):
    if normalize == "scale":
        return x / (tau * H**0.5) ** 0.5
    centred = x - x.mean(-1, keepdims=True)
    if normalize == "maxnorm":
        return centred / jnp.linalg.norm(centred, axis=-1, keepdims=True).max(1, keepdims=True)
    return centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) / H**0.5


def matrix(query, key, order, normalize, is_causal, tau=8.0):
    """[B, N, T, S], row by row."""
    s = jnp.einsum("btnh,bsnh->bnts", normalised(query, normalize, tau), jnp.repeat(normalised(key, normalize, tau), 2, 2))
    f = 1 + s + (s**2 / 2 if order == 2 else 0)
    f = jnp.where(jnp.tril(jnp.ones((T, T), bool)) if is_causal else True, f, 0)
    return f / f.sum(-1, keepdims=True)


@pytest.mark.parametrize("order, normalize, is_causal", [(1, "standardize", True), (2, "standardize", True), (2, "scale", False), (1, "maxnorm", False)])
def test_forms(x64, order, normalize, is_causal):
    """Factored, in chunks and token by token, and of all pairs, forward and backward, are the matrix written out."""
    query, key, value = inputs()
    options = dict(order=order, normalize=normalize, is_causal=is_causal)

    def graded(f):
        loss = lambda *args: (lambda out: (jnp.sum(jnp.sin(out)), out))(f(*args))
        slopes, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
        return out, *slopes

    expected = graded(lambda q, k, v: jnp.einsum("bnts,bsnv->btnv", matrix(q, k, order, normalize, is_causal), jnp.repeat(v, 2, 2)))
    for form, extra in (("factored", dict(chunk_size=4)), ("quadratic", {})):
        got = graded(lambda *args: linear.fastmax_attention(*args, form=form, **extra, **options))
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-8, err_msg=form)
    if is_causal:
        state = linear.fastmax_init(B, K, H, HV, order=order, dtype=jnp.float64)
        step = jax.jit(linear.fastmax_step, static_argnames=("order",))
        state, first = step(state, *(x[:, :16] for x in (query, key, value)), order=order)
        _, last = step(state, *(x[:, 16:] for x in (query, key, value)), order=order)
        np.testing.assert_allclose(jnp.concatenate([first, last], 1), expected[0], atol=1e-10)


def test_weights(x64):
    """Positive whatever the scores in order 2, and in order 1 where these are bounded; rows sum to one; a query of zeros finds the mean."""
    query, key, _ = inputs(scale=30.0)
    ones = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, K, T))
    for options in (dict(order=2, normalize="scale", tau=0.1), dict(order=1, normalize="maxnorm"), dict(order=1), dict(order=2)):
        weights = attend(query, key, ones, is_causal=False, form="factored", **options)
        assert (weights >= -1e-12).all() and (options["order"] == 1 or (weights > 0).all())
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-9)
        zero = attend(0 * query, key, ones, is_causal=False, form="factored", **options)
        np.testing.assert_allclose(zero, 1 / T, atol=1e-12)


def test_approximates_softmax(x64):
    """The gap to softmax attention of the same small scores is of the next order: halving the queries shrinks it four times in order 1 and eight times in order 2."""
    query, key, value = inputs()
    for order, factor in ((1, 4), (2, 8)):
        gaps = []
        for q in (query / 4, query / 8):
            softmax = attnx.attention(q, key, value, mask=masks.causal(), scale=1 / (8 * H**0.5))
            gaps.append(float(jnp.abs(attend(q, key, value, order=order, normalize="scale", form="factored") - softmax).max()))
        assert 0.8 * factor < gaps[0] / gaps[1] < 1.25 * factor


def test_documents(x64):
    """Packed documents are as if they were apart, padding aside, in both forms."""
    args = inputs()
    ids = jnp.broadcast_to(jnp.where(jnp.arange(T) == 3, -1, jnp.arange(T) >= 9), (B, T)).astype(jnp.int32)
    both = [attend(*args, segment_ids=ids, form=form) for form in ("factored", "quadratic")]
    np.testing.assert_allclose(*both, atol=1e-12)
    np.testing.assert_allclose(both[0][:, 9:], attend(*(x[:, 9:] for x in args), form="factored"), atol=1e-12)
    assert not both[0][:, 3].any()


def test_choice():
    """Of the forms, factored where there are more keys than features or a state is asked for."""
    query, key, value = inputs(jnp.float32, size=2)  # six features in order 2
    out, state = attend(query[:, :5], key[:, :5], value[:, :5], return_state=True)
    assert state.memory.shape == (B, K, 6, HV)
    text = str(jax.make_jaxpr(lambda *args: linear.fastmax_attention(*args))(query, key, value))
    few = str(jax.make_jaxpr(lambda *args: linear.fastmax_attention(*args))(query[:, :5], key[:, :5], value[:, :5]))
    assert "custom_vjp" not in text and "custom_vjp" in few


def test_dropout(x64):
    """What is dropped is unbiased in numerator and denominator, and differs by key; the quadratic form has none."""
    args = inputs()
    drop = lambda order, key: attend(*args, order=order, form="factored", dropout_rate=0.25, dropout_key=jax.random.key(key))
    for order in (1, 2):
        several = jnp.stack([drop(order, key) for key in range(24)])
        kept = attend(*args, order=order)
        assert (several.std(0).max() > 1e-3) and jnp.abs(several.mean(0) - kept).max() < 6 * several.std(0).max() / 24**0.5 + 0.02
    with pytest.raises(NotImplementedError, match="no features to drop"):
        attend(*args, form="quadratic", dropout_rate=0.5, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="dropout_key: expected"):
        attend(*args, dropout_rate=0.5)


def test_the_state_does_not_grow():
    layer = linear.FastmaxAttention(32, 4, rngs=nnx.Rngs(0))
    short, long = (jax.eval_shape(lambda length=length: layer.init_state(1, length)) for length in (64, 4096))
    assert jax.tree.map(lambda x: x.shape, short) == jax.tree.map(lambda x: x.shape, long)


def test_layer():
    """Prefill and steps find what the call finds."""
    layer = linear.FastmaxAttention(16, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))

    @nnx.jit
    def both(layer, x):
        state, first = layer.step(layer.init_state(batch=2, max_length=9), x[:, :8])
        return layer(x), jnp.concatenate([first, layer.step(state, x[:, 8:])[1]], 1)

    np.testing.assert_allclose(*both(layer, x), atol=1e-5)


def test_errors():
    args = inputs(jnp.float32)
    for match, options in (("normalize: expected 'standardize' or 'scale'", dict(normalize="maxnorm")), ("normalize: expected one of", dict(normalize="other")),
                           ("form: expected one of", dict(form="other")), ("order: expected an integer from 1 to 2", dict(order=3, form="factored"))):
        with pytest.raises(ValueError, match=match):
            linear.fastmax_attention(*args, **options)
    with pytest.raises(ValueError, match="order: expected"):
        linear.FastmaxAttention(16, 4, order=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="normalize: expected one of"):
        linear.FastmaxAttention(16, 4, normalize="maxnorm", rngs=nnx.Rngs(0))
