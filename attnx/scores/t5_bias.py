"""Bucketed relative position bias.

Raffel et al.: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2019, arXiv 1910.10683):

    s_ij + table[bucket(j - i), n]

Near offsets have a bucket each, far ones share logarithmically spaced buckets up to ``max_distance``, beyond which all share the last.
The table is expanded to one entry an offset before the tiles, O(T N), so no tile gathers.
"""

from typing import Any

import jax.numpy as jnp

from attnx.core.checks import check_integer, check_integers, check_real
from pallas_kernels.parts import Operand, Score, part, static


def _check_buckets(name, num_buckets, max_distance, bidirectional):
    sides = 4 if bidirectional else 2  # near and far buckets on each side
    if check_integer(name, num_buckets, least=0) < sides:
        raise ValueError(f"{name}: expected at least {sides} buckets, got {num_buckets}")
    check_integer("max_distance", max_distance, least=num_buckets // sides + 1)


def t5_bucket(offset, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True):
    """The bucket of each offset (key position minus query position), int32 in [0, num_buckets).

    Bidirectional: the upper half of the buckets is for offsets > 0. Otherwise offsets > 0 fall into bucket 0.
    """
    _check_buckets("num_buckets", num_buckets, max_distance, bidirectional)
    offset = check_integers("offset", offset)
    start = jnp.zeros_like(offset)
    if bidirectional:
        num_buckets //= 2
        start = jnp.where(offset > 0, num_buckets, 0)
        distance = jnp.abs(offset)
    else:
        distance = jnp.maximum(-offset, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return (start + jnp.where(distance < exact, distance, far)).astype(jnp.int32)


@part
class T5Bias(Score):
    """See :func:`t5_bias`."""

    table: Any
    max_distance: int = static(default=128)
    bidirectional: bool = static(default=True)

    @property
    def horizon(self):
        return self.max_distance

    def operands(self, sizes):
        low, high = sizes.offsets
        buckets = t5_bucket(jnp.arange(low, high + 1), self.table.shape[0], self.max_distance, self.bidirectional)
        return (Operand(self.table[buckets], ("offset", "head")),)

    def tile(self, s, at, bias):
        return s + bias.astype(s.dtype)


def t5_bias(table, *, max_distance: int = 128, bidirectional: bool = True) -> Score:
    """Adds ``table[bucket(j - i), n]`` to the scores.

    Args:
      table: real [num_buckets, N], the learned biases.
      max_distance: the offset from which all share the last bucket, above ``num_buckets / 2`` (``/ 4`` if bidirectional).
      bidirectional: whether keys ahead of the query have buckets of their own.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.zeros((1, 4, 2, 8))
    >>> out = attnx.attention(q, k, v, scores=attnx.scores.t5_bias(jnp.zeros((32, 2))))
    """
    table = check_real("table", table, ranks=(2,))
    _check_buckets("table", table.shape[0], max_distance, bidirectional)
    return T5Bias(table, max_distance, bool(bidirectional))
