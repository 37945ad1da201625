"""Sigmoid weights: every pair by itself, no normaliser.

Ramapuram et al.: "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (2024, arXiv 2409.04431):

    w_ij = sigmoid(s_ij + b)          with b = -log(length) as the paper's start
"""

from typing import Any

import jax
import jax.numpy as jnp

from attnx.core.checks import check_real
from pallas_kernels.parts import Operand, Weights, part


@part
class Sigmoid(Weights):
    """See :func:`sigmoid`."""

    bias: Any = None
    vanishes = True

    def operands(self, sizes):
        return () if self.bias is None else (Operand(self.bias, ("head",) * jnp.ndim(self.bias)),)

    def weight(self, s, statistics, *bias):
        return jax.nn.sigmoid(s + bias[0].astype(s.dtype) if bias else s)


def sigmoid(bias=None) -> Weights:
    """Elementwise sigmoid.

    Args:
      bias: added to the scores, a number or real [N], fixed or learned.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = jnp.zeros((1, 2, 1, 8))
    >>> attnx.attention_weights(q, k, weights=attnx.weights.sigmoid())[0, 0, 0]
    Array([0.5, 0.5], dtype=float32)
    """
    return Sigmoid(None if bias is None else check_real("bias", bias, ranks=(0, 1)))
