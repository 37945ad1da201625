"""Handwritten digits: scikit-learn's 1797 images of 8 by 8 pixels, a quarter held out."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 10


@functools.cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """All images, float32 [1797, 8, 8] from 0 to 1, and labels, int32 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int32)


def split(seed: int, share: float = 0.75) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(images, labels) to train on, and those held out."""
    everything = images()
    order = np.random.default_rng(seed).permutation(len(everything[1]))
    cut = round(share * len(order))
    train, held = ([jnp.asarray(x[index]) for x in everything] for index in (order[:cut], order[cut:]))
    return tuple(train), tuple(held)


def sampler(data: tuple[jax.Array, jax.Array], batch: int) -> Callable:
    """``sample(key) -> (images, labels)``, with replacement."""
    def sample(key):
        chosen = jax.random.randint(key, (batch,), 0, len(data[1]))
        return tuple(x[chosen] for x in data)

    return sample


def sequence(images: jax.Array) -> jax.Array:
    """Pixels one by one: [B, 8, 8] -> [B, 64, 1]."""
    return images.reshape(len(images), 64, 1)
