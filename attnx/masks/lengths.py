"""Padding: only the first positions of each sequence are real.

Equation: pair (i, j) is allowed iff ``query position i < query length`` and ``key position j < key length``.
"""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import check_integers
from pallas_kernels.parts import Cover, Mask, Operand, part


@part
class Lengths(Mask):
    """See :func:`lengths`."""

    query_lengths: Any = None
    key_lengths: Any = None

    def operands(self, sizes):
        given = [x for x in (self.query_lengths, self.key_lengths) if x is not None]
        return tuple(Operand(x, ("batch",) if jnp.ndim(x) else ()) for x in given)

    def _sides(self, query, key, lengths):
        given = iter(lengths)
        return [(side, next(given)) for side, known in ((query, self.query_lengths), (key, self.key_lengths)) if known is not None]

    def tile(self, at, *lengths):
        ok = True
        for position, length in self._sides(at.query, at.key, lengths):
            ok = ok & (position < length)
        return ok

    def block(self, query, key, *lengths):
        some = every = True
        for side, length in self._sides(query, key, lengths):
            some, every = some & (side.low < length.high), every & (side.high < length.low)
        return Cover(some, every)

    def as_jax_nn(self):
        named = {"query_seq_lengths": self.query_lengths, "key_value_seq_lengths": self.key_lengths}
        return {name: x for name, x in named.items() if x is not None} if all(jnp.ndim(x) for x in named.values() if x is not None) else None


def lengths(query_lengths=None, key_lengths=None) -> Mask:
    """The mask ``query position < query_lengths[b] and key position < key_lengths[b]``; None leaves a side unlimited.

    Args:
      query_lengths, key_lengths: an integer or an integer array [B], traced or not. Rows beyond the query length give zeros.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 4, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.lengths(key_lengths=jnp.array([2])))[0, 0, 3]
    Array([0.5, 0.5, 0. , 0. ], dtype=float32)
    """
    if query_lengths is None and key_lengths is None:
        raise ValueError("lengths: expected query_lengths or key_lengths (or both), got neither")
    checked = [None if x is None else check_integers(name, x, ranks=(0, 1))
               for name, x in (("query_lengths", query_lengths), ("key_lengths", key_lengths))]
    return Lengths(*checked)
