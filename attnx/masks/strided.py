"""Strided patterns: a query sees every n-th position, or the summary columns of every block.

The two halves of the factorised patterns of Child, Gray, Radford, Sutskever: "Generating Long Sequences with Sparse Transformers" (2019,
arXiv 1904.10509), to be composed with :func:`attnx.masks.causal`, :func:`attnx.masks.sliding_window` and :func:`within_blocks`.
No tile of consecutive positions is free of such pairs, so these masks save nothing by themselves in this storage order.
"""

from attnx.core.checks import check_integer
from pallas_kernels.parts import Cover, Mask, part, static


@part
class Dilated(Mask):
    """See :func:`dilated`."""

    step: int = static()

    def tile(self, at):
        return (at.query - at.key) % self.step == 0


@part
class Columns(Mask):
    """See :func:`strided_columns`."""

    step: int = static()
    width: int = static()

    def tile(self, at):
        return at.key % self.step >= self.step - self.width


@part
class WithinBlocks(Mask):
    """See :func:`within_blocks`."""

    size: int = static()

    def tile(self, at):
        return at.query // self.size == at.key // self.size

    def block(self, query, key):
        (q_low, q_high), (k_low, k_high) = ((r.low // self.size, r.high // self.size) for r in (query, key))
        return Cover((q_low <= k_high) & (k_low <= q_high), (q_low == q_high) & (k_low == k_high) & (q_low == k_low))

    def span(self):
        return self.size - 1, self.size - 1


def dilated(step: int) -> Mask:
    """The mask ``(query - key) mod step == 0``: the strided pattern, or a dilated window with ``& local(...)``.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 5, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.dilated(2))[0, 0, 4] > 0
    Array([ True, False,  True, False,  True], dtype=bool)
    """
    check_integer("step", step, least=1)
    return Dilated(step)


def strided_columns(step: int, width: int = 1) -> Mask:
    """The mask ``key mod step >= step - width``: the last ``width`` positions of every block, seen by all (the fixed pattern's summaries).

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 4, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.strided_columns(2))[0, 0, 0] > 0
    Array([False,  True, False,  True], dtype=bool)
    """
    check_integer("step", step, least=1)
    check_integer("width", width, least=1, most=step)
    return Columns(step, width)


def within_blocks(size: int) -> Mask:
    """The mask ``query div size == key div size``: attention inside blocks of consecutive positions.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 4, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.within_blocks(2))[0, 0, 3] > 0
    Array([False, False,  True,  True], dtype=bool)
    """
    check_integer("size", size, least=1)
    return WithinBlocks(size)
