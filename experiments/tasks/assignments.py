"""Variables are assigned again and again, and asked for: the answer is the last value, and all values before it may be forgotten.

    SET x 3   SET y 7   ASK x .   SET x 5   ...                the answer, 3, is to be given at the x that is asked for
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

VARIABLES, VALUES = 4, 8
SET, ASK, BLANK = VARIABLES + VALUES, VARIABLES + VALUES + 1, VARIABLES + VALUES + 2
VOCABULARY = BLANK + 1


class Batch(NamedTuple):
    """Sequences of events, three tokens each.

    Attributes:
      tokens: int32 [B, 3 E].
      answers: int32 [B, E], what is to be predicted at the second token of each event; -1 where nothing is asked.
      stale: booleans [B, E], assignments whose variable is assigned again later.
      live: booleans [B, E], the last assignments.
    """

    tokens: jax.Array
    answers: jax.Array
    stale: jax.Array
    live: jax.Array


def sampler(events: int, batch: int, rate: float = 0.3) -> Callable:
    """``sample(key) -> Batch``; an event asks with probability ``rate``, but the first VARIABLES events, which assign each variable once."""
    def one(key):
        variables, values, asks, order = jax.random.split(key, 4)
        index = jnp.arange(events)
        variable = jax.random.randint(variables, (events,), 0, VARIABLES)
        variable = variable.at[:VARIABLES].set(jax.random.permutation(order, VARIABLES))
        value = VARIABLES + jax.random.randint(values, (events,), 0, VALUES)
        asked = (jax.random.uniform(asks, (events,)) < rate) & (index >= VARIABLES)
        about = (variable[:, None] == variable) & ~asked  # [event, assignment] of its variable
        last = jnp.max(jnp.where(about & (index < index[:, None]), index, 0), axis=1)
        again = (about & (index > index[:, None])).any(1)
        third = jnp.where(asked, BLANK, value)
        tokens = jnp.stack([jnp.where(asked, ASK, SET), variable, third], axis=1).reshape(-1)
        return Batch(tokens.astype(jnp.int32), jnp.where(asked, value[last], -1).astype(jnp.int32), ~asked & again, ~asked & ~again)

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))


def answers(logits, batch: Batch):
    """Log-probabilities [B, E, V] where something may be asked, and which of them count."""
    return jax.nn.log_softmax(logits[:, 1::3]), batch.answers >= 0


def loss(logits, batch: Batch):
    """Cross entropy of the answers, in nats."""
    found, counts = answers(logits, batch)
    right = jnp.take_along_axis(found, jnp.maximum(batch.answers, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counts, right, 0)) / jnp.maximum(jnp.sum(counts), 1)


def accuracy(logits, batch: Batch):
    """The share of answers that are right."""
    found, counts = answers(logits, batch)
    return jnp.sum(counts & (jnp.argmax(found, -1) == batch.answers)) / jnp.maximum(jnp.sum(counts), 1)
