"""The data of the claims about weights: what is asked for is there to be found."""

import jax
import numpy as np

from experiments.tasks import differences, planted


def test_differences():
    """The answer is the value of the key that is named first less that of the second; every key is there once."""
    x, answers = map(np.asarray, differences.sampler(5)(jax.random.key(0)))
    n = differences.PAIRS
    assert x.shape == (5, n + 1, differences.FEATURES)
    keys, values = x[:, :n, :n], x[:, :n, 3 * n:]
    np.testing.assert_array_equal(np.sort(keys.argmax(-1)), np.broadcast_to(np.arange(n), (5, n)))
    first, second = x[:, n, n:2 * n], x[:, n, 2 * n:3 * n]
    assert (first.argmax(-1) != second.argmax(-1)).all()
    found = [np.einsum("bk,bpk,bpv->bv", asked, keys, values) for asked in (first, second)]
    np.testing.assert_allclose(found[0] - found[1], answers, atol=1e-6)


def test_planted():
    """Without noise the query lies in the span of the planted keys, whose values' mean is the answer."""
    query, keys, values, answers = map(np.asarray, planted.sampler(2, 3, noise=0.0)(jax.random.key(0)))
    np.testing.assert_allclose(query * 2**0.5, keys[:, :2].sum(1), atol=1e-5)
    np.testing.assert_allclose(answers, values[:, :2].mean(1), atol=1e-6)
    assert planted.sampler(1, 3)(jax.random.key(0))[0].shape == (3, 8)
