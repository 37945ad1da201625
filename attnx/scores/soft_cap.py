"""Soft capping of scores.

Bello et al.: "Neural Combinatorial Optimization with Reinforcement Learning" (2016, arXiv 1611.09940), as used in Gemma 2 (arXiv 2408.00118):

    cap * tanh(s_ij / cap)
"""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import check_real
from pallas_kernels.parts import Operand, Score, part


@part
class SoftCap(Score):
    """See :func:`soft_cap`."""

    cap: Any

    def operands(self, sizes):
        return (Operand(self.cap, ()),)

    def tile(self, s, at, cap):
        cap = cap.astype(s.dtype)
        return cap * jnp.tanh(s / cap)


def soft_cap(cap) -> Score:
    """Bounds the scores smoothly to (-cap, cap).

    Args:
      cap: a positive number, traced or not.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.full((1, 2, 1, 8), 100.0)
    >>> out = attnx.attention(q, k, v, scores=attnx.scores.soft_cap(30.0))
    """
    if isinstance(cap, (int, float)) and not isinstance(cap, bool) and cap <= 0:
        raise ValueError(f"cap: expected a positive number, got {cap}")
    return SoftCap(check_real("cap", cap, ranks=(0,)))
