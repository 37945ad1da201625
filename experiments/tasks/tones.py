"""Mixtures of tones: which three of eight frequencies sound in noise, and in which half of the sequence a chirp is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LENGTH, PRESENT = 256, 3
FREQUENCIES = np.array([9.3, 17.8, 26.1, 34.7, 45.2, 58.4, 73.9, 90.6]) / LENGTH
"""In cycles a token; close to no bin of the transform."""


def sampler(batch: int, noise: float = 1.0) -> Callable:
    """``sample(key) -> (signal [batch, T, 1], labels [batch, 9])``: labels of 0 and 1, whether each tone is there, and whether the chirp is late."""
    time = jnp.arange(LENGTH)

    def one(key):
        chosen, phases, place, half, static = jax.random.split(key, 5)
        there = jnp.zeros(len(FREQUENCIES)).at[jax.random.choice(chosen, len(FREQUENCIES), (PRESENT,), replace=False)].set(1.0)
        phase = jax.random.uniform(phases, (len(FREQUENCIES), 1), maxval=2 * jnp.pi)
        tones = there @ jnp.sin(2 * jnp.pi * jnp.asarray(FREQUENCIES, jnp.float32)[:, None] * time + phase)
        late = jax.random.bernoulli(half)
        centre = jax.random.uniform(place, minval=24.0, maxval=LENGTH / 2 - 24) + jnp.where(late, LENGTH / 2, 0)
        since = time - centre
        chirp = 2.5 * jnp.exp(-((since / 10) ** 2)) * jnp.cos(2 * jnp.pi * (0.44 + 0.002 * since) * since)
        signal = tones + chirp + noise * jax.random.normal(static, (LENGTH,))
        return signal[:, None], jnp.append(there, late.astype(jnp.float32))

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))
