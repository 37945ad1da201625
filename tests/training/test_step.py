"""The step and the optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnx.nn.common import logical_axes
from attnx.training import adamw, init_state, make_train_step, muon


def loss(params, batch, key):
    """A regression whose number of predictions differs from row to row."""
    error = (batch["x"] @ params["w"] + params["b"] - batch["y"]) * batch["valid"]
    return (error**2).sum(), batch["valid"].sum()


PARAMS = {"w": jnp.arange(3.0), "b": jnp.zeros(())}
BATCH = {"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), "y": np.linspace(-1, 1, 8).astype(np.float32),
         "valid": np.array([1, 1, 1, 0, 0, 1, 0, 0], np.float32)}


def copied():
    return init_state(jax.tree.map(jnp.copy, PARAMS), optax.sgd(0.1), jax.random.key(0))


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_the_whole_batch(parts):
    whole, metrics = make_train_step(loss, optax.sgd(0.1))(copied(), BATCH)
    state, accumulated = make_train_step(loss, optax.sgd(0.1), accumulate=parts)(copied(), BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (whole.params, metrics), (state.params, accumulated))
    total, count = loss(PARAMS, BATCH, None)
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-6)
    assert int(state.step) == 1
    with pytest.raises(ValueError, match="multiple of accumulate = 3"):
        make_train_step(loss, optax.sgd(0.1), accumulate=3)(copied(), BATCH)


def test_the_state_is_donated():
    state = copied()
    make_train_step(loss, optax.sgd(0.1))(state, BATCH)
    assert state.params["w"].is_deleted()


def test_each_step_has_a_key_of_its_own():
    def noisy(params, batch, key):
        return params["w"].sum() * 0 + jax.random.uniform(key), 1

    step = make_train_step(noisy, optax.sgd(0.1))
    state, first = step(copied(), BATCH)
    _, second = step(state, BATCH)
    assert first["loss"] != second["loss"]
    assert first["loss"] == step(copied(), BATCH)[1]["loss"]


def variable(shape, *names):
    return nnx.Param(jax.random.normal(jax.random.key(len(shape)), shape), **logical_axes(*names))


def test_muon_orthogonalises_matrices_between_the_stream_and_the_heads():
    params = nnx.State({"query": variable((2, 4, 2, 3), "layers", "embed", "heads", "head_size"),
                        "out": variable((2, 2, 3, 4), "layers", "heads", "head_size", "embed"),
                        "bias": variable((2, 2, 3), "layers", "heads", "head_size"),
                        "table": variable((7, 4), "vocab", "embed"),
                        "norm": variable((2, 4), "layers", "embed")})
    optimizer = muon(1.0, adam_learning_rate=1e-3, ns_steps=12, max_norm=1e9)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    for name, matrix in (("query", updates["query"][...].reshape(2, 4, 6)), ("out", updates["out"][...].reshape(2, 6, 4))):
        singular = jnp.linalg.svd(matrix, compute_uv=False) / np.sqrt(max(1, matrix.shape[2] / matrix.shape[1]))
        assert ((0.6 < singular) & (singular < 1.3)).all(), name
    for name in ("bias", "table", "norm"):
        size = abs(updates[name][...])  # Adam's first step is its rate times the gradient's sign, but for Nesterov's momentum
        np.testing.assert_allclose(size, size.mean(), rtol=1e-3)
        assert 1e-3 <= size.mean() < 2e-3


def test_adamw_decays_matrices_alone():
    params = nnx.State({"matrix": variable((2, 4, 3), "layers", "embed", "mlp"), "norm": variable((2, 4), "layers", "embed")})
    optimizer = adamw(1.0, weight_decay=0.1)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"][...], -0.1 * params["matrix"][...], rtol=1e-6)
    assert not updates["norm"][...].any()
