"""What a sum over keys is made of: ``terms(s, rows, *weight operands) -> (weight of the values or None, tuple of summands)``.

Frozen and hashable, so that they key compilation; ``weighs_values`` and ``sums`` say what comes back, ``vanishes`` whether all of it, slopes
included, is 0 at a score of -inf.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Exponential, Root, Sum, Weights


@dataclasses.dataclass(frozen=True)
class FusedTerms:
    """Weight and normaliser of an exponential member at its residual."""

    family: Exponential
    weighs_values: ClassVar[bool] = True
    sums: ClassVar[int] = 1

    @property
    def vanishes(self):
        return self.family.vanishes

    def __call__(self, s, rows, *blocks):
        num, den = self.family.terms(s, rows[0], *blocks)
        return num, (den,)


@dataclasses.dataclass(frozen=True)
class WeightTerms:
    """The weight of the values at given statistics, and what it is to be divided by where it is normalised."""

    weights: Weights
    weighs_values: ClassVar[bool] = True

    @property
    def sums(self):
        return int(self.weights.normalized)

    @property
    def vanishes(self):
        return self.weights.vanishes

    def __call__(self, s, rows, *blocks):
        w = self.weights.weight(s, rows, *blocks)
        return w, (w,) * self.sums


@dataclasses.dataclass(frozen=True)
class StatisticTerms:
    """The summand of a statistic. The rows are the earlier statistics and, unless it is a Sum, its own value last."""

    statistic: Any
    weighs_values: ClassVar[bool] = False
    sums: ClassVar[int] = 1

    @property
    def vanishes(self):
        return isinstance(self.statistic, Exponential) and self.statistic.vanishes

    def __call__(self, s, rows, *blocks):
        which = self.statistic
        if isinstance(which, Sum):
            return None, (which.phi(s, rows, *blocks),)
        if isinstance(which, Root):
            return None, (which.phi(s, rows[-1], rows[:-1], *blocks),)
        return None, (which.terms(s, rows[-1], *blocks)[1],)


@dataclasses.dataclass(frozen=True)
class SlopeTerms:
    """Summand of a Root and its derivative in the root: what a Newton step needs."""

    statistic: Root
    weighs_values: ClassVar[bool] = False
    sums: ClassVar[int] = 2
    vanishes: ClassVar[bool] = False

    def __call__(self, s, rows, *blocks):
        r = jnp.broadcast_to(rows[-1], s.shape)
        return None, jax.jvp(lambda r: self.statistic.phi(s, r, rows[:-1], *blocks), (r,), (jnp.ones_like(s),))
