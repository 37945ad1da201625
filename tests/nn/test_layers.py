"""Blocks made of a scanned stack: the same outputs, states, dropout and recordings, and each can be another."""

import functools

import jax
import numpy as np
from flax import nnx

from attnx import masks, pairs
from attnx.nn import MLP, Attention, Stack, TransformerBlock, record, unstack

B, T, D = 2, 5, 8
X = jax.random.normal(jax.random.key(0), (B, T, D))


def make(heads, rngs):
    attention = Attention(D, heads, mechanism=pairs(mask=masks.causal(), implementation="reference"), rngs=rngs)
    return TransformerBlock(D, attention=attention, mlp=MLP(D, 8, rngs=rngs), dropout_rate=0.3, rngs=rngs)


def test_unstack():
    """Of blocks that alternate."""
    stack = nnx.jit(lambda: Stack([functools.partial(make, 2), functools.partial(make, 4)], 4, rngs=nnx.Rngs(0)))()
    layers = unstack(stack)
    assert [block.attention.num_heads for block in layers.blocks] == [2, 4, 2, 4]

    @nnx.jit
    def results(model):
        state, first = model.step(model.init_state(B, T), X[:, :3])
        return model(X, dropout_key=jax.random.key(1)), first, model.step(state, X[:, 3:])[1]

    for a, b in zip(results(layers), results(stack)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    kernel = layers.blocks[0].mlp.up.kernel
    assert kernel.shape == (D, 8) and kernel.get_metadata()["out_sharding"] == ("embed", "mlp")


def test_recording():
    """What hooks put on tape has an axis of layers, as with a stack."""
    stack = Stack(functools.partial(make, 2), 2, rngs=nnx.Rngs(0))
    scanned, separate = (nnx.jit(lambda model: record(model, X)[1])(model) for model in (stack, unstack(stack)))
    np.testing.assert_allclose(separate, scanned, atol=1e-5)
