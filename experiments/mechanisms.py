"""Mechanisms by name, for the commands that train models."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import catalogue
from attnx.cli import UsageError
from attnx.sparse import topk_blocks


def _linear(length, heads):
    """Heads forget at rates from a few tokens to twice the training length."""
    return attnx.recurrent(log_decay=jnp.log1p(-jnp.geomspace(1 / 4, 1 / (2 * length + 4), heads)))


def _selected(length, heads):
    """Four blocks of a sixteenth of the training length, chosen by the query block."""
    size = max(length // 16, 1)
    return topk_blocks(size, 4, query_block_size=size)


MECHANISMS: dict[str, Callable[[int, int], attnx.Mechanism]] = {
    "softmax": lambda length, heads: attnx.pairs(mask=attnx.masks.causal()),
    "window": lambda length, heads: attnx.pairs(mask=attnx.masks.sliding_window(max(length // 4, 1))),
    "softpick": lambda length, heads: attnx.pairs(mask=attnx.masks.causal(), weights=attnx.weights.softpick()),
    "linear": _linear,
    "selected": _selected,
}
"""``{name: (length, heads) -> mechanism}``: how many tokens the model reads in training, and its key-value heads."""


ALL_CAUSAL = "all-causal"
Layer = Callable[..., nnx.Module]
"""Makes the attention of a block, ``(features, num_heads, *, rngs) -> module``."""


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Names with 'all-causal' replaced by the mechanisms above and every finished paper that has a causal layer."""
    papers = [id for id, entry in catalogue.entries().items() if entry.causal_layer and id not in MECHANISMS] if ALL_CAUSAL in names else []
    return tuple(each for name in names for each in ((*MECHANISMS, *papers) if name == ALL_CAUSAL else (name,)))


def mechanism(name: str, length: int, heads: int) -> attnx.Mechanism | Layer:
    """The mechanism of a name; the layer of a paper, by its id; or what ``module:function`` makes of the training length and the number of key-value heads.

    Raises:
      UsageError: for a name that is not known, or a function that cannot be imported.

    Example:
      >>> mechanism('window', length=128, heads=4).mask
      Local(left=31, right=0)
    """
    module, colon, function = name.partition(":")
    if not colon:
        return MECHANISMS[name](length, heads) if name in MECHANISMS else partial(_layer(name), length=length)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"mechanism '{name}': {error}") from error
    return make(length, heads)


def _layer(id):
    try:
        entry = catalogue.entry(id)
    except KeyError:
        raise UsageError(f"unknown mechanism '{id}'; expected one of: {', '.join(MECHANISMS)}; {ALL_CAUSAL}; the id of a paper (attnx list), "
                         "or module:function") from None
    if entry is None or entry.causal_layer is None:
        raise UsageError(f"mechanism '{id}': the paper is {'not here yet' if entry is None else 'no causal attention'}")
    return entry.causal_layer
