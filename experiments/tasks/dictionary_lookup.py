"""Dictionary look-up: a complete bipartite graph from n entries, each a key with its value, to n questions, each a key; all keys and values differ.

    features of an entry: (its key, its value);      of a question: (its key, a blank);      asked for: the value of its key, one of n

A node answers only if it ranks the entries by its own key. From Brody, Alon, Yahav: "How Attentive are Graph Attention Networks?" (2021, arXiv 2105.14491).
"""

import jax
import jax.numpy as jnp
import numpy as np


def graph(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Senders and receivers, int32 [n^2]: entries 0..n-1 to questions n..2n-1.

    >>> graph(2)[0].tolist(), graph(2)[1].tolist()
    ([0, 0, 1, 1], [2, 3, 2, 3])
    """
    senders, receivers = np.meshgrid(np.arange(n), n + np.arange(n), indexing="ij")
    return senders.reshape(-1).astype(np.int32), receivers.reshape(-1).astype(np.int32)


def nodes(permutations: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values int32 [B, 2n] of the nodes, n standing for the blank; from permutations [B, n], the values by key."""
    batch, n = permutations.shape
    keys = jnp.broadcast_to(jnp.tile(jnp.arange(n, dtype=jnp.int32), 2), (batch, 2 * n))
    return keys, jnp.concatenate([permutations.astype(jnp.int32), jnp.full((batch, n), n, jnp.int32)], axis=1)


def permutations(n: int, count: int, seed: int, share: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """``count`` random permutations of n (all, if there are no more), split into those to train on and the others: int32 [.., n]."""
    rng = np.random.default_rng(seed)
    if n <= 6:
        found = np.stack(np.meshgrid(*[np.arange(n)] * n, indexing="ij"), -1).reshape(-1, n)
        found = rng.permutation(found[[len(set(row)) == n for row in found.tolist()]])[:count]
    else:
        found = np.unique(rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1), axis=0)
        found = rng.permutation(found)
    cut = round(share * len(found))
    return found[:cut].astype(np.int32), found[cut:].astype(np.int32)
