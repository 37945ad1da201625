"""LAVO: its memory's identities, the streaming form, what it reduces to, documents, and the layer around it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import attnx
from attnx import linear, masks, scores

B, T, N, D, R, W = 2, 21, 2, 8, 5, 4
attend = jax.jit(linear.lavo_attention, static_argnames=("window", "causal", "cross", "dissect", "implementation"))


def inputs(length=T, dtype=jnp.float64):
    q, c = jax.random.normal(jax.random.key(0), (2, B, length, N, D), dtype)
    return q, c, linear.orthonormal(jax.random.normal(jax.random.key(1), (N, R, D), dtype)), jax.random.normal(jax.random.key(2), (N, W), dtype)


def definition(query, context, bases, rel_bias, causal=True):
    """Token by token, in loops."""
    q, c, bases, rel_bias = (np.asarray(x, np.float64) for x in (query, context, bases, rel_bias))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        first = t // W * W
        s = np.arange(first, t + 1 if causal else min(first + W, c.shape[1]))
        near, before = c[b, s, n], c[b, :first, n] if causal else c[b, :, n]
        logits = near @ q[b, t, n] / np.sqrt(D) + rel_bias[n, t - s if causal else t - s + W - 1]
        if len(before):
            slots = (bases[n] @ before.mean(0))[:, None] * bases[n]
            near, logits = np.concatenate([near, slots]), np.concatenate([logits, slots @ q[b, t, n] / np.sqrt(D)])
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ near / weights.sum()
    return out


@pytest.mark.usefixtures("x64")
def test_definition_and_streaming():
    q, c, bases, rel_bias = inputs()
    expected = definition(q, c, bases, rel_bias)
    np.testing.assert_allclose(attend(q, c, bases, window=W, rel_bias=rel_bias), expected, atol=1e-12)
    state, outs, step = linear.lavo_init(B, N, R, D, window=W, dtype=q.dtype), [], jax.jit(linear.lavo_step)
    for part in (slice(0, 10), slice(10, 20), slice(20, 21)):
        state, out = step(state, q[:, part], c[:, part], bases, rel_bias=rel_bias)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, atol=1e-12)
    rel_bias = jax.random.normal(jax.random.key(3), (N, 2 * W - 1))
    np.testing.assert_allclose(attend(q, c, bases, window=W, rel_bias=rel_bias, causal=False), definition(q, c, bases, rel_bias, causal=False), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_without_dissection():
    """The memory alone: slots of every token's own, in parallel and streamed."""
    q, c, bases, _ = inputs()
    means = np.cumsum(np.asarray(c), 1) / np.arange(1, T + 1)[:, None, None]
    slots = jnp.einsum("btnd,nrd->btnr", means, bases)[..., None] * bases
    weights = jax.nn.softmax(jnp.einsum("btnd,btnrd->btnr", q, slots) / D**0.5)
    expected = jnp.einsum("btnr,btnrd->btnd", weights, slots)
    np.testing.assert_allclose(attend(q, c, bases, window=W, dissect=False), expected, atol=1e-12)
    _, streamed = jax.jit(lambda *args: linear.lavo_step(*args, dissect=False))(linear.lavo_init(B, N, R, D, window=W, dtype=q.dtype), q, c, bases)
    np.testing.assert_allclose(streamed, expected, atol=1e-12)
    whole = attend(q[:, :3], c, bases, window=W, causal=False, cross=True)
    last = jnp.einsum("btnr,bnrd->btnd", jax.nn.softmax(jnp.einsum("btnd,bnrd->btnr", q[:, :3], slots[:, -1]) / D**0.5), slots[:, -1])
    np.testing.assert_allclose(whole, last, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_memory():
    """Parseval's inequality, an equality with all directions, when the slots add up to the mean; repeating every token changes nothing."""
    _, c, bases, _ = inputs()
    mean = jnp.cumsum(c, 1) / jnp.arange(1, T + 1)[:, None, None]
    power = jnp.sum(mean**2, -1)
    some = linear.orthogonal_memory(c, bases)
    assert (jnp.sum(some**2, -1) <= power + 1e-12).all() and (jnp.sum(some**2, -1) < power - 1e-3).any()
    every = linear.orthonormal(jax.random.normal(jax.random.key(1), (N, D, D)))
    full = linear.orthogonal_memory(c, every)
    np.testing.assert_allclose(jnp.sum(full**2, -1), power, atol=1e-12)
    np.testing.assert_allclose(jnp.einsum("btnr,nrd->btnd", full, every), mean, atol=1e-12)
    np.testing.assert_allclose(linear.orthogonal_memory(jnp.repeat(c, 2, 1), bases)[:, 1::2], some, atol=1e-12)
    slots = some[0, -1, 0, :, None] * bases[0]
    np.testing.assert_allclose(slots @ slots.T, jnp.diag(some[0, -1, 0] ** 2), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_one_window_is_softmax_attention():
    q, c, bases, _ = inputs()
    rel_bias = jax.random.normal(jax.random.key(3), (N, 45), q.dtype)
    t = jnp.arange(T)
    between = t[:, None] - t
    expected = attnx.attention(q, c, c, mask=masks.causal(), scores=scores.bias(rel_bias[:, jnp.maximum(between, 0)]))
    np.testing.assert_allclose(attend(q, c, bases, window=45, rel_bias=rel_bias), expected, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_documents():
    """In a row of documents, windows lie where they lie; what is seen of a document is its own."""
    q, c, bases, rel_bias = inputs()
    ids = jnp.broadcast_to(jnp.array([3] * 12 + [1] * 5 + [4] * 4), (B, T))
    out = attend(q, c, bases, window=W, rel_bias=rel_bias, segment_ids=ids)
    np.testing.assert_allclose(out[:, :12], definition(*(x[:, :12] for x in (q, c)), bases, rel_bias), atol=1e-12)
    np.testing.assert_allclose(out[:, 12:17], definition(*(x[:, 12:17] for x in (q, c)), bases, rel_bias), atol=1e-12)
    changed = attend(q, c.at[:, :17].set(7.0), bases, window=W, rel_bias=rel_bias, segment_ids=ids)
    np.testing.assert_allclose(changed[:, 17:], out[:, 17:], atol=1e-12)
    alone = attend(q, c, bases, window=W, dissect=False, segment_ids=ids)
    np.testing.assert_allclose(alone[:, 12:17], attend(q[:, 12:17], c[:, 12:17], bases, window=W, dissect=False), atol=1e-12)


def test_long_bfloat16():
    """Of 131072 bfloat16 tokens the coefficients are means, near the exact ones."""
    c = (jax.random.normal(jax.random.key(0), (1, 131072, 1, 4)) + 3).astype(jnp.bfloat16)
    got = np.asarray(jax.jit(linear.orthogonal_memory)(c, jnp.eye(4)[None, :2]))[0, :, 0]
    exact = np.cumsum(np.asarray(c, np.float64)[0, :, 0, :2], 0) / np.arange(1, 131073)[:, None]
    assert np.abs(got - exact).max() < 1e-2


@pytest.mark.parametrize("options", [{}, dict(dissect=False), dict(orth="init-only")], ids=str)
def test_layer(options):
    """Steps find what the call finds; every parameter learns, and directions stay orthonormal."""
    layer = linear.LAVO(16, 2, num_bases=3, window=4, rngs=nnx.Rngs(0), **options)
    x = jax.random.normal(jax.random.key(0), (1, 10, 16))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def both(params):
        layer = nnx.merge(graph, params, rest)
        _, stepped = layer.step(layer.init_state(batch=1, max_length=10), x)
        return layer(x), stepped

    @jax.jit
    def update(params):
        slopes = jax.grad(lambda params: jnp.sum(both(params)[0] ** 2))(params)
        return optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, slopes)), slopes

    whole, stepped = both(params)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    params, slopes = update(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes)) and len(jax.tree.leaves(slopes)) == (4 if options.get("dissect") is False else 5)
    rows = nnx.merge(graph, params, rest).mechanism.directions()
    error = jnp.abs(rows @ jnp.swapaxes(rows, 1, 2) - jnp.eye(3)).max()
    assert (error < 1e-5) == (options.get("orth") != "init-only")


def test_errors():
    q, c, bases, rel_bias = inputs(dtype=jnp.float32)
    for match, change in (("bases: expected shape", dict(bases=bases[:1])), ("rel_bias: expected shape", dict(rel_bias=rel_bias[:, 1:])),
                          ("causal: expected False", dict(cross=True)), ("rel_bias: expected None", dict(dissect=False)),
                          ("context: expected the length", dict(context=c[:, 1:])),
                          ("segment_ids: expected None", dict(causal=False, rel_bias=None, segment_ids=jnp.zeros((B, T), int)))):
        with pytest.raises(ValueError, match=match):
            linear.lavo_attention(**{**dict(query=q, context=c, bases=bases, window=W, rel_bias=rel_bias), **change})
    with pytest.raises(NotImplementedError, match="causal=False"):
        linear.LAVO(16, 2, num_bases=3, causal=False, rngs=nnx.Rngs(0)).init_state(1, 4)
