"""A score change from a user's elementwise function."""

from collections.abc import Callable
from typing import Any

from attnx.core.checks import check_function, parameter_operands
from pallas_kernels.parts import Operand, Score, part, static


@part
class Elementwise(Score):
    """See :func:`elementwise`."""

    params: tuple[Any, ...]
    function: Callable = static()
    axes: tuple = static(default=())

    def operands(self, sizes):
        return tuple(Operand(p, a) for p, a in zip(self.params, self.axes))

    def tile(self, s, at, *params):
        return self.function(s, at, *params)


def elementwise(function: Callable, *params) -> Score:
    """Replaces the scores by ``function(s, at, *params)``, with exact gradients for s and the parameters.

    Args:
      function: a module-level function, traceable, elementwise in ``s`` [bq, bk]; ``at`` holds ``batch``, ``head`` and the logical positions
        ``query``, ``key``: integers that broadcast against ``s``, as a rule scalars, [bq, 1] and [1, bk].
      params: arrays, handed over whole with two leading axes of size 1, or :class:`attnx.Operand` (array with the meaning of its
        axes), handed over by block. New values need no recompilation.

    >>> import attnx, jax.numpy as jnp
    >>> def recency(s, at, rate):
    ...     return s - rate * (at.query - at.key)
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> rate = attnx.Operand(jnp.array([0.1, 0.2]), ("head",))
    >>> out = attnx.attention(q, k, v, scores=attnx.scores.elementwise(recency, rate), mask=attnx.masks.causal())
    """
    check_function("function", function)
    arrays, axes = parameter_operands(params)
    return Elementwise(arrays, function, axes)
