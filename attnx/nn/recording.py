"""Keeping what a stage of attention was in every layer of a model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnx.nn.hooks import Hooks


class Tape:
    """A hook that keeps what it sees, behind another hook if there is one. Whoever scans over layers hands ``kept`` out of the scan.

    Attributes:
      kept: what was seen, in order: pytrees of arrays with a leading axis of layers.
    """

    def __init__(self, hook: Callable | None = None):
        self.hook, self.kept = hook, []

    def __call__(self, value, layer, at):
        """The hook itself."""
        value = value if self.hook is None else self.hook(value, layer, at)
        self.kept.append(jax.tree.map(lambda x: x[None], value))
        return value

    def take(self) -> list:
        """What was kept, which is kept no longer."""
        kept, self.kept = self.kept, []
        return kept


def join(kept: list) -> Any:
    """Kept pytrees as one, concatenated along their axis of layers; None for none."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *kept) if kept else None


def record(model: Callable, *args, stage: str = "weights", hooks: Hooks | None = None, **inputs) -> tuple[Any, Any]:
    """Calls a model and returns what one stage of attention was in all its layers: the attention maps, with the default.

    Args:
      model: anything that takes ``hooks``, see :mod:`attnx.nn.hooks`: a model, a stack, a block, an attention layer, or a method ``step``.
      *args: its arguments.
      stage: 'weights' [B, N, T, S], 'scores' [B, N, T, S], 'output' [B, T, N, Hv], 'qkv' (three arrays [B, T, N or K, H]), or
        ``'cross_' + stage`` of the attention to a context.
      hooks: other hooks; one on the same stage is called first, and what it returns is recorded.
      **inputs: further arguments.

    Returns:
      ``(what the model returned, the stage's value with a leading axis of layers)``.

    Raises:
      ValueError: for a stage that does not exist, or that no layer of the model has.

    Cost: what is recorded is held for all layers; 'scores' and 'weights' are O(T S) each. Works under jit, grad and remat.

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.models import Decoder, TransformerConfig
      >>> model = Decoder(TransformerConfig(features=32, num_layers=2), attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0))
      >>> logits, maps = record(model, jnp.zeros((1, 5), int))
      >>> maps.shape, bool(jnp.allclose(maps.sum(-1), 1))
      ((2, 1, 4, 5, 5), True)
    """
    tape = Tape((hooks or {}).get(stage))
    out = model(*args, hooks={**(hooks or {}), stage: tape}, **inputs)
    if not tape.kept:
        raise ValueError(f"stage: no layer of {type(model).__name__} has {stage!r}")
    return out, join(tape.take())
