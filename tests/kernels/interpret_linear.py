"""The recurrent engine's kernel in Triton itself, interpreted: prints how far it is from the definition. For a process of its own, see :mod:`triton_emulated`."""

import json

import jax
import jax.numpy as jnp
import linear_cases
import numpy as np
import triton_emulated

from pallas_kernels import native
from pallas_kernels.linear import State, Tokens, gpu

jax.config.update("jax_disable_most_optimizations", True)
native.call, native.by_batch = triton_emulated.call, lambda function: function
gpu.SHORTEST, gpu.PROGRAMS = 2, 20  # few chunks a slab, so that states pass between slabs

LENGTH = 70
CASES = {  # of linear_cases; sizes of keys and values, what the kernel computes in
    "no decay, normalised": (20, 17, np.float32),
    "no decay, documents": (16, 16, np.float16),
    "constant": (16, 33, np.float32),
    "per head, shared state, documents": (20, 17, np.float32),
    "per channel, documents": (20, 17, np.float32),
    "per channel, shared state": (32, 40, np.float16),
}


def errors(name):
    """The largest differences of outputs and of states, relative to the largest number or 1."""
    size, value_size, dtype = CASES[name]
    arrays, _, _, options = linear_cases.case(name, np.float32, LENGTH, size, value_size)
    query, key, value, log_decay, state = arrays
    query, key, value = (x.astype(dtype) / (1 if options.get("normalize") else size**0.25) ** (n < 2) for n, x in enumerate((query, key, value)))
    decay = None if log_decay is None else "channel" if log_decay.ndim == 4 else "head"
    if decay:
        log_decay = jnp.broadcast_to(log_decay, (*query.shape[:2], *log_decay.shape[-1:])) if log_decay.ndim == 1 else log_decay
    plan = gpu.choose_plan(query, value, state.memory.shape[1], None, decay, scale=options.get("scale", 1.0), floor=options.get("normalizer_floor"), language="triton")
    padded = jax.tree.map(lambda x: np.asarray(jnp.pad(x, ((0, 0), (0, -LENGTH % plan.slab)) + ((0, 0),) * (x.ndim - 2))), Tokens(query, key, value, log_decay))
    given = State(state.memory, None if state.normalizer is None else state.normalizer[:, :, None])
    out, last = gpu.attend(plan, padded, given)

    expected, *after = definition(query, key, value, log_decay, state, **options)
    distance = lambda a, b: float(np.abs(np.asarray(a, np.float64).reshape(b.shape) - b).max() / max(1, np.abs(b).max()))
    return {"dtype": np.dtype(dtype).name, "slabs": padded.query.shape[1] // plan.slab,
            "errors": [distance(out[:, :LENGTH], expected), *(distance(a, b) for a, b in zip(last, after))]}


def definition(query, key, value, log_decay, state, normalize=False, scale=1.0, normalizer_floor=None):
    """Token by token in float64: the output, and the state after the last."""
    q, k, v, memory = (np.asarray(x, np.float64) for x in (query, key, value, state.memory))
    (b, t, n, h), m = q.shape, memory.shape[1]
    k, v = (np.repeat(x, m // x.shape[2], axis=2) for x in (k, v))
    q = q.reshape(b, t, m, n // m, h)
    decay = np.ones((b, t, m, 1)) if log_decay is None else np.exp(np.asarray(log_decay, np.float64)).reshape(b, t, m, -1)
    summed, outs = np.asarray(state.normalizer, np.float64) if normalize else np.zeros((b, m, h)), []
    for i in range(t):
        memory = decay[:, i, ..., None] * memory + k[:, i, ..., None] * v[:, i, :, None]
        summed = decay[:, i] * summed + k[:, i]
        out = scale * np.einsum("bmgh,bmhv->bmgv", q[:, i], memory)
        if normalize:
            divisor = scale * np.einsum("bmgh,bmh->bmg", q[:, i], summed)[..., None]
            out /= divisor if normalizer_floor is None else np.maximum(abs(divisor), normalizer_floor)
        outs.append(out.reshape(b, n, -1))
    return (np.stack(outs, axis=1), memory, *([summed] if normalize else []))


if __name__ == "__main__":
    print(json.dumps({name: errors(name) for name in CASES}))
