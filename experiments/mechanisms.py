"""Mechanisms by name, for the commands that train models."""

import importlib
import os
import sys
from collections.abc import Callable

import attnx
from attnx.cli import UsageError

MECHANISMS: dict[str, Callable[[int], attnx.Mechanism]] = {
    "softmax": lambda length: attnx.pairs(mask=attnx.masks.causal()),
    "window": lambda length: attnx.pairs(mask=attnx.masks.sliding_window(max(length // 4, 1))),
    "softpick": lambda length: attnx.pairs(mask=attnx.masks.causal(), weights=attnx.weights.softpick()),
}
"""``{name: length -> mechanism}``, where ``length`` is how many tokens the model reads in training."""


def mechanism(name: str, length: int) -> attnx.Mechanism:
    """The mechanism of a name, or that which ``module:function`` makes of the training length.

    Raises:
      UsageError: for a name that is not known, or a function that cannot be imported.

    Example:
      >>> mechanism('window', length=128).mask
      Local(left=31, right=0)
    """
    module, colon, function = name.partition(":")
    if not colon:
        if name not in MECHANISMS:
            raise UsageError(f"unknown mechanism '{name}'; expected one of: {', '.join(MECHANISMS)}, or module:function")
        return MECHANISMS[name](length)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"mechanism '{name}': {error}") from error
    return make(length)
