"""Elementwise weights that need no row sums: squared ReLU, and the bell's cumulative curve that has its value and slope near sqrt(1/2) but stays bounded.

    relu_squared:  w_ij = max(s_ij, 0)^2               laplace:  w_ij = (1 + erf((s_ij - mu) / (sigma sqrt 2))) / 2,   mu = sqrt(1/2), sigma = sqrt(1 / (4 pi))

Ma, Zhou, Kong, He, Gui, Neubig, May, Zettlemoyer: "Mega: Moving Average Equipped Gated Attention" (ICLR 2023, arXiv 2209.10655), where the scores are
divided by the number of visible keys; squared ReLU from So, Manke, Liu, Dai, Shazeer, Le: "Primer: Searching for Efficient Transformers for Language Modeling" (2021,
arXiv 2109.08668). Mega's released code rounds mu and sigma to six digits.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Weights, part

_MU, _WIDTH = math.sqrt(0.5), math.sqrt(1 / (2 * math.pi))  # the width is sigma sqrt 2


@part
class Laplace(Weights):
    """See :func:`laplace`."""

    def weight(self, s, statistics):
        return 0.5 * (1 + jax.lax.erf((s - _MU) / _WIDTH))


@part
class ReluSquared(Weights):
    """See :func:`relu_squared`."""

    def weight(self, s, statistics):
        return jnp.square(jax.nn.relu(s))


def laplace() -> Weights:
    """The elementwise ``(1 + erf((s - mu) / (sigma sqrt 2))) / 2``, 1/2 at s = sqrt(1/2).

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.sqrt(0.5) * jnp.ones((1, 1, 1, 1))
    >>> attnx.attention_weights(q, k, weights=attnx.weights.laplace()).item()
    0.5
    """
    return Laplace()


def relu_squared() -> Weights:
    """The elementwise ``max(s, 0)^2``.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.array([3.0, -3.0]).reshape(1, 2, 1, 1)
    >>> attnx.attention_weights(q, k, weights=attnx.weights.relu_squared())
    Array([[[[9., 0.]]]], dtype=float32)
    """
    return ReluSquared()
