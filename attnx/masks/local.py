"""Local attention: a query sees a window of positions around its own.

Equation: pair (i, j) is allowed iff ``i - left <= j <= i + right`` in logical positions. Compute and cache are O(T (left + right)).
"""

import jax.numpy as jnp

from attnx.core.checks import check_integer
from pallas_kernels.parts import Cover, Mask, part, static


@part
class Local(Mask):
    """See :func:`local` and :func:`sliding_window`."""

    left: int | None = static(default=None)
    right: int | None = static(default=None)

    def tile(self, at):
        offset = at.key - at.query
        ok = jnp.ones(offset.shape, bool)
        ok = ok if self.left is None else ok & (offset >= -self.left)
        return ok if self.right is None else ok & (offset <= self.right)

    def block(self, query, key):
        lowest, highest = key.low - query.high, key.high - query.low  # of the offsets key - query in the tile
        some, every = True, True
        if self.left is not None:
            some, every = highest >= -self.left, lowest >= -self.left
        if self.right is not None:
            some, every = jnp.logical_and(some, lowest <= self.right), jnp.logical_and(every, highest <= self.right)
        return Cover(some, every)

    def count(self, query, key):
        first = key.low if self.left is None else jnp.maximum(query - self.left, key.low)
        last = key.high if self.right is None else jnp.minimum(query + self.right, key.high)
        return jnp.maximum(last - first + 1, 0)

    def span(self):
        return self.left, self.right

    def as_jax_nn(self):
        return None if self.left is None or self.right is None else {"local_window_size": (self.left, self.right)}


def local(left: int | None = None, right: int | None = None) -> Mask:
    """The mask ``query - left <= key <= query + right``; None leaves a side open.

    Args:
      left: how many positions back a query sees, besides its own.
      right: how many positions ahead.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 5, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.local(1, 1))[0, 0, 3] > 0
    Array([False, False,  True,  True,  True], dtype=bool)
    """
    for name, value in (("left", left), ("right", right)):
        if value is not None:
            check_integer(name, value, least=0)
    return Local(left, right)


def sliding_window(size: int) -> Mask:
    """Causal attention to the last ``size`` positions, the query's own included: ``query - size < key <= query``.

    A decoder with this mask needs a cache of ``size`` tokens only (see :mod:`attnx.core.cache`).

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 5, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.sliding_window(2))[0, 0, 3] > 0
    Array([False, False,  True,  True, False], dtype=bool)
    """
    check_integer("size", size, least=1)
    return Local(size - 1, 0)
