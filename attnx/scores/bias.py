"""Additive bias: ``s_ij + bias_ij``, by storage index, with its gradient. O(T) memory beyond the bias itself."""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import check_real
from pallas_kernels.parts import Operand, Score, part


@part
class Bias(Score):
    """See :func:`bias`."""

    array: Any

    def operands(self, sizes):
        return (Operand(self.array, ("batch", "head", "query", "key")[4 - jnp.ndim(self.array):]),)

    def tile(self, s, at, bias):
        return s + bias.astype(s.dtype)

    def as_jax_nn(self):
        return {"bias": self.array.reshape((1,) * (4 - self.array.ndim) + self.array.shape)}


def bias(array) -> Score:
    """Adds ``array[b, n, i, j]`` to the scaled scores.

    Args:
      array: real [B, N, T, S], [N, T, S] or [T, S]; size 1 broadcasts, and only what is given is read.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.zeros((1, 2, 1, 8))
    >>> w = attnx.attention_weights(q, k, scores=attnx.scores.bias(jnp.log(jnp.array([[1., 3.]]))))
    >>> [f"{x:.2f}" for x in w[0, 0, 0]]
    ['0.25', '0.75']
    """
    return Bias(check_real("array", array, ranks=(2, 3, 4)))
