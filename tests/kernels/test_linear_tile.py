"""The mathematics of a chunk, as kernels and as XLA evaluate it, against the sums written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_tile

CHUNKS, SIZE, GROUPS, HEAD = 2, 32, 2, 5


def written_out(query, key, log_decay):
    """Scores with the log-decays between every two tokens added up one by one."""
    g = np.broadcast_to(np.asarray(log_decay, np.float64), key.shape)
    out = np.zeros((CHUNKS, GROUPS * SIZE, SIZE))
    for n, row, j in np.ndindex(out.shape):
        i = row % SIZE
        if j <= i:
            out[n, row, j] = np.sum(np.asarray(query, np.float64)[n, row] * key[n, j] * np.exp(g[n, j + 1 : i + 1].sum(0)))
    return out, np.exp(np.cumsum(g, 1))


@pytest.mark.parametrize("block", [1, 4, SIZE])
@pytest.mark.parametrize("channels", [1, HEAD])
def test_every_strength_of_decay_to_rounding(channels, block):
    # Where nearly everything is forgotten, exponents are so large that a difference of two of them would have no correct digit.
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.normal(size=(CHUNKS, rows, HEAD)), jnp.float32) for rows in (GROUPS * SIZE, SIZE))
    log_decay = random.choice(np.array([0, -1e-6, np.log(0.9), np.log(1e-4), -80, -1e4, -1e30, -np.inf], np.float32), (CHUNKS, SIZE, channels))
    given = jnp.asarray(log_decay if channels > 1 else log_decay.swapaxes(1, 2))
    got = jax.jit(partial(linear_tile.weigh, block=block))(query, key, given)
    scores, since = written_out(query, key, log_decay)
    np.testing.assert_allclose(got.scores, scores, atol=2e-6)
    np.testing.assert_allclose(got.query, np.tile(since, (1, GROUPS, 1)) * query, atol=2e-6)
    np.testing.assert_allclose(jnp.exp(got.total[:, 0]), since[:, -1, :channels], atol=2e-6)
    # the keys until the end are what a query of ones in the last token sees
    ones = jnp.ones_like(query)
    last = jax.jit(partial(linear_tile.weigh, block=block))(ones, key, given).scores[:, SIZE - 1]
    np.testing.assert_allclose(got.key.sum(2), last, atol=5e-6)
