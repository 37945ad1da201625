"""Stored pairs: at the beginning values are given to keys, a long filler follows, and at the end all keys are asked for in another order.

    (k=v) (k=v) ... (k=v) filler ... filler k k ... k -> v v ... v

A pair is one token, so that one layer can store and find it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

KEYS, VALUES, FILLERS = 12, 8, 16
ASK = KEYS * VALUES
FILLER = ASK + KEYS
VOCABULARY = FILLER + FILLERS


def sampler(length: int, batch: int) -> Callable:
    """``sample(key) -> (tokens int32 [batch, length], answers int32 [batch, KEYS])``: KEYS pairs, filler, KEYS questions, answers below VALUES."""
    def one(key):
        first, last, values, filler = jax.random.split(key, 4)
        stored, asked = jax.random.permutation(first, KEYS), jax.random.permutation(last, KEYS)
        values = jax.random.randint(values, (KEYS,), 0, VALUES)
        noise = FILLER + jax.random.randint(filler, (length - 2 * KEYS,), 0, FILLERS)
        return jnp.concatenate([stored * VALUES + values[stored], noise, ASK + asked]).astype(jnp.int32), values[asked].astype(jnp.int32)

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))


def answer(logits: Callable, params, tokens):
    """Logits [batch, KEYS, outputs] at the questions."""
    return logits(params, tokens)[:, -KEYS:]
