"""Compiles selected attention and its gradient for TPUs on a machine without one; prints a JSON line. Run by test_selected_tpu.py, and by hand."""

import json
from functools import partial

import jax.numpy as jnp
from tpu_compiler import compile_call, errors

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.attention import prepare
from attnx.core.selected import choose
from attnx.core.selected_fused import choose_fused
from attnx.core.selected_gathered import Chosen, Extra


def gap(s, at, row, column):
    return s + row - column


def compile_for_tpu(length, block_sizes=(64, 64), *, heads=1, entries=4, scored=False, dtype=jnp.bfloat16, chip="v5e", before=(), mask=None, **parts):
    """The compiled gradient of selected attention with these parts: 2 query heads on 1 key-value head of 128."""
    bq, bk = block_sizes
    q, k = jnp.zeros((1, length, 2, 128), dtype), jnp.zeros((1, length, 1, 128), dtype)
    table = jnp.zeros((1, heads, -(-length // bq), entries), jnp.int32)
    extra = (Extra(jnp.zeros(table.shape)),) if scored else ()
    _, program, data = prepare(q, k, k[..., :64], scores=(*before, *extra), mask=Chosen(table) & mask, **parts)
    with fused.forced(interpret=False):
        return compile_call(choose_fused(program, data, choose(program, data, bq, bk)), data, chip)


def main():
    t = 512
    columns = scores.elementwise(gap, attnx.Operand(jnp.zeros((1, 2, t)), ("batch", "head", "query")), attnx.Operand(jnp.zeros((2, t)), ("head", "key")))
    cases = {
        "blocks of 64, scores of blocks, row, column and offset operands": dict(scored=True, before=(columns, scores.t5_bias(jnp.zeros((32, 2))))),
        "large blocks, each head for itself, odd length": dict(chip="v6e", length=1000, block_sizes=(1024, 1024), entries=1, heads=2, scored=True),
        "small blocks, each head for itself, float32": dict(chip="v5p", block_sizes=(16, 32), heads=2, scored=True, dtype=jnp.float32),
        "sigmoid, documents, bias": dict(block_sizes=(32, 128), weights=weights.sigmoid(), mask=masks.documents(jnp.zeros((1, t), jnp.int32)),
                                         before=(scores.bias(jnp.zeros((2, t, t))),)),
    }
    found = errors({name: partial(compile_for_tpu, **{"length": t, **options}) for name, options in cases.items()})
    temporary = [compile_for_tpu(length, (128, 128), scored=True, mask=masks.causal()).memory_analysis().temp_size_in_bytes for length in (2048, 8192)]
    print(json.dumps({"errors": found, "temporary": temporary}))


if __name__ == "__main__":
    main()
