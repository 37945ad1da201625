"""What attention is given in real models that read real text, and how well SmolLM2-135M predicts a text with another attention in all its layers.

Needs ``attnx fetch smollm2-135m`` (30 layers, 9 query heads to 3 of keys and values, causal) and ``attnx fetch minilm-l6`` (6 layers of 12 heads).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnx import nn, pretrained, training
from experiments.tasks import passages

TEXTS = ("docstrings", "code")
_load = functools.cache(pretrained.load)
_sources = functools.cache(training.read)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A function of queries, keys and values as a mechanism of whole texts."""

    attend: Callable

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        del query_positions, key_positions, segment_ids, dropout_key  # one text from its start, without padding
        return self.attend(query, key, value)


def tokens(name: str, kind: str, seed: int, length: int) -> jax.Array:
    """The first ``length`` tokens, int32 [1, length], of docstrings drawn by ``seed``, or of a file of Python source so drawn."""
    if kind == "docstrings":
        words = "\n\n".join(passages.texts(seed, length // 16))
    else:
        sources = _sources()
        file = np.random.default_rng(seed).choice(np.flatnonzero(np.diff(sources.starts) > 8 * length))
        words = sources.tokens[sources.starts[file] + 1:sources.starts[file] + 8 * length].astype(np.uint8).tobytes().decode(errors="ignore")
    ids = _load(name).tokenizer.encode(words).ids[:length]
    if len(ids) < length:
        raise ValueError(f"length: expected at most {len(ids)} for this text, got {length}")
    return jnp.asarray(ids, jnp.int32)[None]


def qkv(name: str, seed: int, length: int, kind: str = TEXTS[0]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [layers, 1, T, N, H], keys and values [layers, 1, T, K, H] of all layers of a model on T = ``length`` tokens, with rotary positions where it has them."""
    graph, state = nnx.split(_load(name).model)
    read = jax.jit(lambda state, ids: nn.record(nnx.merge(graph, state), ids, jnp.arange(length), stage="qkv")[1])
    return read(state, tokens(name, kind, seed, length))


def nats(attend: Callable[..., Any] | None, seed: int, length: int, kind: str = TEXTS[0]) -> float:
    """Mean nats a token of a text by SmolLM2-135M with ``attend(query, key, value) -> out`` in all 30 layers, or with its own attention for None.

    ``attend`` is causal by itself, without arrays of its own, and is traced once for all layers.
    """
    model = nnx.merge(*nnx.split(_load("smollm2-135m").model))
    if attend is not None:
        nn.set_mechanism(model, Plain(attend))
    graph, state = nnx.split(model)

    @jax.jit
    def cost(state, ids):
        logits = nnx.merge(graph, state)(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    return float(cost(state, tokens("smollm2-135m", kind, seed, length + 1)))
