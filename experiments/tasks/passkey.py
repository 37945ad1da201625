"""Passkey retrieval: five digits stand somewhere in noise behind a mark, and are asked for at the end.

    noise ... KEY d d d d d noise ... ASK -> d d d d d
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

NOISE, DIGITS, LENGTH = 16, 10, 5
KEY, ASK = NOISE + DIGITS, NOISE + DIGITS + 1
VOCABULARY = ASK + 1


def sampler(length: int, batch: int) -> Callable:
    """``sample(key) -> int32 [batch, length + LENGTH]``: the key is anywhere, ASK at index ``length - 1``, and the answer in the last LENGTH."""
    def one(key):
        noise, digits, place = jax.random.split(key, 3)
        digits = NOISE + jax.random.randint(digits, (LENGTH,), 0, DIGITS, jnp.int32)
        tokens = jax.random.randint(noise, (length - 1,), 0, NOISE, jnp.int32)
        start = jax.random.randint(place, (), 0, length - LENGTH - 1)
        tokens = jax.lax.dynamic_update_slice(tokens, jnp.concatenate([jnp.full(1, KEY, jnp.int32), digits]), (start,))
        return jnp.concatenate([tokens, jnp.full(1, ASK, jnp.int32), digits])

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))


def answer(logits: Callable, params, tokens):
    """Logits [batch, LENGTH, V] of the digits, each given those before."""
    return logits(params, tokens[:, :-1])[:, -LENGTH:]


def found(logits, tokens) -> jax.Array:
    """The share of keys all of whose digits are right."""
    return jnp.mean(jnp.all(jnp.argmax(logits, -1) == tokens[:, -LENGTH:], axis=-1))
