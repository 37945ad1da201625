"""Memory of the fold: temporary bytes of the compiled call grow like T, not like T^2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import masks, scores

LENGTHS = 1024, 2048, 4096, 8192
HEADS, SIZE = 4, 32

CALLS = {
    "causal": lambda table, ids: dict(mask=masks.causal()),
    "causal, learned offset bias, traced documents": lambda table, ids: dict(mask=masks.causal() & masks.documents(ids), scores=scores.t5_bias(table)),
}


def temporary_bytes(call, length):
    """Of the compiled attention and all its gradients."""
    def loss(query, key, value, table, ids):
        return attnx.attention(query, key, value, implementation="blockwise", block_sizes=(128, 128), **call(table, ids)).sum()

    array = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32)
    table, ids = jax.ShapeDtypeStruct((32, HEADS), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(array, array, array, table, ids)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", CALLS)
def test_linear_in_length(name):
    """A fixed part, that of the tiles in work, and one that doubles with the length; next to T^2 numbers it is little."""
    sizes = [temporary_bytes(CALLS[name], length) for length in LENGTHS]
    growth = np.diff(sizes)
    np.testing.assert_allclose(growth[1:] / growth[:-1], 2, rtol=0.05, err_msg=str(sizes))
    assert sizes[-1] < 4 * HEADS * LENGTHS[-1] ** 2 / 40, sizes
