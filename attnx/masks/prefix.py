"""Prefix attention: everybody sees the first keys.

Equation: pair (i, j) is allowed iff ``key position j < length``. ``causal() | prefix(length)`` is the prefix language model: the
prompt is read in both directions, the continuation causally.
"""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import check_integers
from pallas_kernels.parts import Cover, Mask, Operand, Range, part


@part
class Prefix(Mask):
    """See :func:`prefix`."""

    length: Any

    def operands(self, sizes):
        return (Operand(self.length, ("batch",) if jnp.ndim(self.length) else ()),)

    def tile(self, at, length):
        return at.key < length

    def block(self, query, key, length: Range):
        return Cover(key.low < length.high, key.high < length.low)


def prefix(length) -> Mask:
    """The mask ``key position < length``.

    Args:
      length: an integer or an integer array [B], traced or not.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 4, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.causal() | attnx.masks.prefix(2))[0, 0, 0]
    Array([0.5, 0.5, 0. , 0. ], dtype=float32)
    """
    return Prefix(check_integers("length", length, ranks=(0, 1)))
