"""Smooth random fields on the sphere, known at every point: sums of Legendre polynomials about random axes, whose law does not change as the sphere is turned."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.geometry import sphere_quadrature


def points(latitudes: int, longitudes: int) -> np.ndarray:
    """Unit vectors of the equiangular grid, [latitudes, longitudes, 3]."""
    theta = sphere_quadrature(latitudes, longitudes)[0][:, None]
    lam = 2 * np.pi * np.arange(longitudes) / longitudes
    return np.stack(np.broadcast_arrays(np.sin(theta) * np.cos(lam), np.sin(theta) * np.sin(lam), np.cos(theta)), axis=-1)


def rotation(rng: np.random.Generator) -> np.ndarray:
    """A random one, [3, 3]."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def coefficients(key: jax.Array, degree: int, count: int, axes: int = 8) -> tuple[jax.Array, jax.Array]:
    """Of ``count`` fields of unit variance with degrees 1 to ``degree``: axes [count, degree, axes, 3] and amplitudes [count, degree, axes]."""
    direction, size = jax.random.split(key)
    directions = jax.random.normal(direction, (count, degree, axes, 3))
    directions /= jnp.linalg.norm(directions, axis=-1, keepdims=True)
    # the variance of P_l over the sphere is 1 / (2 l + 1)
    spread = jnp.sqrt((2 * jnp.arange(1, degree + 1) + 1) / (axes * degree))
    return directions, spread[:, None] * jax.random.normal(size, (count, degree, axes))


def _legendre(x, degree):
    """P_l and its derivative for l = 1..degree, stacked in front."""
    values, slopes = [jnp.ones_like(x), x], [jnp.zeros_like(x), jnp.ones_like(x)]
    for l in range(1, degree):
        values.append(((2 * l + 1) * x * values[l] - l * values[l - 1]) / (l + 1))
        slopes.append(slopes[l - 1] + (2 * l + 1) * values[l])
    return jnp.stack(values[1:]), jnp.stack(slopes[1:])


def field(axes: jax.Array, amplitudes: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A field and the squared norm of its gradient along the sphere at the points [..., 3]; axes [degree, n, 3], amplitudes [degree, n]."""
    cosine = jnp.einsum("lnc,...c->ln...", axes, at)
    values, slopes = _legendre(jnp.moveaxis(cosine, 0, -1), axes.shape[0])  # [l, n, ..., l']
    pick = lambda x: jnp.moveaxis(jnp.diagonal(x, axis1=0, axis2=-1), -1, 0)  # degree l of the axes of degree l
    slopes = pick(slopes)
    gradient = jnp.einsum("ln,ln...,lnc->...c", amplitudes, slopes, axes)
    gradient -= jnp.sum(gradient * at, axis=-1, keepdims=True) * at
    return jnp.einsum("ln,ln...->...", amplitudes, pick(values)), jnp.sum(gradient**2, axis=-1)
