"""Modules as pure functions, for examples whose mechanisms own parameters."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from attnx.nn import Attention
from attnx.positions import Rotary


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


def rotary_layer(mechanism: Callable[[int, int], Any], layer: Callable[..., nnx.Module] = Attention, **options: Any) -> Callable[..., nnx.Module]:
    """A ``causal_layer`` of an entry: attention with rotary positions and normalised queries and keys.

    Args:
      mechanism: ``mechanism(length, num_heads)``.
      layer: called like :class:`attnx.nn.Attention`.
      **options: of the layer.

    >>> import attnx
    >>> window = rotary_layer(lambda length, num_heads: attnx.pairs(mask=attnx.masks.sliding_window(length // 4)))
    >>> window(16, 2, length=128, rngs=nnx.Rngs(0)).mechanism.mask
    Local(left=31, right=0)
    """
    def make(features, num_heads, *, length, rngs):
        return layer(features, num_heads, mechanism=mechanism(length, num_heads), position=Rotary(), qk_norm="rms", rngs=rngs, **options)

    return make
