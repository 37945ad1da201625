"""Compiles attention and its gradient for TPUs on a machine without one; prints a JSON line. Run by test_flash_tpu.py, and by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
from tpu_compiler import compile_call, errors

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.attention import prepare
from attnx.masks.grid import neighborhood


def gap(s, at, row, column):
    return s + row - column


def compile_for_tpu(length, size=128, dtype=jnp.bfloat16, block_sizes=(256, 256), chip="v5e", **parts):
    """The compiled gradient of attention with these parts: 2 query heads on 1 key-value head."""
    q, k = jnp.zeros((1, length, 2, size), dtype), jnp.zeros((1, length, 1, size), dtype)
    _, program, data = prepare(q, k, k[..., :64], **parts)
    with fused.forced(interpret=False):
        return compile_call(fused.choose_fused(program, data, block_sizes), data, chip)


def main():
    t = 512
    ids = jnp.zeros((1, t), jnp.int32)
    columns = scores.elementwise(gap, attnx.Operand(jnp.zeros((1, 2, t)), ("batch", "head", "query")), attnx.Operand(jnp.zeros((2, t)), ("head", "key")))
    table = scores.t5_bias(jnp.zeros((32, 2)))
    cases = {
        "softmax, documents, column and offset operands": dict(mask=masks.documents(ids) & masks.causal(), scores=(columns, table)),
        "softpick, documents, column and offset operands, dropout": dict(
            weights=weights.softpick(), mask=masks.documents(ids), scores=(columns, table, scores.alibi(2)), dropout_rate=0.1, dropout_key=jax.random.key(0)),
        "sigmoid, bias, boolean mask": dict(
            chip="v5p", weights=weights.sigmoid(), mask=masks.explicit(jnp.ones((t, t), bool)), scores=scores.bias(jnp.zeros((2, t, t)))),
        "entmax, soft cap": dict(chip="v6e", weights=weights.entmax15(), scores=scores.soft_cap(jnp.float32(30))),
        "re-weighted softplus": dict(weights=weights.lssa(power=15), mask=masks.causal()),
        "tiles of the table, for long sequences": dict(chip="v6e", length=8192, size=256, block_sizes=None, mask=masks.causal()),
        "tiles of the table, for long sequences, float32": dict(chip="v5p", length=8192, dtype=jnp.float32, block_sizes=None),
        "neighbourhoods, size of head and biases": dict(length=1536, size=32 + 49, mask=neighborhood((32, 48), 7, query_tile=(16, 16), key_tile=(16, 16))),
        "odd lengths, given positions": dict(length=500, mask=masks.causal(), query_positions=jnp.arange(500), key_positions=jnp.arange(500)),
    }
    found = errors({name: partial(compile_for_tpu, **{"length": t, **parts}) for name, parts in cases.items()})
    temporary = [compile_for_tpu(length, mask=masks.causal()).memory_analysis().temp_size_in_bytes for length in (1024, 4096)]
    print(json.dumps({"errors": found, "temporary": temporary}))


if __name__ == "__main__":
    main()
