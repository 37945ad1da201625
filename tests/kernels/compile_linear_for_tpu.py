"""Compiles the recurrent engine's kernels and their gradient for TPUs on a machine without one; prints a JSON line. Run by test_linear_tpu.py, and by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
from tpu_compiler import compile_gradient, errors

from pallas_kernels import linear
from pallas_kernels.tiles import look_up


def arrays(decay, *, length, groups=1, size=128, value_size=128, normalize=False, dtype=jnp.bfloat16, keys=2, states=2):
    """Abstract tokens and state of a call."""
    like = jax.ShapeDtypeStruct
    decays = {"none": None, "head": (1, states, 1, length), "channel": (1, states, length, size)}
    log_decay = None if decay == "none" else like(decays[decay], jnp.float32)
    tokens = linear.Tokens(like((1, states, groups, length, size), dtype), like((1, keys, length, size), dtype), like((1, keys, length, value_size), dtype), log_decay)
    return tokens, linear.State(like((1, states, size, value_size), jnp.float32), like((1, states, 1, size), jnp.float32) if normalize else None)


def compile_for_tpu(chip, decay, *, length, **options):
    """The compiled gradient, and the bytes of states that it keeps."""
    tokens, state = arrays(decay, length=length, **options)
    (b, m, g, t, h), hv = tokens.query.shape, tokens.value.shape[3]
    query, value = jax.ShapeDtypeStruct((b, t, m * g, h), tokens.query.dtype), jax.ShapeDtypeStruct((b, t, m, hv), tokens.value.dtype)
    plan = linear.tpu.choose_plan(query, value, m, look_up("linear, tpu", "", 0, 0), 128)

    done = compile_gradient(chip, partial(linear.tpu.attend, plan), tokens, state)
    return done, t // plan.slab * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def main():
    cases = {
        "no decay, normalised, groups": ("v5e", "none", dict(normalize=True, groups=4)),
        "per head, normalised, groups": ("v5e", "head", dict(normalize=True, groups=2, size=64, value_size=64)),
        "per head, shared keys, float32": ("v5e", "head", dict(keys=1, size=96, value_size=40, dtype=jnp.float32)),
        "per channel, normalised, heads of 256": ("v5e", "channel", dict(normalize=True, size=256, value_size=256)),
        "per channel on v5p": ("v5p", "channel", {}),
        "per head on v6e": ("v6e", "head", {}),
    }
    found = errors({name: partial(compile_for_tpu, chip, decay, length=512, **options) for name, (chip, decay, options) in cases.items()})
    memory = []
    for length in (2**13, 2**20):
        done, states = compile_for_tpu("v5e", "head", length=length)
        memory.append((done.memory_analysis().temp_size_in_bytes, states))
    print(json.dumps({"errors": found, "memory": memory}))


if __name__ == "__main__":
    main()
