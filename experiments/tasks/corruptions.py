"""Corruptions of pictures, each in three severities, and a task of cluttered digits to try them on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.tasks import digits

SEVERITIES = (0, 1, 2)
SIDE = 32


def gaussian_noise(images, severity, key):
    """Noise of the same strength everywhere."""
    return images + (0.15, 0.3, 0.5)[severity] * jax.random.normal(key, images.shape)


def shot_noise(images, severity, key):
    """Noise of the photons that are counted."""
    photons = (30.0, 10.0, 4.0)[severity]
    return jax.random.poisson(key, photons * jnp.clip(images, 0, 1)).astype(images.dtype) / photons


def blur(images, severity, key):
    """Repeated means of neighbours."""
    del key
    for _ in range((1, 3, 6)[severity]):
        for axis in (1, 2):
            edges = jnp.pad(images, [(1, 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
            images = sum(jax.lax.slice_in_dim(edges, i, i + images.shape[axis], axis=axis) * w for i, w in enumerate((0.25, 0.5, 0.25)))
    return images


def contrast(images, severity, key):
    """Everything nearer to the picture's mean."""
    del key
    mean = images.mean(axis=(1, 2), keepdims=True)
    return mean + (0.5, 0.3, 0.15)[severity] * (images - mean)


def pixelate(images, severity, key):
    """Fewer pixels, as large as several."""
    del key
    size = SIDE // (2, 3, 4)[severity]
    small = jax.image.resize(images, (len(images), size, size), "linear")
    return jax.image.resize(small, images.shape, "nearest")


CORRUPTIONS = {function.__name__: function for function in (gaussian_noise, shot_noise, blur, contrast, pixelate)}


def corrupt(name: str, images: Float[Array, "B H W"], severity: int, key: Array) -> Float[Array, "B H W"]:
    """Pictures with values from 0 to 1, corrupted and cut to that range."""
    return jnp.clip(CORRUPTIONS[name](images, severity, key), 0, 1)


def cluttered(images: Float[Array, "B 8 8"], key: Array) -> Float[Array, "B 32 32"]:
    """Digits of twice the size somewhere in a picture of 32 x 32, among twelve bright spots of 2 x 2."""
    def one(image, key):
        at, spots = jax.random.split(key)
        row, column = jax.random.randint(at, (2,), 0, SIDE - 15)
        large = jnp.repeat(jnp.repeat(image, 2, 0), 2, 1)
        picture = jax.lax.dynamic_update_slice(jnp.zeros((SIDE, SIDE)), large, (row, column))
        places = jax.random.randint(spots, (12, 2), 0, SIDE // 2)
        clutter = jnp.zeros((SIDE // 2, SIDE // 2)).at[places[:, 0], places[:, 1]].set(0.6)
        return jnp.maximum(picture, jnp.repeat(jnp.repeat(clutter, 2, 0), 2, 1))

    return jax.vmap(one)(images, jax.random.split(key, len(images)))


def sampler(seed: int, batch: int):
    """``sample(key) -> (pictures [batch, 32, 32], labels)`` of training digits, and the pictures and labels held out."""
    train, held = digits.split(seed)
    draw = digits.sampler(train, batch)

    def sample(key):
        chosen, clutter = jax.random.split(key)
        images, labels = draw(chosen)
        return cluttered(images, clutter), labels

    return sample, (cluttered(held[0], jax.random.key(20_000 + seed)), held[1])
