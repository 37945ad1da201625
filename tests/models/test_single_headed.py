"""SHA-RNN: the head and boom written out, the collapse, segments, memory, gradients through it, and the model's shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_modules import randomly

from attnx import models

B, T, D = 2, 6, 4
X = jax.random.normal(jax.random.key(0), (B, 2 * T, D))
sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_head():
    """Written out, with a memory of four tokens before six."""
    head = randomly(lambda: models.SingleHead(D, rngs=nnx.Rngs(0)))
    p = lambda name: np.asarray(getattr(head, name)[...], np.float64)
    query, memory = np.asarray(X[:, 4:10], np.float64), np.asarray(X[:, :10], np.float64)
    q = query @ p("kernel") + p("bias")
    q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-12) * p("norm_scale") + p("norm_bias")
    content, gate = np.split(sigmoid(p("value")) @ p("value_kernel") + p("value_bias"), 2)
    s = (q * sigmoid(p("query"))) @ (memory * sigmoid(p("key"))).swapaxes(1, 2) / np.sqrt(D)
    s = np.where(np.arange(10) <= 4 + np.arange(6)[:, None], s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    expected = w / w.sum(-1, keepdims=True) @ (memory * sigmoid(gate) * np.tanh(content))
    before = head(X[:, 4:10], X[:, :10])
    np.testing.assert_allclose(before, expected, atol=1e-5)
    head.collapse()
    np.testing.assert_allclose(head(X[:, 4:10], X[:, :10]), before, atol=1e-6)
    shapes = sorted(x.shape for x in jax.tree.leaves(nnx.state(head)))
    assert shapes == [(D,)] * 6 + [(D, D)]  # but one matrix: no projections of keys, values and outputs


def test_boom():
    """The sum of chunks, what exceeds them left out; one matrix; the approximation of GELU."""
    kernel, bias = jax.random.normal(jax.random.key(1), (D, 4 * D + 3)), jnp.arange(4.0 * D + 3)
    u = np.asarray(X, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    u = u * sigmoid(1.702 * u)
    np.testing.assert_allclose(models.boom(X, kernel, bias), u[..., :4 * D].reshape(*X.shape[:2], 4, D).sum(2), rtol=1e-5, atol=1e-5)
    z = jnp.linspace(-6, 6, 1001)[:, None]
    approximate = models.boom(z, jnp.ones((1, 1)), jnp.zeros(1))
    assert 0.015 < float(jnp.abs(approximate - jax.nn.gelu(z, approximate=False)).max()) < 0.021
    block = nnx.eval_shape(lambda: models.ShaRnnBlock(D, rngs=nnx.Rngs(0)))
    assert block.boom_kernel.size + block.boom_bias.size == 4 * D * D + 4 * D
    with pytest.raises(ValueError, match="kernel: expected shape"):
        models.boom(X, kernel[:, :2], bias[:2])


@nnx.jit(static_argnames=("cuts", "slots"))
def segments(block, x, cuts, slots=None):
    """A block's outputs, segment by segment."""
    state, out, begin = block.init_state(x.shape[0], slots), [], 0
    for end in cuts:
        state, y = block.step(state, x[:, begin:end])
        out.append(y)
        begin = end
    return jnp.concatenate(out, axis=1), state


@pytest.mark.parametrize("residual", [False, True])
def test_segments(residual):
    """Two segments with what is carried on are one, and so are tokens one by one; with little memory late ones differ; without any the past is the LSTM's."""
    block = randomly(lambda: models.ShaRnnBlock(D, memory_size=2 * T, residual=residual, rngs=nnx.Rngs(0)), 0.7)
    whole = nnx.jit(lambda block, x: block(x))(block, X)
    halves, state = segments(block, X, (T, 2 * T))
    np.testing.assert_allclose(halves, whole, atol=1e-5)
    np.testing.assert_array_equal(state.memory.positions, np.arange(2 * T))
    if not residual:
        np.testing.assert_allclose(segments(block, X, tuple(range(1, 2 * T + 1)))[0], whole, atol=1e-5)
        short, state = segments(block, X, (5, 2 * T), 3)
        np.testing.assert_allclose(short[:, :5], whole[:, :5], atol=1e-5)
        assert np.abs(short[:, 5:] - whole[:, 5:]).max() > 1e-4
        assert sorted(state.memory.positions.tolist()) == [9, 10, 11]  # the last of a segment longer than the memory
        alone = nnx.eval_shape(lambda: models.ShaRnnBlock(D, memory_size=0, rngs=nnx.Rngs(0)).init_state(B, T))
        assert alone.memory is None


