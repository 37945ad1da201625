"""One pass through the engines, quick enough for every supported version of Python and jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attnx
from attnx import masks, scores, weights


@pytest.mark.parametrize("weight", [weights.softmax(), weights.softpick(), weights.entmax15()], ids=lambda w: type(w).__name__)
def test_executions_agree(weight):
    query, key, value, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 24, 2, 8))
    table = jax.random.normal(jax.random.key(1), (32, 2))
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,))

    def run(attend, **options):
        def loss(query, key, value, table):
            parts = dict(scores=scores.t5_bias(table), mask=masks.causal() & masks.documents(jnp.arange(24) // 10), weights=weight)
            return (attend(query, key, value, **parts, **options) * cotangent).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(query, key, value, table)

    want = run(attnx.attention, implementation="reference")
    for got in (run(attnx.attention, block_sizes=(8, 8)), run(attnx.ring_attention, block_sizes=(8, 8), mesh=mesh)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), want, got)


def test_decoding_is_the_parallel_form():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 9, 2, 8))
    mechanism = attnx.pairs(mask=masks.sliding_window(4))
    state, outputs, step = mechanism.init(1, 9, 2, 8, 8, jnp.float32), [], jax.jit(mechanism.step)
    for t in range(9):
        state, out = step(state, query[:, t : t + 1], key[:, t : t + 1], value[:, t : t + 1])
        outputs.append(out)
    assert state.key.shape == (1, 4, 2, 8)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), mechanism(query, key, value), rtol=1e-5, atol=1e-6)
