"""One program, however it is cut: the same losses and parameters on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import attnx
from attnx.models import Decoder, TransformerConfig
from attnx.nn.common import logical_axes
from attnx.training import Checkpoints, Placement, TrainState, init_state, make_mesh, make_train_step, muon, shardings, use

CONFIG = TransformerConfig(vocab_size=32, features=16, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm="rms")
OPTIMIZER = muon(0.02, adam_learning_rate=0.01, max_norm=0.5)
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 17)).astype(np.int32)


def parts():
    return nnx.split(Decoder(CONFIG, attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0)), nnx.Param, ...)


GRAPH, _, REST = jax.eval_shape(parts)


def loss(params, batch, key):
    logits = nnx.merge(GRAPH, params, REST)(batch["tokens"][:, :-1])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][:, 1:, None], -1)
    return losses.sum(), losses.size


def make():
    return init_state(parts()[1], OPTIMIZER, jax.random.key(0))


def train(mesh=None, steps=3):
    """Parameters and losses after a few steps."""
    batch, cut = {"tokens": TOKENS}, None
    if mesh is not None:
        placement = Placement(mesh, len(TOKENS))
        cut = shardings(mesh, jax.eval_shape(make)), placement.sharding
        batch = placement(batch)
    step = make_train_step(loss, OPTIMIZER, shardings=cut)
    state, losses = jax.jit(make, out_shardings=cut and cut[0])(), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def alone():
    return train()


def test_eight_devices_do_as_one(alone, tmp_path):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with use(mesh):
        state, losses = train(mesh)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), jax.device_get(state.params), jax.device_get(alone[0].params))
    table = state.params["embedding"]["table"][...]
    assert table.sharding.spec == P("tensor", "fsdp") and len({str(shard.index) for shard in table.addressable_shards}) == 4
    # What one mesh saved, another restores.
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, loss=0.0)
        checkpoints.wait()
        other = make_mesh(fsdp=8)
        abstract = jax.eval_shape(make)
        template = jax.tree.map(lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), abstract, shardings(other, abstract))
        restored = checkpoints.restore(template).state
    assert len({str(shard.index) for shard in restored.params["embedding"]["table"][...].addressable_shards}) == 8
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), jax.device_get(restored.params), jax.device_get(state.params))


def test_axes_that_do_not_divide_stay_whole():
    mesh = make_mesh(fsdp=2, tensor=4)
    state = TrainState(jnp.zeros((), jnp.int32), nnx.State({"kernel": nnx.Param(jnp.zeros((6, 10, 8)), **logical_axes("layers", "embed", "heads")),
                                                            "odd": nnx.Param(jnp.zeros((3, 6)), **logical_axes("embed", "mlp"))}), (), jax.random.key(0))
    cut = shardings(mesh, state)
    assert cut.params["kernel"].get_value().spec == P(None, "fsdp", "tensor")
    assert cut.params["odd"].get_value().spec == P(None, None)
    assert cut.step.spec == cut.key.spec == P()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="mesh: expected sizes whose product is the number of devices, 8, got data=3"):
        make_mesh(data=3)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 4 = data x fsdp of the mesh, got 6"):
        Placement(make_mesh(data=2, fsdp=2, tensor=2), 6)
