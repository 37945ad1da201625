"""Planted keys: a query is the sum of a few of the keys, with noise, and asks for the mean of their values."""

from collections.abc import Callable

import jax


def sampler(planted: int, batch: int, *, keys: int = 16, size: int = 8, noise: float = 0.3) -> Callable:
    """``sample(key) -> (query [batch, size], keys [batch, keys, size], values [batch, keys, size], answers [batch, size])``, all normal; the query is the sum of
    ``planted`` keys over the root of their number, and noise in each entry."""
    def sample(key):
        keys_key, values_key, noise_key = jax.random.split(key, 3)
        found = jax.random.normal(keys_key, (batch, keys, size))
        values = jax.random.normal(values_key, (batch, keys, size))
        query = found[:, :planted].sum(1) / planted**0.5 + noise * jax.random.normal(noise_key, (batch, size))  # keys are alike, so their order says nothing
        return query, found, values, values[:, :planted].mean(1)

    return sample
