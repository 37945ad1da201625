"""Loss and every parameter's gradient on one device and on meshes that cut batch, sequence, heads and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, weights
from attnx.models import Decoder, TransformerConfig
from attnx.training import Placement, make_mesh, shardings, use

TOKENS = np.random.default_rng(0).integers(0, 32, (8, 33)).astype(np.int32)
SEGMENTS = np.sort(np.random.default_rng(1).integers(0, 3, (8, 33)), axis=1).astype(np.int32)
MECHANISMS = {
    "softmax": attnx.pairs(mask=masks.causal()),
    "window": attnx.pairs(mask=masks.sliding_window(5)),
    "softpick": attnx.pairs(mask=masks.causal(), weights=weights.softpick()),
    "documents": attnx.pairs(mask=masks.causal()),
    "linear": attnx.recurrent(log_decay=jnp.log(jnp.array([0.9, 0.99]))),
}
MESHES = ({"data": 2, "sequence": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2})


def gradient_of(name, dtype):
    config = TransformerConfig(vocab_size=32, features=16, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm="rms", param_dtype=dtype)
    graph, params, rest = nnx.split(Decoder(config, MECHANISMS[name], rngs=nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, batch):
        segments = batch["segments"][:, :-1] if name == "documents" else None
        logits = nnx.merge(graph, params, rest)(batch["tokens"][:, :-1], segment_ids=segments)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][:, 1:, None], -1).mean()

    return params, jax.value_and_grad(loss)


@pytest.mark.parametrize("name, wide", [*((name, False) for name in MECHANISMS), ("softmax", True), ("linear", True)])
def test_every_gradient_is_that_of_one_device(name, wide):
    with jax.enable_x64(wide):
        params, gradient = gradient_of(name, jnp.float64 if wide else jnp.float32)
        batch = {"tokens": TOKENS, "segments": SEGMENTS}
        want = jax.jit(gradient)(params, batch)
        for sizes in MESHES:
            mesh = make_mesh(**sizes)
            with use(mesh):
                placed = jax.device_put(params, shardings(mesh, jax.eval_shape(lambda: params)))
                got = jax.device_get(jax.jit(gradient)(placed, Placement(mesh, len(TOKENS))(batch)))
            for a, b in zip(jax.tree.leaves(jax.device_get(want)), jax.tree.leaves(got), strict=True):
                assert np.linalg.norm(a - b) <= (1e-10 if wide else 1e-5) * np.linalg.norm(a)
