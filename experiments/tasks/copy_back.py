"""Copying: the answer at each place is the token a fixed distance before it; sequences of random tokens start at random positions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

VOCABULARY = 32
DISTANCE = 5


def sampler(length: int, batch: int, starts: tuple[int, int]) -> Callable:
    """``sample(key) -> (tokens, positions)``, int32 [batch, length] each; positions count from a start in ``starts[0] .. starts[1] - 1``."""
    def sample(key):
        what, where = jax.random.split(key)
        tokens = jax.random.randint(what, (batch, length), 0, VOCABULARY, jnp.int32)
        return tokens, jax.random.randint(where, (batch, 1), *starts, jnp.int32) + jnp.arange(length, dtype=jnp.int32)

    return sample


def answers(tokens: jax.Array) -> jax.Array:
    """What belongs at the places from :data:`DISTANCE` on: int32 [batch, length - DISTANCE]."""
    return tokens[:, :-DISTANCE]
