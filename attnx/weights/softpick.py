"""Softpick weights: rectified, so a row may attend to nothing, and free of attention sinks.

Zuhri, Fuadi, Aji: "Softpick: No Attention Sink, No Massive Activations with Rectified Softmax" (2025, arXiv 2504.20966):

    w_ij = relu(e^s_ij - 1) / sum_j |e^s_ij - 1|

Written with d = tanh(s/2) (e^(s-m) + e^-m) = (e^s - 1) e^-m, which is exact near s = 0 and finite for every m >= max(s, 0). A row whose
scores are all 0 weighs nothing: output and gradients are zero (the released code adds 1e-8 to the denominator instead).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Exponential, part


@part
class Softpick(Exponential):
    """See :func:`softpick`."""

    def shift(self, s):
        return jnp.maximum(s, 0)

    def terms(self, s, m):
        d = jnp.tanh(s / 2) * (jnp.exp(s - m) + jnp.exp(-m))
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
