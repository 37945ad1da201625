"""Blocks of letters, and two letters: which block has both? To match one of them is not enough, for other blocks have that too.

    lgbe.pock. ... .akbd#kb -> akbd
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

LETTERS, BLOCK, ASKED = 16, 4, 2
SEPARATOR, ASK = LETTERS, LETTERS + 1
VOCABULARY = ASK + 1


def sampler(blocks: int, batch: int) -> Callable:
    """``sample(key) -> int32 [batch, 5 blocks + 6]``: blocks with a separator after each (ASK after the last), two letters, and the one block that has both."""
    def one(key):
        letters, which, asked = jax.random.split(key, 3)
        block = jax.vmap(lambda key: jax.random.permutation(key, LETTERS)[:BLOCK])(jax.random.split(letters, blocks))
        target = jax.random.randint(which, (), 0, blocks)
        query = jax.random.permutation(asked, block[target])[:ASKED]
        both = (block[:, None] == query[:, None]).any(-1).all(-1) & (jnp.arange(blocks) != target)
        # A block that has both by chance is given, for the second letter, the first that neither it nor the question has.
        present = (block[:, :, None] == jnp.arange(LETTERS)).any(1) | (query[:, None] == jnp.arange(LETTERS)).any(0)
        other = jnp.argmin(present, axis=1)
        block = jnp.where(both[:, None] & (block == query[1]), other[:, None], block)
        ends = jnp.full((blocks, 1), SEPARATOR).at[-1].set(ASK)
        return jnp.concatenate([jnp.concatenate([block, ends], axis=1).reshape(-1), query, block[target]]).astype(jnp.int32)

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))


def answer(logits: Callable, params, tokens):
    """Logits [batch, BLOCK, V] of the block's letters, each given those before."""
    return logits(params, tokens[:, :-1])[:, -BLOCK:]


def error(logits, tokens) -> jax.Array:
    """The share of blocks with a wrong letter."""
    return jnp.mean(jnp.any(jnp.argmax(logits, -1) != tokens[:, -BLOCK:], axis=-1))
