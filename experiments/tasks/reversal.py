"""Reversing and mapping: the target is the source backwards, each token replaced by what a fixed permutation makes of it; then END."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOKENS = 20
PADDING, START, END = 0, 1, 2
VOCABULARY = 3 + TOKENS
_MAP = np.concatenate([np.arange(3), 3 + np.random.default_rng(0).permutation(TOKENS)])


class Batch(NamedTuple):
    """Integers [B, S] with positions (-1 for padding), and [B, S + 1]: ``given`` is the target after START; which targets count."""

    source: jax.Array
    positions: jax.Array
    given: jax.Array
    target: jax.Array
    counted: jax.Array


def sampler(shortest: int, longest: int, batch: int) -> Callable:
    """``sample(key) -> Batch`` of sources of ``shortest`` to ``longest`` tokens."""
    def one(key):
        size, tokens = jax.random.split(key)
        length = jax.random.randint(size, (), shortest, longest + 1)
        place = jnp.arange(longest)
        source = jnp.where(place < length, 3 + jax.random.randint(tokens, (longest,), 0, TOKENS), PADDING)
        place = jnp.arange(longest + 1)
        back = jnp.asarray(_MAP)[source[jnp.clip(length - 1 - place, 0)]]
        target = jnp.where(place < length, back, jnp.where(place == length, END, PADDING))
        given = jnp.concatenate([jnp.full(1, START), target[:-1]])
        return Batch(source, jnp.where(place[:-1] < length, place[:-1], -1), given, target, place <= length)

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))


def exact(logits: jax.Array, batch: Batch) -> jax.Array:
    """The share of targets whose tokens are all the likeliest given those before, END included: those that greedy decoding gets right."""
    return jnp.mean(jnp.all((jnp.argmax(logits, -1) == batch.target) | ~batch.counted, axis=-1))
