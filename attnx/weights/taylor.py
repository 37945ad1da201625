"""Taylor weights: a softmax whose exponential is cut to a polynomial, so that few features say it exactly.

    w_ij = f(s_ij) / sum_j f(s_ij),          f(s) = 1 + s + s^2 / 2 + ... + s^p / p!

as in Gerami, Hoover, Dulepet, Duraiswami: "FAST: Factorizable Attention for Speeding up Transformers" (2024, arXiv 2402.07901). For even p, f is positive whatever s;
for odd p scores must stay above its root (-1 for p = 1).
"""

import jax.numpy as jnp

from attnx.core.checks import check_integer
from pallas_kernels.parts import Exponential, part, static


@part
class Taylor(Exponential):
    """See :func:`taylor`."""

    order: int = static(default=2)

    def shift(self, s):
        return None  # a polynomial does not overflow

    def terms(self, s, m):
        f = 1 + s / self.order
        for n in range(self.order - 1, 0, -1):
            f = 1 + f * s / n
        f = f * jnp.exp(-m)
        return f, f


def taylor(order: int = 2) -> Exponential:
    """Taylor polynomials in place of exponentials.

    Args:
      order: p, at least 1. Where it is odd, scores must be above the polynomial's root.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1)
    >>> attnx.attention_weights(q, k, weights=attnx.weights.taylor(2))[0, 0, 0] * 3  # 2.5 and 0.5 of 3
    Array([2.5, 0.5], dtype=float32)
    """
    return Taylor(check_integer("order", order, least=1))
