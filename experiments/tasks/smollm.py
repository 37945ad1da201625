"""What the attention of a real model, SmolLM2-135M, is like on English text. Needs ``attnx fetch smollm2-135m``."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from attnx import nn, pretrained
from experiments.tasks import passages


@functools.cache
def _model():
    return pretrained.load("smollm2-135m")


def look(measure: Callable[[jax.Array], Any], seed: int, length: int, stage: str = "weights") -> Any:
    """``measure`` of the scores or weights [layers, 1, 9, T, T] of all its 30 layers, on T = ``length`` tokens of docstrings drawn by ``seed``."""
    model = _model()
    tokens, positions = model.encode("\n\n".join(passages.texts(seed, length // 16)))
    graph, state = nnx.split(model.model)

    @jax.jit
    def run(state, tokens, positions):
        return measure(nn.record(nnx.merge(graph, state), tokens, positions, stage=stage)[1])

    return run(state, tokens[:, :length], positions[..., :length])
