"""Associative recall: pairs of a key and a value, then the same keys in another order, after each of which its value is to be said.

    k1 v1 k2 v2 ... kn vn  k7 v7 k2 v2 ...         keys all differ, values are any; said: the values of the second half
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

KEYS, VALUES = 64, 32
VOCABULARY = KEYS + VALUES


def sampler(pairs: int, batch: int) -> Callable:
    """``sample(key) -> int32 [batch, 4 pairs]``.

    >>> tokens = sampler(4, 1)(jax.random.key(0))[0].tolist()
    >>> dict(zip(tokens[:8:2], tokens[1:8:2])) == dict(zip(tokens[8::2], tokens[9::2]))
    True
    """
    def one(key):
        keys, values, order = jax.random.split(key, 3)
        keys = jax.random.choice(keys, KEYS, (pairs,), replace=False).astype(jnp.int32)
        shown = jnp.stack([keys, KEYS + jax.random.randint(values, (pairs,), 0, VALUES, jnp.int32)], axis=1)
        return jnp.concatenate([shown, jax.random.permutation(order, shown)]).reshape(-1)

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))


def answers(outputs: jax.Array) -> jax.Array:
    """Of outputs [batch, 4 pairs - 1, ...], one for each token but the last, those that say a value: [batch, pairs, ...]; of ``tokens[:, 1:]``, the values."""
    return outputs[:, outputs.shape[1] // 2 + 1::2]
