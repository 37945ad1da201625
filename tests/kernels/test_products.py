"""Kernels whose products are rounded, compiled for TPUs and lowered for an H200 where there is neither."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from gpu_lowering import kernels
from tpu_compiler import needs_compiler, report

from attnx import products
from attnx.core import fused


@needs_compiler
def test_compile_for_a_tpu():
    found = report("compile_products_for_tpu.py")
    assert len(found) == 2 and not any(found.values()), found


def test_lowered_for_a_gpu():
    """A kernel forward and two for the gradient; tiles larger than a block are refused, for a GPU has no cut through one."""
    x = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    gradient = lambda attend: jax.grad(lambda args: jnp.sum(attend(*args).astype(jnp.float32)))
    for attend in (products.sage3_attention, products.sagebwd_attention):
        attend = partial(attend, is_causal=True, implementation="pallas")
        assert kernels(attend, x, x, x) == 1
        assert kernels(gradient(attend), (x, x, x)) == 3
    with fused.forced(interpret=False, platform="gpu"), pytest.raises(NotImplementedError, match=r"cannot cut a tile into the blocks \(128, 64\)"):
        jax.eval_shape(partial(attend, tile_sizes=(256, 128)), x, x, x)
