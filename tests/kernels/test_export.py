"""Calls on TPU kernels are exported, gradients included, on a machine without a TPU (lowered, not compiled)."""

import jax
import jax.numpy as jnp
import pytest

import attnx
from attnx import masks
from attnx.core import fused
from attnx.core.linear import linear_attention
from attnx.core.selected import selected_attention

INDICES = jnp.zeros((1, 1, 2, 1), jnp.int32)


def gradient(attend):
    return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))


CALLS = {
    "flash": (gradient(lambda *x: attnx.attention(*x, mask=masks.causal(), implementation="pallas")), 3),
    "selected": (gradient(lambda *x: selected_attention(*x, INDICES, block_sizes=(128, 128), implementation="pallas")), 3),
    "linear": (gradient(lambda *x: linear_attention(*x, implementation="pallas")), 2),
    "decode": (lambda q, k, v: attnx.decode(q[:, :1], k, v, jnp.array([9, 200]), implementation="pallas"), 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_exports_for_a_tpu(name):
    function, kernels = CALLS[name]
    args = [jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]
    with fused.forced(interpret=False):
        exported = jax.export.export(jax.jit(function), platforms=("tpu",))(*args)
    assert exported.mlir_module().count("@tpu_custom_call") == kernels
    assert exported.platforms == ("tpu",)
