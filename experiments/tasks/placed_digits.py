"""A handwritten digit somewhere in a larger picture, among scraps of others; on request only where no training picture has one.

The picture is 24 x 24 pixels and the digit 8 x 8. In training its upper left corner is not both below row 8 and right of column 8; elsewhere (`places="new"`) it is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

SIDE, DIGIT, BORDER, SCRAP, SCRAPS = 24, 8, 8, 3, 6


def sampler(data: tuple[jax.Array, jax.Array], batch: int, places: str = "usual") -> Callable:
    """``sample(key) -> (pictures [batch, 24, 24, 1], labels)`` of digits [N, 8, 8] and their labels.

    Args:
      data: see :func:`experiments.tasks.digits.split`.
      batch: number of pictures.
      places: 'usual', those of training, or 'new', the others.
    """
    if places not in ("usual", "new"):
        raise ValueError(f"places: expected 'usual' or 'new', got {places!r}")
    images, labels = data
    last = SIDE - DIGIT

    def one(key):
        which, where, scraps = jax.random.split(key, 3)
        chosen = jax.random.randint(which, (), 0, len(labels))
        rows, columns = jnp.meshgrid(jnp.arange(last + 1), jnp.arange(last + 1), indexing="ij")
        new = (rows > BORDER) & (columns > BORDER)
        corner = jax.random.choice(where, (last + 1) ** 2, p=(new if places == "new" else ~new).ravel() / (new if places == "new" else ~new).sum())
        picture = jnp.zeros((SIDE, SIDE))
        for scrap in jax.random.split(scraps, SCRAPS):
            other, cut, at = jax.random.split(scrap, 3)
            image = images[jax.random.randint(other, (), 0, len(labels))]
            piece = jax.lax.dynamic_slice(image, jax.random.randint(cut, (2,), 0, DIGIT - SCRAP + 1), (SCRAP, SCRAP))
            picture = jax.lax.dynamic_update_slice(picture, piece, jax.random.randint(at, (2,), 0, SIDE - SCRAP + 1))
        return jax.lax.dynamic_update_slice(picture, images[chosen], (corner // (last + 1), corner % (last + 1)))[..., None], labels[chosen]

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))
