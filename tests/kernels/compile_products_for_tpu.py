"""Compiles SageBwd with its gradient, and SageAttention3, for TPUs on a machine without one; prints a JSON line. Run by test_products.py,
and by hand, for other chips if they are named."""

import json
import sys
from functools import partial

import jax.numpy as jnp
from tpu_compiler import compile_for, compile_gradient, errors

from attnx.core import fused
from attnx.products import sage3_attention, sagebwd_attention


def main():
    q, k = jnp.zeros((1, 256, 2, 128), jnp.bfloat16), jnp.zeros((1, 256, 1, 128), jnp.bfloat16)
    options = dict(is_causal=True, implementation="pallas", tile_sizes=(256, 128))
    with fused.forced(interpret=False):
        cases = {}
        for chip in sys.argv[1:] or ["v5e"]:
            cases[f"SageBwd, {chip}"] = partial(compile_gradient, chip, partial(sagebwd_attention, **options), q, k, k)
            cases[f"SageAttention3, {chip}"] = partial(compile_for, chip, partial(sage3_attention, **options), q, k, k)
        print(json.dumps(errors(cases)))


if __name__ == "__main__":
    main()
