"""A mask from a user's function of logical positions."""

from collections.abc import Callable
from typing import Any

from attnx.core.checks import check_function, parameter_operands
from pallas_kernels.parts import Cover, Mask, Operand, part, static


@part
class Predicate(Mask):
    """See :func:`predicate`."""

    params: tuple[Any, ...]
    function: Callable = static()
    axes: tuple = static(default=())
    cover: Callable | None = static(default=None)

    def operands(self, sizes):
        return tuple(Operand(p, a) for p, a in zip(self.params, self.axes))

    def tile(self, at, *params):
        return self.function(at, *params)

    def block(self, query, key, *params):
        return super().block(query, key) if self.cover is None else Cover(*self.cover(query, key, *params))


def predicate(function: Callable, *params, cover: Callable | None = None) -> Mask:
    """The mask ``function(at, *params)``.

    Args:
      function: a module-level function, traceable, of ``at`` (``at.batch``, ``at.head`` and the logical positions ``at.query``, ``at.key``: integers that
        broadcast to [bq, bk], as a rule scalars, [bq, 1] and [1, bk]) and of a block of each parameter; returns booleans that broadcast to [bq, bk].
      params: arrays, handed over whole with two leading axes of size 1, or :class:`attnx.Operand` (array with the meaning of its
        axes), handed over by block. New values need no recompilation.
      cover: optionally ``cover(query, key, *ranges) -> (some, every)``, from the ranges (low, high) of positions and params in a tile: whether a
        pair may be allowed, whether all are. It lets tiles be skipped.

    >>> import attnx, jax.numpy as jnp
    >>> def same_parity(at):
    ...     return at.query % 2 == at.key % 2
    >>> q = k = v = jnp.ones((1, 4, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.predicate(same_parity))[0, 0, 0]
    Array([0.5, 0. , 0.5, 0. ], dtype=float32)
    """
    check_function("function", function)
    if cover is not None:
        check_function("cover", cover)
    arrays, axes = parameter_operands(params)
    return Predicate(arrays, function, axes, cover)
