"""Signed retrieval: of pairs of a key and a value, a question names two keys, and asks for the value of the first less that of the second.

    features of a pair: (its key, two blanks, its value);      of the question, which comes last: (a blank, two keys, a blank)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

PAIRS, SIZE = 16, 4
FEATURES = 3 * PAIRS + SIZE


def sampler(batch: int) -> Callable:
    """``sample(key) -> (x [batch, PAIRS + 1, FEATURES], answers [batch, SIZE])``: keys in a random order, values normal."""
    def one(key):
        order, values, asked = jax.random.split(key, 3)
        keys = jax.random.permutation(order, PAIRS)
        values = jax.random.normal(values, (PAIRS, SIZE))
        first, second = jax.random.choice(asked, PAIRS, (2,), replace=False)
        pairs = jnp.concatenate([jax.nn.one_hot(keys, PAIRS), jnp.zeros((PAIRS, 2 * PAIRS)), values], axis=1)
        question = jnp.concatenate([jnp.zeros(PAIRS), jax.nn.one_hot(keys[first], PAIRS), jax.nn.one_hot(keys[second], PAIRS), jnp.zeros(SIZE)])
        return jnp.concatenate([pairs, question[None]]), values[first] - values[second]

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))
