"""Spectra of attention matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import analysis


def test_spectrum():
    """The share that the best matrix of each rank keeps, as NumPy has it; a matrix of rank 2 is whole at 2; zeros have none."""
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 6, 5)), -1)
    values = np.linalg.svd(np.asarray(weights), compute_uv=False)
    np.testing.assert_allclose(analysis.spectrum(weights), values.cumsum(-1) / values.sum(-1, keepdims=True), atol=1e-5)
    low = weights[0, :, :2] @ weights[1, :2]
    np.testing.assert_allclose(analysis.spectrum(low)[1:], 1, atol=1e-5)
    assert not analysis.spectrum(jnp.zeros((2, 2))).any()
    with pytest.raises(ValueError, match="weights: expected shape"):
        analysis.spectrum(jnp.ones(3))
