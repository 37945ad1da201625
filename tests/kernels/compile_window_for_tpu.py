"""Compiles the window kernels and their gradient for TPUs on a machine without one; prints a JSON line. Run by test_window_tpu.py, and by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tpu_compiler import compile_gradient, errors

import attnx
from attnx.core import fused
from attnx.core.windows import window_attention


def compile_for_tpu(chip, length, heads, size, dtype=jnp.bfloat16, windows=128, bias=True, **parts):
    """The compiled gradient."""
    like = jax.ShapeDtypeStruct
    x, table = like((windows, length, heads, size), dtype), like((heads, length, length), jnp.float32)
    with fused.forced(interpret=False):
        if not bias:
            return compile_gradient(chip, partial(window_attention, implementation="pallas", **parts), x, x, x)
        return compile_gradient(chip, lambda *x: window_attention(*x[:3], bias=x[3], implementation="pallas", **parts), x, x, x, table)


def main():
    regions, mask = np.zeros((64, 49), np.int32), np.ones((4, 64, 64), bool)
    cases = {
        "7 x 7, 3 heads, shifted": ("v5e", 49, 3, 32, dict(regions=regions)),
        "7 x 7 on v5p, 6 heads, float32": ("v5p", 49, 6, 32, dict(regions=regions, dtype=jnp.float32)),
        "8 x 8 on v6e, mask, size 16": ("v6e", 64, 8, 16, dict(mask=mask)),
        "9 x 9, size 64, softpick": ("v5e", 81, 4, 64, dict(weights=attnx.weights.softpick(), scores=attnx.scores.alibi(4), bias=False)),
        "size 24, float32, an odd number of windows": ("v5e", 49, 2, 24, dict(windows=37, dtype=jnp.float32)),
    }
    found = errors({name: partial(compile_for_tpu, *call, **options) for name, (*call, options) in cases.items()})
    tokens, by_head = jax.ShapeDtypeStruct((4096, 64, 128), jnp.bfloat16), lambda x: x.reshape(*x.shape[:2], 4, 32)
    with fused.forced(interpret=False):  # as projections bring tokens, heads side by side
        done = compile_gradient("v5e", lambda *x: window_attention(*map(by_head, x), implementation="pallas").reshape(x[0].shape), *[tokens] * 3)
    print(json.dumps({"errors": found, "memory": (done.memory_analysis().temp_size_in_bytes, 4096 * 64 * 128 * 2)}))


if __name__ == "__main__":
    main()
