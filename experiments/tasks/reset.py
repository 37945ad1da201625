"""Selective reset: key-value pairs follow each other, RESET makes all before it void, and a query asks for the last value of its key since then.

    k v k v R k v ... k v ? k -> v        (or NONE, if that key has not occurred since the last RESET)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

KEYS, VALUES = 8, 8
RESET, ASK, NONE = KEYS + VALUES, KEYS + VALUES + 1, KEYS + VALUES + 2
VOCABULARY = NONE + 1


def sampler(pairs: int, batch: int, rate: float = 0.15) -> Callable:
    """``sample(key) -> (tokens int32 [batch, 2 pairs + 2], answers int32 [batch])``; an event is a reset (two RESET tokens) with probability ``rate``."""
    def one(key):
        k, v, r, q = jax.random.split(key, 4)
        keys = jax.random.randint(k, (pairs,), 0, KEYS)
        values = jax.random.randint(v, (pairs,), 0, VALUES)
        resets = jax.random.uniform(r, (pairs,)) < rate
        asked = jax.random.randint(q, (), 0, KEYS)
        index = jnp.arange(pairs)
        since = jnp.max(jnp.where(resets, index, -1))
        last = jnp.max(jnp.where((keys == asked) & ~resets & (index > since), index, -1))
        answer = jnp.where(last >= 0, KEYS + values[last], NONE)
        events = jnp.stack([jnp.where(resets, RESET, keys), jnp.where(resets, RESET, KEYS + values)], axis=1).reshape(-1)
        return jnp.concatenate([events, jnp.stack([jnp.int32(ASK), asked])]).astype(jnp.int32), answer.astype(jnp.int32)

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))