def test_causality_and_padding():
    """A later token changes nothing before it; padding in front is as if it were not there."""
    block = randomly(lambda: models.ShaRnnBlock(D, rngs=nnx.Rngs(0)), 0.7)
    call = nnx.jit(lambda block, x, positions: block(x, positions=positions))
    positions = jnp.arange(2 * T)
    out = call(block, X, positions)
    np.testing.assert_array_equal(call(block, X.at[:, 7:].set(3.0), positions)[:, :7], out[:, :7])
    padded = jnp.concatenate([jnp.full((B, 2, D), 9.0), X[:, :-2]], axis=1)
    np.testing.assert_allclose(call(block, padded, jnp.maximum(positions - 2, -1))[:, 2:], out[:, :-2], atol=1e-5)
    with pytest.raises(NotImplementedError, match="segment_ids"):
        block(X, segment_ids=jnp.zeros((B, 2 * T), int))


def test_no_gradient_through_memory():
    """What a segment remembers of another is not trained through."""
    block = randomly(lambda: models.ShaRnnBlock(D, memory_size=T, rngs=nnx.Rngs(0)), 0.7)

    @jax.jit
    def second(first, x):
        state, _ = block.step(block.init_state(B, T), first)
        return jnp.sum(jnp.sin(block.step(state, x)[1]))

    slopes = jax.grad(second, (0, 1))(X[:, :T], X[:, T:])
    assert not slopes[0].any() and slopes[1].any()
    assert np.abs(second(X[:, :T], X[:, T:]) - second(-X[:, :T], X[:, T:])) > 1e-4


def test_model():
    """Attention in the layers asked for; segments are one text; the collapse changes nothing; every parameter has a gradient; dropout is random."""
    model = randomly(lambda: models.ShaRnn(11, 8, 3, memory_size=8, dropout_rate=0.2, rngs=nnx.Rngs(0)), 0.7)
    assert [block.head is not None for block in model.blocks] == [False, True, False]
    tokens = jax.random.randint(jax.random.key(2), (B, 8), 0, 11)
    call = nnx.jit(lambda model, tokens, key=None: model(tokens, dropout_key=key))
    out = call(model, tokens)

    @nnx.jit
    def read(model, tokens):
        state, first = model.step(model.init_state(B), tokens[:, :5])
        return jnp.concatenate([first, model.step(state, tokens[:, 5:])[1]], axis=1)

    np.testing.assert_allclose(read(model, tokens), out, atol=1e-5)
    graph, params = nnx.split(model)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params)(tokens)))))(params)
    assert all(jnp.any(slope) for slope in jax.tree.leaves(slopes))
    first = call(model, tokens, jax.random.key(0))
    assert (first == call(model, tokens, jax.random.key(0))).all() and not (first == call(model, tokens, jax.random.key(1))).all()
    model.collapse()
    np.testing.assert_allclose(call(model, tokens), out, atol=1e-5)
    everywhere = nnx.eval_shape(lambda: models.ShaRnn(11, 8, 3, attention_layers=range(3), rngs=nnx.Rngs(0)))
    assert all(block.head is not None for block in everywhere.blocks)
    with pytest.raises(ValueError, match="attention_layers"):
        models.ShaRnn(11, 8, 3, attention_layers=(3,), rngs=nnx.Rngs(0))
