"""Photographs with pixels missing: crops of scikit-learn's two sample images, a temple and a flower, whose right quarters are held out."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def images() -> np.ndarray:
    """Both at half their size, float32 [2, 213, 320, 3] from 0 to 1."""
    from sklearn.datasets import load_sample_images

    full = np.stack(load_sample_images().images).astype(np.float32)[:, :426] / 255
    return full.reshape(2, 213, 2, 320, 2, 3).mean((2, 4))


def sampler(size: int, batch: int, *, share: float = 0.5, held: bool = False) -> Callable:
    """``sample(key) -> (damaged [batch, size, size, 4], whole [batch, size, size, 3])``: crops anywhere in the part to train on, or in that held out.

    Damaged crops have zeros where a pixel is missing, a ``share`` of them, and in a fourth channel 1 where it is not.
    """
    source = jnp.asarray(images()[:, :, 240:] if held else images()[:, :, :240])
    rows, columns = source.shape[1] - size, source.shape[2] - size

    def sample(key):
        which, row, column, missing = jax.random.split(key, 4)
        corner = [jax.random.randint(k, (batch,), 0, most + 1) for k, most in ((row, rows), (column, columns))]
        cut = lambda image, r, c: jax.lax.dynamic_slice(source, (image, r, c, 0), (1, size, size, 3))[0]
        whole = jax.vmap(cut)(jax.random.randint(which, (batch,), 0, 2), *corner)
        there = jax.random.bernoulli(missing, 1 - share, (*whole.shape[:3], 1)).astype(whole.dtype)
        return jnp.concatenate([whole * there, there], -1), whole

    return sample


def psnr(restored: jax.Array, whole: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in decibels, of images from 0 to 1, by the mean error over all of them."""
    return -10 * jnp.log10(jnp.mean(jnp.square(jnp.clip(restored, 0, 1) - whole)))
