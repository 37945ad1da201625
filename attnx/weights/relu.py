"""ReLU weights: sparse, every pair by itself, no normaliser.

    w_ij = relu(s_ij)

As studied by Wortsman, Lee, Gilmer, Kornblith: "Replacing softmax with ReLU in Vision Transformers" (2023, arXiv 2309.08586), which divides
by the length: scale the values or the output by 1 / S for that.
"""

import jax

from pallas_kernels.parts import Weights, part


@part
class Relu(Weights):
    """See :func:`relu`."""

    vanishes = True

    def weight(self, s, statistics):
        return jax.nn.relu(s)


def relu() -> Weights:
    """Elementwise rectifier.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.array([2.0, -2.0]).reshape(1, 2, 1, 1)
    >>> attnx.attention_weights(q, k, weights=attnx.weights.relu())
    Array([[[[2., 0.]]]], dtype=float32)
    """
    return Relu()
