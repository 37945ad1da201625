"""Sinusoidal position embedding: fixed waves added to the token embeddings.

Source: Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Lukasz Kaiser, Illia Polosukhin,
"Attention Is All You Need", 2017, arXiv:1706.03762.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def sinusoidal(positions: Shaped[Array, "*any"], features: int, *, base: float = 10000.0,
               dtype=jnp.float32) -> Float[Array, "*any features"]:
    """Sines and cosines of the position at geometrically spaced wavelengths, interleaved.

        e[..., 2m] = sin(p * base^(-2m / features)),      e[..., 2m + 1] = cos(the same angle)

    ``e(p + k)`` is a fixed linear map of ``e(p)`` for every k. Costs O(T * features).

    Args:
      positions: integers or reals of any shape [...].
      features: the number of channels, even.
      base: the longest wavelength is about ``2 pi * base``.
      dtype: of the result; angles are at least float32.

    Returns:
      [..., features].

    Raises:
      ValueError: for an odd number of features.

    Example:
      >>> import jax.numpy as jnp
      >>> sinusoidal(jnp.arange(3), 4).shape
      (3, 4)
    """
    if features % 2:
        raise ValueError(f"features: expected an even number, got {features}")
    wide = jnp.promote_types(dtype, jnp.float32)
    frequency = jnp.asarray(base ** (-np.arange(0, features, 2) / features), wide)
    angle = jnp.asarray(positions).astype(wide)[..., None] * frequency
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape(*angle.shape[:-1], features).astype(dtype)
