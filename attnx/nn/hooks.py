"""Hooks: reading and changing a model's attention from outside, by pure functions handed to its call.

A hook is ``hook(value, layer, at) -> value`` for one of four stages of an attention layer:

    'qkv'       (query [B, T, N, H], key [B, S, K, H], value [B, S, K, Hv]), projected, normalised and positioned
    'scores'    the scores of query-key pairs, before the mask and the weights
    'weights'   the weights of query-key pairs (evaluated by the materialised definition, whatever was asked for)
    'output'    what each head found, [B, T, N, Hv], before the gate and the output projection

``layer`` is the layer's index, traced where layers are scanned: use it in arithmetic (``jnp.where(layer == 3, ...)``, a table
``[layer]``), not in ``if``. ``at`` is an ``At(batch, head, query, key)`` of integer arrays that broadcast against the value: the batch
row, the query's head (key and value have fewer heads where queries share them) and the logical positions. Hooks are handed over as
``{stage: hook}``; in a block with cross-attention, ``'cross_' + stage`` is a stage of that.

Example:
  >>> import attnx, jax, jax.numpy as jnp
  >>> from flax import nnx
  >>> from attnx.models import Decoder, TransformerConfig
  >>> model = Decoder(TransformerConfig(features=32, num_layers=2), attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0))
  >>> def silence(value, layer, at):  # head 3 of layer 1
  ...     return jnp.where((layer == 1) & (at.head == 3), 0, value)
  >>> model(jnp.zeros((1, 5), int), hooks={'output': silence}).shape
  (1, 5, 256)
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from attnx.mechanism import Mechanism
from pallas_kernels.parts import At

Hooks = Mapping[str, Callable[[Any, Any, At], Any]]
STAGES = ("qkv", "scores", "weights", "output")


def bind_hooks(hooks: Hooks | None, layer) -> dict[str, Callable]:
    """The hooks with their layer filled in: ``{stage: (value, at) -> value}``.

    Args:
      hooks: a mapping from stage to hook, or None for none.
      layer: index of the layer, an integer or a traced scalar.

    Raises:
      ValueError: for a stage that does not exist.
      TypeError: for a hook that cannot be called.
    """
    bound: dict[str, Callable] = {}
    for stage, hook in (hooks or {}).items():
        if stage not in STAGES:
            raise ValueError(f"hooks: expected stages among {STAGES}, got {stage!r}")
        if not callable(hook):
            raise TypeError(f"hooks[{stage!r}]: expected a function (value, layer, at) -> value, got {type(hook).__name__}")
        bound[stage] = functools.partial(_call, hook, layer)
    return bound


def _call(hook, layer, value, at):
    return hook(value, layer, at)


def split_hooks(hooks: Hooks | None) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """The hooks of a block's attention, and those of its cross-attention without their prefix."""
    own = {stage: hook for stage, hook in (hooks or {}).items() if not stage.startswith("cross_")}
    cross = {stage.removeprefix("cross_"): hook for stage, hook in (hooks or {}).items() if stage.startswith("cross_")}
    return own, cross


def at_heads(heads: int, query, key, query_positions, key_positions) -> At:
    """The ``At`` of per-head arrays [B, T, heads, H]: batch [B, 1, 1, 1], head [heads, 1], query [(B,) T, 1, 1], key [(B,) S, 1, 1]."""
    def column(positions, x):
        return (jnp.arange(x.shape[1]) if positions is None else positions)[..., None, None].astype(jnp.int32)

    return At(jnp.arange(query.shape[0])[:, None, None, None], jnp.arange(heads)[:, None],
              column(query_positions, query), column(key_positions, key))


def pair_hooks(mechanism: Mechanism, hooks: dict[str, Callable]) -> dict[str, dict[str, Callable]]:
    """Keyword arguments that hand a mechanism its hooks on scores and weights: ``{'hooks': {stage: (value, at) -> value}}`` or none.

    Raises:
      NotImplementedError: for a mechanism that has no pairs to show.
    """
    chosen = {stage: hook for stage, hook in hooks.items() if stage in ("scores", "weights")}
    if not chosen:
        return {}
    if "hooks" not in inspect.signature(mechanism).parameters:
        raise NotImplementedError(f"hooks: {type(mechanism).__name__} does not evaluate query-key pairs and has no stage "
                                  f"{next(iter(chosen))!r}; 'qkv' and 'output' work, and so does the pairs engine")
    return {"hooks": chosen}
