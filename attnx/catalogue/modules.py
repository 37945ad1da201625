"""Modules as pure functions, for examples whose mechanisms own parameters."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx


def parameters(make: Callable[[nnx.Rngs], nnx.Module]) -> Callable:
    """An input of an example: the state of a module ``make(rngs)``, made of a PRNG key.

    >>> make = lambda rngs: nnx.Linear(2, 3, rngs=rngs)
    >>> params = parameters(make)(0)
    >>> rebuild(make, params).out_features
    3
    """
    return lambda key: nnx.state(make(nnx.Rngs(key)))


def rebuild(make: Callable[[nnx.Rngs], nnx.Module], params: Any) -> nnx.Module:
    """The module of that kind with these parameters."""
    return nnx.merge(_structure(make), params)


@functools.cache
def _structure(make):
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
