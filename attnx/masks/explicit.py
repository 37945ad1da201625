"""A mask given as an array, by storage index rather than position."""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import as_array, describe
from pallas_kernels.parts import Cover, Mask, Operand, Range, part


@part
class Explicit(Mask):
    """See :func:`explicit`."""

    array: Any

    def operands(self, sizes):
        return (Operand(self.array, ("batch", "head", "query", "key")[4 - jnp.ndim(self.array):]),)

    def tile(self, at, allowed):
        return allowed

    def block(self, query, key, allowed: Range):
        return Cover(allowed.high, allowed.low)

    def as_jax_nn(self):
        return {"mask": self.array.reshape((1,) * (4 - self.array.ndim) + self.array.shape)}


def explicit(array) -> Mask:
    """The mask ``array[b, n, i, j]``, true where the pair is allowed.

    Args:
      array: booleans [B, N, T, S], [N, T, S] or [T, S]; size 1 broadcasts. Blocks without a true entry are skipped.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 2, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.explicit(jnp.eye(2, dtype=bool)))[0, 0]
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    expected = "booleans [B, N, T, S], [N, T, S] or [T, S]"
    array = as_array("array", array, expected)
    if array.dtype != bool:
        raise TypeError(f"array: expected {expected}, got {describe(array)}")
    if not 2 <= array.ndim <= 4:
        raise ValueError(f"array: expected {expected}, got {describe(array)}")
    return Explicit(array)
