"""Clipped softmax: probabilities that reach exactly 0 and 1 at finite scores.

Bondarenko, Nagel, Blankevoort: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing" (2023, arXiv 2306.12929):

    w_ij = clip((zeta - gamma) softmax(s)_ij + gamma, 0, 1)

so that a head can do nothing, all weights 0 but those of keys without content, at scores that need not be extreme. Rows do not sum to 1. Not
homogeneous in the normaliser, so it is a weight given a row statistic (the residual of softmax).
"""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import check_integer, check_real
from pallas_kernels.parts import Operand, Softmax, Weights, part


@part
class ClippedSoftmax(Weights):
    """See :func:`clipped_softmax`."""

    gamma: Any
    zeta: Any

    @property
    def statistics(self):
        return (_Residual(),)

    def operands(self, sizes):
        return tuple(Operand(x, ()) for x in (self.gamma, self.zeta))

    def weight(self, s, statistics, gamma, zeta):
        gamma, zeta = gamma.astype(s.dtype), zeta.astype(s.dtype)
        return jnp.clip((zeta - gamma) * jnp.exp(s - statistics[0]) + gamma, 0, 1)


@part
class _Residual(Softmax):
    """Softmax's residual, deaf to the operands of the weight it serves."""

    def shift(self, s, *_):
        return s


def clipped_softmax(gamma=None, zeta=1.0, *, alpha: float | None = None, length: int | None = None) -> Weights:
    """Softmax stretched to (gamma, zeta) and clipped to [0, 1].

    Args:
      gamma: at most 0, by default -0.025; scores whose probability is below ``-gamma / (zeta - gamma)`` get weight 0 and no gradient.
      zeta: at least 1.
      alpha, length: in place of gamma, ``gamma = -alpha / length`` with the length of the sequences that a model is trained on: what was found to suit
        one length suits others (2 to 4 for an encoder, 12 for a decoder).

    Raises:
      ValueError, TypeError: numbers of a wrong sign or kind, gamma beside alpha, or alpha without length.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.array([9.0, -9.0]).reshape(1, 2, 1, 1)
    >>> attnx.attention_weights(q, k, weights=attnx.weights.clipped_softmax(zeta=1.03))
    Array([[[[1., 0.]]]], dtype=float32)
    """
    if alpha is not None or length is not None:
        if gamma is not None or alpha is None or length is None:
            raise ValueError(f"alpha: expected either gamma, or alpha with length, got gamma={gamma}, alpha={alpha}, length={length}")
        gamma = -alpha / check_integer("length", length, least=1)
    gamma = -0.025 if gamma is None else gamma
    if isinstance(gamma, (int, float)) and gamma > 0:
        raise ValueError(f"gamma: expected a number of at most 0, got {gamma}")
    if isinstance(zeta, (int, float)) and zeta < 1:
        raise ValueError(f"zeta: expected a number of at least 1, got {zeta}")
    return ClippedSoftmax(check_real("gamma", gamma, ranks=(0,)), check_real("zeta", zeta, ranks=(0,)))
