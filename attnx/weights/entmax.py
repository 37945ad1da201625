"""Entmax weights: sparse probabilities between softmax (alpha = 1) and sparsemax (alpha = 2).

Peters, Niculae, Martins: "Sparse Sequence-to-Sequence Models" (2019, arXiv 1905.05702):

    w_ij = relu((alpha - 1) s_ij - r_i)^(1 / (alpha - 1)),      r_i such that sum_j w_ij = 1

A weight given a row statistic by root: each Newton step is one pass over the keys, a handful in all.
"""

import functools

import jax.numpy as jnp

from attnx.core.checks import describe
from pallas_kernels.parts import Root, Weights, part, static


def _power(alpha, s, r):
    base = (alpha - 1) * s - r
    positive = base > 0
    return jnp.where(positive, jnp.where(positive, base, 1) ** (1 / (alpha - 1)), 0)


def _phi(alpha, s, r, earlier):
    return _power(alpha, s, r)


def _bracket(alpha, top, count):
    top = (alpha - 1) * top
    return top - 1, top - count ** (1 - alpha)


@functools.cache
def _root(alpha):
    return Root(functools.partial(_phi, alpha), 1.0, functools.partial(_bracket, alpha))


@part
class Entmax(Weights):
    """See :func:`entmax`."""

    alpha: float = static()

    @property
    def statistics(self):
        return (_root(self.alpha),)

    def weight(self, s, statistics):
        return _power(self.alpha, s, statistics[0])


def entmax(alpha: float) -> Weights:
    """Alpha-entmax for 1 < alpha <= 2; :func:`entmax15` and :func:`sparsemax` are the usual members.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.array([1.0, 0.5, -1.0]).reshape(1, 3, 1, 1)
    >>> w = attnx.attention_weights(q, k, weights=attnx.weights.sparsemax())
    >>> [f"{x:.2f}" for x in w[0, 0, 0]]
    ['0.75', '0.25', '0.00']
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: expected a static number, got {describe(alpha)}")
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha: expected 1 < alpha <= 2, got {alpha}")
    return Entmax(float(alpha))


def entmax15() -> Weights:
    """1.5-entmax."""
    return entmax(1.5)


def sparsemax() -> Weights:
    """2-entmax: Martins, Astudillo: "From Softmax to Sparsemax" (2016, arXiv 1602.02068), the projection of the scores onto the simplex."""
    return entmax(2.0)
