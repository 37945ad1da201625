"""Softpick weights: rectified, so a row may attend to nothing, and free of attention sinks.

Zuhri, Fuadi, Aji: "Softpick: No Attention Sink, No Massive Activations with Rectified Softmax" (2025, arXiv 2504.20966):

    w_ij = relu(e^s_ij - 1) / sum_j |e^s_ij - 1|

Written with d = (e^s - 1) e^-m, finite for every m >= max(s, 0); near s = 0, where e^(s-m) - e^-m would cancel, by the series of e^s - 1. A row
whose scores are all 0 weighs nothing: output and gradients are zero (the released code adds 1e-8 to the denominator instead).
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Exponential, part

_NEAR = 0.5


def _less_one(s):
    """e^s - 1 for |s| <= 1/2, clipped there: as many terms of its series as the dtype can tell (cheaper than tanh(s/2) (e^s + 1), which fits all s)."""
    s = jnp.clip(s, -_NEAR, _NEAR)
    last = next(n for n in range(2, 100) if _NEAR**n / math.factorial(n + 1) < jnp.finfo(s.dtype).eps / 8)
    series = 1 / math.factorial(last)
    for n in range(last - 1, 0, -1):
        series = series * s + 1 / math.factorial(n)
    return s * series


@jax.custom_jvp
def _scaled(s, m):
    """(e^s - 1) e^-m."""
    one = jnp.exp(-m)
    return jnp.where(jnp.abs(s) < _NEAR, one * _less_one(s), jnp.exp(s - m) - one)


@_scaled.defjvp
def _scaled_jvp(primals, tangents):
    """The slope is e^(s-m); the series need not be differentiated."""
    (s, m), (ds, dm) = primals, tangents
    d = _scaled(s, m)
    return d, jnp.exp(s - m) * ds - d * dm


@part
class Softpick(Exponential):
    """See :func:`softpick`."""

    def shift(self, s):
        return jnp.maximum(s, 0)

    def terms(self, s, m):
        d = _scaled(s, m)
        return jax.nn.relu(d), jnp.abs(d)


def softpick() -> Exponential:
    """Rectified softmax; keys with negative scores count in the normaliser only.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.log(jnp.array([2.0, 0.5])).reshape(1, 2, 1, 1)
    >>> w = attnx.attention_weights(q, k, weights=attnx.weights.softpick())
    >>> [f"{x:.3f}" for x in w[0, 0, 0]]
    ['0.667', '0.000']
    """
    return Softpick()
