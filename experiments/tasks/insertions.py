"""Copying with insertions: the source is words with fillers in between, the target the words alone, so the two run in step but drift apart irregularly.

    source   w3 w7 f1 w7 f0 f2 w1        target   w3 w7 w7 w1
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

WORDS, FILLERS = 16, 4
PADDING, START = 0, 1
VOCABULARY = 2 + WORDS + FILLERS


class Batch(NamedTuple):
    """Integers [B, S] and which of them there are, alike for the target; ``given`` is the target after START, without its last word."""

    source: jax.Array
    seen: jax.Array
    given: jax.Array
    target: jax.Array
    counted: jax.Array


def sampler(length: int, batch: int, rate: float = 0.3) -> Callable:
    """``sample(key) -> Batch`` of sources of half to all of ``length`` tokens, each a filler with probability ``rate``."""
    def one(key):
        size, words, fillers, which = jax.random.split(key, 4)
        seen = jnp.arange(length) < jax.random.randint(size, (), length // 2, length + 1)
        filler = jax.random.uniform(which, (length,)) < rate
        word = 2 + jax.random.randint(words, (length,), 0, WORDS)
        source = jnp.where(filler, 2 + WORDS + jax.random.randint(fillers, (length,), 0, FILLERS), word)
        kept = seen & ~filler
        place = jnp.where(kept, jnp.cumsum(kept) - 1, length)
        target = jnp.zeros(length, jnp.int32).at[place].set(word, mode="drop")
        given = jnp.concatenate([jnp.full(1, START), target[:-1]])
        return Batch(jnp.where(seen, source, PADDING), seen, given, target, jnp.arange(length) < kept.sum())

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))
