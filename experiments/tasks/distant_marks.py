"""Pictures that ask for two things: whether two marks far from each other have the same colour, and which way the stripes of a small patch run.

A picture is 28 x 28 pixels of three channels, grey with noise. Two marks of 2 x 2 pixels, red or blue, are at least 16 pixels apart by row or by column; a patch of
4 x 4 pixels has stripes along its rows or its columns. Places are multiples of two.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIDE, APART, NOISE = 28, 16, 0.2
COLOURS = np.array([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]], np.float32)


class Batch(NamedTuple):
    """Pictures [B, 28, 28, 3]; whether both marks have one colour, and whether stripes run along rows, int32 [B]."""

    pictures: jax.Array
    same: jax.Array
    rows: jax.Array


def _pairs():
    places = 2 * np.stack(np.unravel_index(np.arange((SIDE // 2) ** 2), (SIDE // 2,) * 2), -1)
    first, second = np.nonzero(abs(places[:, None] - places).max(-1) >= APART)
    return places[first], places[second]


def sampler(batch: int) -> Callable:
    """``sample(key) -> Batch``."""
    first, second = _pairs()
    stripes = np.zeros((2, 4, 4, 3), np.float32)
    stripes[0, :, ::2], stripes[0, :, 1::2], stripes[1, ::2], stripes[1, 1::2] = 1, -1, 1, -1

    def one(key):
        noise, where, colours, patch, corner = jax.random.split(key, 5)
        picture = NOISE * jax.random.normal(noise, (SIDE, SIDE, 3))
        rows = jax.random.randint(patch, (), 0, 2)
        picture = jax.lax.dynamic_update_slice(picture, jnp.asarray(stripes)[rows], (*(2 * jax.random.randint(corner, (2,), 0, SIDE // 2 - 1)), 0))
        pair = jax.random.randint(where, (), 0, len(first))
        kinds = jax.random.randint(colours, (2,), 0, 2)
        for places, kind in zip((first, second), kinds):
            mark = jnp.broadcast_to(jnp.asarray(COLOURS)[kind], (2, 2, 3))
            picture = jax.lax.dynamic_update_slice(picture, mark, (*jnp.asarray(places)[pair], 0))
        return Batch(picture, (kinds[0] == kinds[1]).astype(jnp.int32), rows)

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))
