"""Modules with random parameters, made without running their initialisers."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx


def randomly(make: Callable[[], nnx.Module], scale: float = 0.5, seed: int = 0) -> nnx.Module:
    """The module ``make()`` with parameters that are normal numbers of that standard deviation: none is at a value that hides what it does."""
    graph, params = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), params))
