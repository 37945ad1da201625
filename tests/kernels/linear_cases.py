"""Calls of the recurrent engine that between them use everything its kernels serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.linear import LinearState, linear_attention

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 2, 300, 4, 2, 5, 3

# Shape of the decay, number of states, options.
CASES = {
    "no decay, normalised": (lambda t, h: None, KEY_HEADS, {"normalize": True}),
    "no decay, documents": (lambda t, h: None, KEY_HEADS, {"segments": True, "scale": 0.7}),
    "constant": (lambda t, h: (HEADS,), HEADS, {"normalize": True, "normalizer_floor": 1.0, "scale": 0.7}),
    "per head, shared state, documents": (lambda t, h: (BATCH, t, KEY_HEADS), KEY_HEADS, {"segments": True, "normalize": True}),
    "per channel, documents": (lambda t, h: (BATCH, t, HEADS, h), HEADS, {"segments": True, "normalize": True}),
    "per channel, shared state": (lambda t, h: (BATCH, t, KEY_HEADS, h), KEY_HEADS, {}),
}


def case(name, dtype=np.float64, length=LENGTH, size=SIZE, value_size=VALUE_SIZE):
    """The arrays (query, key, value, log_decay, state), the cotangents of output and state, the segments, and options."""
    shape, states, options = CASES[name]
    options, random = dict(options), np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    query, key, value = normal(BATCH, length, HEADS, size), normal(BATCH, length, KEY_HEADS, size), normal(BATCH, length, KEY_HEADS, value_size)
    log_decay = shape(length, size)
    if log_decay is not None:
        log_decay = -random.exponential(scale=0.1, size=log_decay)
        if log_decay.ndim > 1:
            log_decay[random.random(log_decay.shape) < 0.05] = -np.inf
        log_decay = jnp.asarray(log_decay, dtype)
    wide = functools.partial(jnp.asarray, dtype=jnp.promote_types(dtype, jnp.float32))
    state = LinearState(wide(normal(BATCH, states, size, value_size)))
    if options.get("normalize"):
        query, key, state = abs(query), abs(key), LinearState(state.memory, wide(abs(normal(BATCH, states, size))))
    segments = np.cumsum(random.random((BATCH, length)) < 0.02, axis=1)
    segments[random.random((BATCH, length)) < 0.1] = -1
    segments = jnp.asarray(segments) if options.pop("segments", False) else None
    cotangents = normal(BATCH, length, HEADS, value_size), jax.tree.map(lambda x: wide(normal(*x.shape)), state)
    return (query, key, value, log_decay, state), cotangents, segments, options


@functools.partial(jax.jit, static_argnames="options")
def evaluate(arrays, cotangents, segments, options):
    def attend(query, key, value, log_decay, state):
        return linear_attention(query, key, value, log_decay=log_decay, initial_state=state, return_state=True, segment_ids=segments, **dict(options))

    result, pull = jax.vjp(attend, *arrays)
    return result, pull(cotangents)


def run(implementation, arrays, cotangents, segments, options):
    """Output, final state, and the gradients by query, key, value, log_decay and initial state."""
    return evaluate(arrays, cotangents, segments, tuple((options | {"implementation": implementation}).items()))
