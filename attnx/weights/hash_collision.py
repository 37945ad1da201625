"""Weights of colliding hashes: the chance that random hyperplanes do not separate a query from a key.

Zeng, Xiong, Ravi, Acharya, Fung, Singh: "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling" (ICML 2021, arXiv 2111.09714):

    w_ij = (1 - arccos(s_ij) / pi)^bits,              s the dot product of unit vectors

every pair by itself, no normaliser. The slope in s is infinite at s = 1; the paper's stand-in, a lower bound of it, is (bits / 2) w.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core import checks
from pallas_kernels.parts import Weights, part, static

SHRINK = 0.98


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _bounded(s, bits):
    return _probability(s, bits)


@_bounded.defjvp
def _bounded_jvp(bits, primals, tangents):
    w = _probability(primals[0], bits)
    return w, (bits / 2) * w * tangents[0]


def _probability(s, bits):
    s = jnp.clip(s, -1, 1)
    return (1 - jnp.arctan2(jnp.sqrt((1 - s) * (1 + s)), s) / np.pi) ** bits  # kernels have no arccos


@part
class Collision(Weights):
    """See :func:`collision`."""

    bits: int = static(default=9)
    exact: bool = static(default=False)
    shrink: float = static(default=1.0)

    def weight(self, s, statistics):
        return (_probability if self.exact else _bounded)(s * self.shrink, self.bits)


def collision(bits: int = 9, *, gradient: str = "lower_bound", shrink: float | None = None) -> Weights:
    """The chance that ``bits`` random hyperplanes leave two unit vectors on the same sides.

    Args:
      bits: tau, of a hash code.
      gradient: "lower_bound", ``(bits / 2) w`` for the slope in the scores; or "exact", that of the weight itself.
      shrink: factor of the scores before the arc cosine; 1 or, with "exact", 0.98, which keeps the slope finite.

    Raises:
      ValueError: an unknown gradient, or "exact" without shrinking.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), jnp.eye(2).reshape(1, 2, 1, 2)
    >>> attnx.attention_weights(q, k, weights=attnx.weights.collision(3), scale=1.0).round(3)
    Array([[[[1.   , 0.125]]]], dtype=float32)
    """
    checks.check_integer("bits", bits, least=1)
    if gradient not in ("lower_bound", "exact"):
        raise ValueError(f"gradient: expected 'lower_bound' or 'exact', got {gradient!r}")
    exact = gradient == "exact"
    shrink = float((SHRINK if exact else 1.0) if shrink is None else shrink)
    if not 0 < shrink <= (1 - 1e-6 if exact else 1.0):
        raise ValueError(f"shrink: expected a factor in (0, 1{')' if exact else ']'} with gradient={gradient!r}, got {shrink}")
    return Collision(bits, exact, shrink)
