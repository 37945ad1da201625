"""The sublayers that entries give for decoders: made by one call, causal, and the same token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx.catalogue import entries

LAYERS = {id: entry.causal_layer for id, entry in entries().items() if entry.causal_layer}
B, T, D = 2, 20, 16


@pytest.mark.parametrize("id", LAYERS)
def test_layer(id):
    """In float32: reading 18 tokens and then one by one finds what the call finds, and a later token changes nothing before it."""
    layer = LAYERS[id](D, 2, length=T, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (B, T, D))

    @nnx.jit
    def run(layer, x):
        state, first = layer.step(layer.init_state(B, T), x[:, :18])
        state, second = layer.step(state, x[:, 18:19])
        state, last = layer.step(state, x[:, 19:])
        return layer(x), jnp.concatenate([first, second, last], axis=1)

    whole, streamed = run(layer, x)
    assert whole.shape == (B, T, D)
    np.testing.assert_allclose(streamed, whole, atol=2e-5)
    np.testing.assert_allclose(run(layer, x.at[:, 11:].set(2.0))[0][:, :11], whole[:, :11], atol=2e-5)
