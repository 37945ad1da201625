"""Feature maps: what their dot products are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import linear


@pytest.mark.parametrize("size", [0, 1, 2, 5, 6])
def test_monomials(x64, size):
    """Each product once, and together the square of the dot product; Taylor features its polynomial."""
    q, k = jax.random.normal(jax.random.key(0), (2, 7, size))
    phi = linear.symmetric_monomials
    assert phi(q).shape == (7, size * (size + 1) // 2)
    s = q @ k.T
    np.testing.assert_allclose(phi(q) @ phi(k).T, s**2, atol=1e-12)
    for order, expected in ((1, 1 + 0.3 * s), (2, 1 + 0.3 * s + (0.3 * s) ** 2 / 2)):
        phi = linear.Taylor(order, 0.3)
        np.testing.assert_allclose(phi(q) @ phi(k).T, expected, atol=1e-12)
    assert linear.Taylor(2, 0.3) == phi and hash(linear.Taylor(2, 0.3)) == hash(phi)


def test_maps(x64):
    """elu + 1 is positive however small its argument; unit vectors have finite slopes at zero, where they stay zero."""
    x = jnp.array([-700.0, -1.0, 0.0, 3.0])
    np.testing.assert_allclose(linear.elu_plus_one(x), np.where(x > 0, x + 1, np.exp(x)), rtol=1e-15)
    assert (linear.elu_plus_one(x) > 0).all()
    x = jnp.array([[3.0, -4.0], [0.0, 0.0], [1e-9, 0.0]])
    np.testing.assert_allclose(linear.unit(x), [[0.6, -0.8], [0, 0], [1, 0]], atol=1e-15)
    assert jnp.isfinite(jax.jacobian(linear.unit)(x)).all()


def test_errors():
    with pytest.raises(ValueError, match="order: expected an integer from 1 to 2"):
        linear.Taylor(3)
    with pytest.raises(ValueError, match="scale: expected a positive number"):
        linear.Taylor(2, 0.0)
