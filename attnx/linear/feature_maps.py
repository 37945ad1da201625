"""Feature maps of linear attention: phi in ``phi(q) . phi(k)``, along the last axis.

All are functions that :func:`attnx.linear_attention` and :func:`attnx.recurrent` take as ``feature_map``; of a map with parameters equal instances are equal, so
nothing is compiled twice.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.core.linear import elu_plus_one

__all__ = ["Taylor", "elu_plus_one", "symmetric_monomials", "unit"]


def unit(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """``x / |x|``, so that dot products are cosines; a vector no longer than 1e-12 stays as it is.

    >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1))


def symmetric_monomials(x: Float[Array, "*B H"]) -> Float[Array, "*B F"]:
    """All products of two channels, each once: ``x_a^2`` and ``sqrt(2) x_a x_b``, F = H (H + 1) / 2, so that ``phi(q) . phi(k) = (q . k)^2``.

    Product s H + a is of channels a and a + s (mod H): whole vectors rolled, no gather.

    >>> q, k = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 0.5, -1.0])
    >>> symmetric_monomials(q).shape, round(float(symmetric_monomials(q) @ symmetric_monomials(k)), 5), float((q @ k) ** 2)
    ((6,), 1.0, 1.0)
    """
    size = x.shape[-1]
    products = [x * x, *(math.sqrt(2) * x * jnp.roll(x, -s, axis=-1) for s in range(1, (size + 1) // 2))]
    if size and size % 2 == 0:
        half = size // 2
        products.append(math.sqrt(2) * x[..., :half] * x[..., half:])
    return jnp.concatenate(products, axis=-1)


@dataclasses.dataclass(frozen=True)
class Taylor:
    """The features whose dot product is the exponential's Taylor polynomial: ``phi(q) . phi(k) = 1 + s + s^2 / 2``, s = scale q . k; without the last term in order 1.

    1 + H features in order 1, H (H + 1) / 2 more in order 2.

    Attributes:
      order: 1 or 2.
      scale: of dot products, positive.

    >>> phi, q, k = Taylor(2, 0.5), jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])
    >>> round(float(phi(q) @ phi(k)), 6)  # s = -0.5
    0.625
    """

    order: int = 2
    scale: float = 1.0

    def __post_init__(self):
        checks.check_integer("order", self.order, least=1, most=2)
        if not self.scale > 0:
            raise ValueError(f"scale: expected a positive number, got {self.scale}")

    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B F"]:
        """[..., H] to [..., F]."""
        x = math.sqrt(self.scale) * x
        features = [jnp.ones_like(x, shape=(*x.shape[:-1], 1)), x]
        return jnp.concatenate(features if self.order == 1 else [*features, math.sqrt(0.5) * symmetric_monomials(x)], axis=-1)
