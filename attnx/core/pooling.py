"""Average pooling to a given size, whatever the size of the input."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attnx.core.checks import check_integer, describe
from pallas_kernels.tile import accumulator_dtype


def pool_bins(length: int, bins: int) -> np.ndarray:
    """Which positions each bin averages: bin i those from floor(i length / bins) to ceil((i + 1) length / bins), so bins may overlap.

    Returns:
      bool [bins, length], a NumPy array.

    >>> pool_bins(3, 2).astype(int)
    array([[1, 1, 0],
           [0, 1, 1]])
    """
    check_integer("bins", bins, least=1)
    i, position = np.arange(bins)[:, None], np.arange(length)
    return (position >= i * length // bins) & (position < -(-(i + 1) * length // bins))


def adaptive_average_pool(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Averages the spatial axes over the bins of :func:`pool_bins`, to given sizes.

    Args:
      x: [B, *space, ...], one spatial axis for each of ``sizes``; what follows is kept.
      sizes: of the output's spatial axes.

    Returns:
      [B, *sizes, ...] in the dtype of x, averaged in at least float32.

    Raises:
      ValueError: fewer axes than sizes, or a size below 1.

    Cost: that of one matrix product an axis.

    >>> adaptive_average_pool(jnp.arange(8.0).reshape(1, 2, 4), (1, 2))
    Array([[[2.5, 4.5]]], dtype=float32)
    """
    if x.ndim < len(sizes) + 1:
        raise ValueError(f"x: expected shape [B, {len(sizes)} spatial axes, ...], got {describe(x)}")
    out = x.astype(accumulator_dtype(x.dtype))
    for axis, size in enumerate(sizes, start=1):
        bins = pool_bins(x.shape[axis], size)
        mean = jnp.asarray(bins / np.maximum(bins.sum(1, keepdims=True), 1), out.dtype)
        out = jnp.moveaxis(jnp.tensordot(mean, out, axes=(1, axis)), 0, axis)
    return out.astype(x.dtype)
