"""Compiles selected attention and its gradient for a v5e on a machine without one; prints a JSON line. Run by test_selected_tpu.py, and by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import attnx
from attnx import masks, scores, weights
from attnx.core import fused, operations
from attnx.core.attention import prepare
from attnx.core.selected import choose
from attnx.core.selected_fused import choose_fused
from attnx.core.selected_gathered import Chosen, Extra

DEVICE = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def gap(s, at, row, column):
    return s + row - column


def run(executor, data, cotangents):
    """Output and gradients in the layout of the kernels."""
    result, pull = jax.vjp(partial(operations.output, executor), data)
    return result, pull(cotangents)


def compile_for_tpu(length, block_sizes=(64, 64), *, heads=1, entries=4, scored=False, dtype=jnp.bfloat16, before=(), mask=None, **parts):
    """The compiled gradient of selected attention with these parts: 2 query heads on 1 key-value head of 128."""
    bq, bk = block_sizes
    q, k = jnp.zeros((1, length, 2, 128), dtype), jnp.zeros((1, length, 1, 128), dtype)
    table = jnp.zeros((1, heads, -(-length // bq), entries), jnp.int32)
    extra = (Extra(jnp.zeros(table.shape)),) if scored else ()
    _, program, data = prepare(q, k, k[..., :64], scores=(*before, *extra), mask=Chosen(table) & mask, **parts)
    with fused.forced(interpret=False):
        executor = choose_fused(program, data, choose(program, data, bq, bk))
    cotangents = jax.eval_shape(partial(operations.output, executor), data)
    on_device = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(DEVICE)))
    with jax.default_device(DEVICE):
        return jax.jit(partial(run, executor)).trace(*on_device((data, cotangents))).lower(lowering_platforms=("tpu",)).compile()


def main():
    t = 512
    columns = scores.elementwise(gap, attnx.Operand(jnp.zeros((1, 2, t)), ("batch", "head", "query")), attnx.Operand(jnp.zeros((2, t)), ("head", "key")))
    cases = {
        "blocks of 64, scores of blocks, row, column and offset operands": dict(scored=True, before=(columns, scores.t5_bias(jnp.zeros((32, 2))))),
        "large blocks, each head for itself, odd length": dict(length=1000, block_sizes=(1024, 1024), entries=1, heads=2, scored=True),
        "small blocks, each head for itself, float32": dict(block_sizes=(16, 32), heads=2, scored=True, dtype=jnp.float32),
        "sigmoid, documents, bias": dict(block_sizes=(32, 128), weights=weights.sigmoid(), mask=masks.documents(jnp.zeros((1, t), jnp.int32)),
                                         before=(scores.bias(jnp.zeros((2, t, t))),)),
    }
    errors = {}
    for name, options in cases.items():
        try:
            compile_for_tpu(options.pop("length", t), **options)
            errors[name] = None
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:2000]
    temporary = [compile_for_tpu(length, (128, 128), scored=True, mask=masks.causal()).memory_analysis().temp_size_in_bytes for length in (2048, 8192)]
    print(json.dumps({"errors": errors, "temporary": temporary}))


if __name__ == "__main__":
    main()
