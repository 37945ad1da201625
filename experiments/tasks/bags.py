"""Bags of instances of which few tell: a bag is positive if it holds witnesses, drawn from three clusters of different strength; each bag is shifted as a whole."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

INSTANCES, SIZE, WITNESSES = 150, 16, 8
STRENGTHS = (4.0, 2.5, 1.75)  # distances of the clusters from other instances, whose standard deviation is 1
SHIFT = 0.5  # standard deviation of a bag's shift


class Bags(NamedTuple):
    """Instances [B, 150, 16], labels [B], and of each instance its cluster, 0 to 2, or -1 [B, 150]."""

    instances: jax.Array
    labels: jax.Array
    clusters: jax.Array


def make(key: jax.Array, count: int) -> Bags:
    """So many bags, half of them positive; 8 of a positive one's instances are witnesses, each of a random cluster."""
    directions = jnp.eye(SIZE)[:len(STRENGTHS)] * jnp.asarray(STRENGTHS)[:, None]
    noise, shift, which, place = jax.random.split(key, 4)
    labels = jnp.arange(count) % 2
    cluster = jax.random.randint(which, (count, INSTANCES), 0, len(STRENGTHS))
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(place, (count, INSTANCES)), axis=1), axis=1)
    clusters = jnp.where((rank < WITNESSES) & (labels == 1)[:, None], cluster, -1)
    instances = jax.random.normal(noise, (count, INSTANCES, SIZE)) + SHIFT * jax.random.normal(shift, (count, 1, SIZE))
    return Bags(instances + jnp.where((clusters >= 0)[..., None], directions[clusters], 0), labels, clusters)


def auc(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The chance that a positive bag scores higher than a negative one."""
    higher = (scores[:, None] > scores) + 0.5 * (scores[:, None] == scores)
    pairs = (labels[:, None] == 1) & (labels == 0)
    return jnp.sum(higher * pairs) / jnp.sum(pairs)
