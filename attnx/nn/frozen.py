"""Holding things that contain arrays inside a module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Constant(nnx.Variable):
    """An array that a module holds but does not train."""


class Frozen(nnx.Module):
    """A pytree whose arrays are kept as :class:`Constant` variables, so that a module can own it; calling it gives the pytree back.

    Example:
      >>> import jax.numpy as jnp
      >>> Frozen({'slopes': jnp.ones(2)})()
      {'slopes': Array([1., 1.], dtype=float32)}
    """

    def __init__(self, tree: Any):
        leaves, self.structure = jax.tree.flatten(tree)
        self.leaves = nnx.List([Constant(jnp.asarray(leaf)) for leaf in leaves])

    def __call__(self) -> Any:
        """The pytree."""
        return jax.tree.unflatten(self.structure, [leaf[...] for leaf in self.leaves])


def hold(part: Any) -> Any:
    """``part`` in a form that can be a module's attribute: itself, unless it is a pytree with arrays inside."""
    if not isinstance(part, nnx.Module) and any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(part)):
        return Frozen(part)
    return part


def release(held: Any) -> Any:
    """What was given to :func:`hold`."""
    return held() if isinstance(held, Frozen) else held
