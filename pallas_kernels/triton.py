"""Reading and writing matrices inside a Triton program, where every block has a power of two of rows and columns.

Arrays are handed over whole and addressed by the program. A matrix whose width is no power of two has a reference that is wider: columns beyond its own are
read as zeros, and never written.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles import power


def whole(x, width: int | None = None) -> pl.BlockSpec:
    """An array as every program sees it, its last axis as wide as said."""
    shape = (*x.shape[:-1], width or x.shape[-1])
    return pl.BlockSpec(shape, lambda *ids: (0,) * len(shape))


def wide(x) -> pl.BlockSpec:
    """A matrix as every program sees it: of a width that products take."""
    return whole(x, power(x.shape[-1]))


def load(ref, array, at, columns=slice(None)):
    """The block ``at`` (indices of all axes but the last) of a matrix with the shape of ``array``; ``columns``, a ``pl.ds``, of it alone."""
    mask = _inside(ref, array, columns)
    return ref[(*at, columns)] if mask is None else plgpu.load(ref.at[(*at, columns)], mask=mask, other=0)


def store(ref, array, x, at=None, columns=slice(None)):
    """Writes a block of a matrix with the shape of ``array``; ``at`` as for :func:`load`, the whole of it by default."""
    x, mask = x.astype(ref.dtype), _inside(ref, array, columns)
    if at is not None:
        columns = pl.ds(at[0] * 0, ref.shape[-1]) if columns == slice(None) else columns  # the interpreter wants all indices of one type
    if mask is None:
        ref[... if at is None else (*at, columns)] = x
    else:
        plgpu.store(ref if at is None else ref.at[(*at, columns)], x, mask=jnp.broadcast_to(mask, x.shape))


def _inside(ref, array, columns):
    """Which columns of the block the array has, [1, width]; None for all."""
    width = array.shape[-1]
    start, size = (0, ref.shape[-1]) if columns == slice(None) else (columns.start, columns.size)
    if (isinstance(start, int) and start + size <= width) or ref.shape[-1] == width:
        return None
    return start + lax.broadcasted_iota(jnp.int32, (1, size), 1) < width
