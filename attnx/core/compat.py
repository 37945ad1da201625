"""The few places where supported versions of jax differ."""

import jax
from jax import lax

from pallas_kernels.compat import varying_axes


def vary(tree, axes: frozenset):
    """The arrays marked as varying over ``axes``: what a loop's first carry must be when its body makes it so."""
    def mark(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def psum_like(x, like):
    """A gradient summed over the axes over which it varies but the array it belongs to does not."""
    extra = tuple(sorted(varying_axes(x) - varying_axes(like)))
    return lax.psum(x, extra) if extra else x
