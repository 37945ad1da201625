"""Mechanisms by name, for the commands that train models."""

import importlib
import os
import sys
from collections.abc import Callable

import jax.numpy as jnp

import attnx
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


def mechanism(name: str, length: int, heads: int) -> attnx.Mechanism:
    """The mechanism of a name, or that which ``module:function`` makes of the training length and the number of key-value heads.

    Raises:
      UsageError: for a name that is not known, or a function that cannot be imported.

    Example:
      >>> mechanism('window', length=128, heads=4).mask
      Local(left=31, right=0)
    """
    module, colon, function = name.partition(":")
    if not colon:
        if name not in MECHANISMS:
            raise UsageError(f"unknown mechanism '{name}'; expected one of: {', '.join(MECHANISMS)}, or module:function")
        return MECHANISMS[name](length, heads)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"mechanism '{name}': {error}") from error
    return make(length, heads)
