"""Linear position biases.

Press, Smith, Lewis: "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (2021, arXiv 2108.12409):

    s_ij - slope_n |i - j|          with slopes 2^(-8 n / N) for heads n = 1..N
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from attnx.core.checks import check_integer, check_real
from pallas_kernels.parts import Operand, Score, part


@part
class Alibi(Score):
    """See :func:`alibi`."""

    slopes: Any

    def operands(self, sizes):
        return (Operand(self.slopes, ("head",)),)

    def tile(self, s, at, slope):
        return s - slope.astype(s.dtype) * jnp.abs(at.query - at.key).astype(s.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The paper's slopes [N]; for N not a power of two, those of the next lower power and every other one of the next higher."""
    check_integer("num_heads", num_heads, least=1)
    def geometric(n):
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    base = 2 ** int(np.log2(num_heads))
    return np.concatenate([geometric(base), geometric(2 * base)[::2][: num_heads - base]]).astype(np.float32)


def alibi(slopes) -> Score:
    """Subtracts ``slope_n |query position - key position|``.

    Args:
      slopes: real [N], learned or not; an integer means :func:`alibi_slopes` of that many heads.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = v = jnp.zeros((1, 3, 1, 8))
    >>> w = attnx.attention_weights(q, k, scores=attnx.scores.alibi(jnp.log(jnp.array([2.]))))
    >>> [f"{x:.3f}" for x in w[0, 0, 0]]
    ['0.571', '0.286', '0.143']
    """
    if isinstance(slopes, int) and not isinstance(slopes, bool):
        slopes = alibi_slopes(slopes)
    return Alibi(check_real("slopes", slopes, ranks=(1,)))
