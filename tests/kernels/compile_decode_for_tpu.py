"""Compiles decoding for TPUs on a machine without one; prints a JSON line. Run by test_decode_tpu.py, and by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
from tpu_compiler import compile_for, errors

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.decode import cascade, decode


def shifted(s, at, row, column):
    return s + row - column


def compile_for_tpu(*, chip="v5e", batch=2, tokens=1, heads=8, kv_heads=2, size=128, length=2048, dtype=jnp.bfloat16, cache_dtype=None, page=None, shared=None,
                    **options):
    """The compiled kernel with its surroundings."""
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    cache = array(*((batch, length) if page is None else (batch * length // page + 7, page)), kv_heads, size, dtype=cache_dtype or dtype)
    integers = partial(array, dtype=jnp.int32)
    table = None if page is None else integers(batch, length // page)

    def run(query, cache, lengths, table, shared):
        if shared is not None:
            return cascade(query, shared, shared, cache, cache, lengths, page_table=table, implementation="pallas", **options)
        return decode(query, cache, cache, lengths, page_table=table, implementation="pallas", **options)

    arguments = array(batch, tokens, heads, size), cache, integers(batch), table, None if shared is None else array(shared, kv_heads, size)
    with fused.forced(interpret=False):
        return compile_for(chip, run, *arguments)


def main():
    columns = scores.elementwise(shifted, attnx.Operand(jnp.zeros((2, 3)), ("batch", "query")), attnx.Operand(jnp.zeros((2, 2048)), ("kv_head", "key")))
    cases = {
        "causal, grouped": dict(mask=masks.causal()),
        "many heads": dict(chip="v5p", heads=32, kv_heads=8),
        "one key-value head, odd length": dict(kv_heads=1, length=2000),
        "six heads of 64, float32": dict(heads=6, kv_heads=6, size=64, dtype=jnp.float32, mask=masks.sliding_window(700)),
        "pages": dict(chip="v6e", kv_heads=8, page=16, mask=masks.causal()),
        "pages, softpick, slopes, several tokens": dict(tokens=3, kv_heads=4, page=64, weights=weights.softpick(), scores=scores.alibi(8)),
        "row and column operands, offsets, bias, boolean mask": dict(
            tokens=3, scores=(columns, scores.t5_bias(jnp.zeros((32, 8))), scores.bias(jnp.zeros((8, 3, 2048)))), mask=masks.explicit(jnp.ones((3, 2048), bool))),
        "sigmoid, soft cap": dict(chip="v6e", weights=weights.sigmoid(), scores=scores.soft_cap(jnp.float32(30))),
        "narrow cache": dict(dtype=jnp.float32, cache_dtype=jnp.bfloat16),
        "cascade": dict(chip="v5p", batch=4, shared=1024, return_residual=True),
    }
    found = errors({name: partial(compile_for_tpu, **options) for name, options in cases.items()})
    sizes = [compile_for_tpu(heads=32, kv_heads=kv_heads, length=8192, page=page).memory_analysis() for kv_heads, page in ((8, None), (8, 16), (2, None))]
    print(json.dumps({"errors": found, "temporary": [size.temp_size_in_bytes for size in sizes]}))


if __name__ == "__main__":
    main()
