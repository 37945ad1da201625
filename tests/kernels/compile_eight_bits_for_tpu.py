"""Compiles attention on operands of eight bits for three TPUs on a machine without one; prints a JSON line. Run by test_eight_bits.py, and by hand."""

import json
from functools import partial

import jax.numpy as jnp
from tpu_compiler import compile_for, compile_gradient, errors

import attnx
from attnx import masks, products
from attnx.core import fused

X = [jnp.zeros((1, 512, heads, 64), jnp.bfloat16) for heads in (2, 1, 1)]


def forced(function, *args, **kwargs):
    with fused.forced(interpret=False):
        return function(*args, implementation="pallas", **kwargs)


def sage(**options):
    return partial(forced, products.sage_attention, is_causal=True, **options)


def tiles(chosen):
    return partial(forced, attnx.attention, mask=masks.causal(), products=chosen)


def main():
    cases = {chip: partial(compile_for, chip, sage(**options), *X)
             for chip, options in {"v5e": {}, "v5p": {"scores": "token"}, "v6e": {"values": "int8"}}.items()}
    cases |= {name: partial(compile_gradient, "v6e", tiles(chosen), *X) for name, chosen in {
        "in tiles, int8": products.int8("block", "int8"), "in tiles, float8": products.float8("token", "float8")}.items()}
    print(json.dumps({"errors": errors(cases),
                      "float16": errors({"float16": partial(compile_for, "v5e", sage(values="float16"), *X)})["float16"]}))


if __name__ == "__main__":
    main()
