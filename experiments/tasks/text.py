"""Language modelling of bytes: the source of the running Python's standard library, whole files held out."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnx import training

VOCABULARY = 256
_HELD = 96  # windows of held-out text
_TOGETHER = 8192  # tokens evaluated at once


@functools.cache
def _text():
    train, held = training.read().split()
    return train.tokens, held


def sampler(length: int, batch: int) -> Callable:
    """``sample(key) -> int32 [batch, length + 1]``: windows of the training text, anywhere."""
    tokens = jnp.asarray(_text()[0])

    def sample(key):
        starts = jax.random.randint(key, (batch,), 0, tokens.size - length - 1)
        return tokens[starts[:, None] + jnp.arange(length + 1)].astype(jnp.int32)

    return sample


def loss(logits: Callable) -> Callable:
    """``loss(params, tokens, key)`` in nats a byte of a model ``logits(params, tokens [B, T]) -> [B, T, 256]``."""
    def cost(params, tokens, key):
        del key
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, tokens[:, :-1]), tokens[:, 1:]).mean()

    return cost


def bits(logits: Callable, params, length: int, *, count: int = _HELD) -> np.ndarray:
    """Bits of each byte of held-out windows, given those before it in the window: [count, length]. The windows end at the same bytes
    whatever their length, so the last columns of two lengths predict the same text."""
    _, held = _text()
    rng = np.random.default_rng(0)
    longest = 4096
    files = [index for index in range(len(held.names)) if held.starts[index + 1] - held.starts[index] > longest]
    ends = [held.starts[index] + int(rng.integers(longest, held.starts[index + 1] - held.starts[index])) for index in rng.choice(files, count)]
    windows = np.stack([held.tokens[end - length - 1:end] for end in ends]).astype(np.int32)

    @jax.jit
    def cost(params, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, tokens[:, :-1]), tokens[:, 1:])

    size = max(1, min(count, _TOGETHER // length))
    rows = np.pad(windows, ((0, -count % size), (0, 0)))
    return np.concatenate([np.asarray(cost(params, part)) for part in np.split(rows, len(rows) // size)])[:count] / math.log(2)
