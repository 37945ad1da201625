"""Attention within documents: several sequences packed into one row do not see each other.

Equation: pair (i, j) is allowed iff ``id of query i == id of key j``. Tiles whose id ranges are disjoint are never visited, so
packed documents cost the sum of their own squares.
"""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import check_integers
from pallas_kernels.parts import Cover, Mask, Operand, Range, part


@part
class Documents(Mask):
    """See :func:`documents`."""

    query_ids: Any
    key_ids: Any

    def operands(self, sizes):
        lead = lambda ids: ("batch",) * (jnp.ndim(ids) - 1)
        return Operand(self.query_ids, (*lead(self.query_ids), "query")), Operand(self.key_ids, (*lead(self.key_ids), "key"))

    def tile(self, at, query_ids, key_ids):
        return query_ids == key_ids

    def block(self, query, key, query_ids: Range, key_ids: Range):
        one = (query_ids.low == query_ids.high) & (key_ids.low == key_ids.high)
        return Cover((query_ids.low <= key_ids.high) & (key_ids.low <= query_ids.high), one & (query_ids.low == key_ids.low))


def documents(query_ids, key_ids=None) -> Mask:
    """The mask ``query_ids[i] == key_ids[j]``, usually with ``& causal()``.

    Args:
      query_ids: integer array [B, T] or [T], traced or not. Sorted ids let the most tiles be skipped; any order is right.
      key_ids: integer array [B, S] or [S]; the query's by default.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 4, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.documents(jnp.array([0, 0, 1, 1])))[0, 0, 0]
    Array([0.5, 0.5, 0. , 0. ], dtype=float32)
    """
    query_ids = check_integers("query_ids", query_ids, ranks=(1, 2))
    return Documents(query_ids, query_ids if key_ids is None else check_integers("key_ids", key_ids, ranks=(1, 2)))
