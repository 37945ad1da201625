"""What the window kernels are handed, on any platform."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Blocks, Spec
from pallas_kernels.static import Parts
from pallas_kernels.tiles import Windows


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call.

    Attributes:
      parts: what is done to a window's scores.
      specs: how each operand varies; over offsets none does.
      sizes: the default sizes of the platform.
      platform: "tpu" or "gpu".
      interpret: as for ``pallas_call``.
    """

    parts: Parts
    specs: Blocks
    sizes: Windows
    platform: str
    interpret: Any = False

    def flat_specs(self) -> list[Spec]:
        """The specs of all operands, in tree order."""
        return jax.tree.leaves(self.specs, is_leaf=lambda x: isinstance(x, Spec))


def inexact(x) -> bool:
    """Whether an operand has a gradient."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def once(rule):
    """``rule(plan, ..)`` of a derivative, which says so where it is to be differentiated again."""
    def refuse(*_):
        raise NotImplementedError("implementation='pallas': the window kernels have first derivatives only; use 'reference'")

    rule = jax.custom_vjp(rule, nondiff_argnums=(0,))
    rule.defvjp(refuse, refuse)
    return rule
