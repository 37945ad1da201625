"""Causal attention: a query sees its own position and those before it.

Equation: pair (i, j) is allowed iff ``key position j <= query position i``.
"""

import jax.numpy as jnp

from pallas_kernels.parts import Cover, Mask, part


@part
class Causal(Mask):
    """See :func:`causal`."""

    def tile(self, at):
        return at.key <= at.query

    def block(self, query, key):
        return Cover(key.low <= query.high, key.high <= query.low)

    def count(self, query, key):
        return jnp.clip(query - key.low + 1, 0, key.high - key.low + 1)

    def span(self):
        return None, 0

    def as_jax_nn(self):
        return {"is_causal": True}


def causal() -> Mask:
    """The mask ``key position <= query position``.

    Positions default to storage indices aligned at the first token (as ``is_causal`` of ``jax.nn``); give ``query_positions`` to
    attend from the end of a cache.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 3, 2, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.causal())[0, 0, 1]
    Array([0.5, 0.5, 0. ], dtype=float32)
    """
    return Causal()
