"""Means and spreads of pictures, and giving one picture those of another."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnx.core.checks import as_array, check_real, describe

EPSILON = 1e-5
"""Added to variances."""


def moments(x: Float[Array, "*B H W C"], where: Bool[Array, "*B H W"] | None = None) -> tuple[Float[Array, "*B 1 1 C"], Float[Array, "*B 1 1 C"]]:
    """The mean and the standard deviation ``sqrt(unbiased variance + 1e-5)`` of each channel, over the pixels of a mask; of the mask's one pixel, or of none,
    the variance is 0.

    Args:
      x: [..., H, W, C].
      where: booleans [..., H, W] that broadcast to the pixels; all by default.

    Returns:
      Two arrays [..., 1, 1, C], in float32 (float64 for float64).

    >>> import jax.numpy as jnp
    >>> mean, spread = moments(jnp.array([1.0, 3.0]).reshape(1, 2, 1))
    >>> f"{mean.item():.3f} {spread.item():.3f}"
    '2.000 1.414'
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    where = jnp.ones(x.shape[:-1], bool) if where is None else where
    weight = jnp.broadcast_to(where, x.shape[:-1])[..., None].astype(x.dtype)
    count = jnp.sum(weight, axis=(-3, -2), keepdims=True)
    mean = jnp.sum(weight * x, axis=(-3, -2), keepdims=True) / jnp.maximum(count, 1)
    variance = jnp.sum(weight * jnp.square(x - mean), axis=(-3, -2), keepdims=True) / jnp.maximum(count - 1, 1)
    return mean, jnp.sqrt(variance + EPSILON)


def adain(x: Float[Array, "*B H W C"], reference: Float[Array, "*B h w C"], *, mask: Bool[Array, "*B H W"] | None = None,
          reference_mask: Bool[Array, "*B h w"] | None = None) -> Float[Array, "*B H W C"]:
    """Adaptive instance normalisation: the mean and spread of each channel become those of a reference, inside masks if there are objects.

    ::

        mask * ((x - mean(x)) / std(x) * std(reference) + mean(reference)) + (1 - mask) * x              moments inside each one's mask

    Source: Xun Huang, Serge Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", 2017, arXiv:1703.06868; within masks,
    Yuval Alaluf, Daniel Garibi, Or Patashnik, Hadar Averbuch-Elor, Daniel Cohen-Or, "Cross-Image Attention for Zero-Shot Appearance Transfer", 2023,
    arXiv:2311.03335.

    Args:
      x: [..., H, W, C].
      reference: [..., h, w, C], of any size.
      mask: booleans [..., H, W]: the pixels that change, and whose moments are taken; all by default. The others stay bit for bit.
      reference_mask: booleans [..., h, w]: the pixels of the reference that count; where it has none, x stays.

    Returns:
      [..., H, W, C] in the dtype of x.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named.

    >>> import jax, jax.numpy as jnp
    >>> x, reference = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    >>> mean, _ = moments(adain(x, 2 * reference + 1))
    >>> bool(jnp.allclose(mean, 2 * reference.mean((0, 1)) + 1, atol=1e-5))
    True
    """
    x, reference = check_real("x", x), check_real("reference", reference)
    if x.ndim < 3:
        raise ValueError(f"x: expected shape [..., H, W, C], got {describe(x)}")
    if reference.ndim < 3 or reference.shape[-1] != x.shape[-1]:
        raise ValueError(f"reference: expected shape [..., h, w, C] with C = {x.shape[-1]} as in x, got {describe(reference)}")
    masks = []
    for name, given, picture in (("mask", mask, x), ("reference_mask", reference_mask, reference)):
        given = jnp.ones(picture.shape[:-1], bool) if given is None else as_array(name, given, "booleans")
        if given.dtype != bool:
            raise TypeError(f"{name}: expected booleans, got {describe(given)}")
        if given.shape[-2:] != picture.shape[-3:-1]:
            raise ValueError(f"{name}: expected shape [..., {picture.shape[-3]}, {picture.shape[-2]}], got {describe(given)}")
        masks.append(given)
    (mean, spread), (new_mean, new_spread) = moments(x, masks[0]), moments(reference, masks[1])
    changed = ((x - mean) / spread * new_spread + new_mean).astype(x.dtype)
    return jnp.where(masks[0][..., None] & jnp.any(masks[1], axis=(-2, -1))[..., None, None, None], changed, x)
