"""Two markers in a long text of noise: each says 0 or 1; asked for are both together, their exclusive or, or what the first says.

    n n A1 n n n n n B0 n n        ->        1 xor 0 = 1

The markers A and B lie in windows of their own, in either order.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NOISE = 12
VOCABULARY = NOISE + 4  # noise, A0, A1, B0, B1


class Batch(NamedTuple):
    """Tokens int32 [B, T]; the exclusive or of both bits, and the bit of the marker that comes first, [B]; its place and that of the other [B]."""

    tokens: jax.Array
    both: jax.Array
    first: jax.Array
    place: jax.Array
    other: jax.Array


def sampler(length: int, window: int, batch: int) -> Callable:
    """``sample(key) -> Batch`` of ``length`` tokens, a multiple of ``window``; the two markers lie in different windows."""
    def one(key):
        noise, windows, inside, bits, which = jax.random.split(key, 5)
        low, high = jnp.sort(jax.random.choice(windows, length // window, (2,), replace=False))
        places = jnp.stack([low, high]) * window + jax.random.randint(inside, (2,), 0, window)
        said = jax.random.randint(bits, (2,), 0, 2)
        kinds = jax.random.permutation(which, 2)  # whether A or B comes first
        tokens = jax.random.randint(noise, (length,), 0, NOISE).at[places].set(NOISE + 2 * kinds + said)
        return Batch(tokens.astype(jnp.int32), said[0] ^ said[1], said[0], places[0], places[1])

    return lambda key: jax.vmap(one)(jax.random.split(key, batch))
