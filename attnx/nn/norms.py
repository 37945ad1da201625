"""Normalisation by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.nn.common import logical_axes


def make_norm(kind: str | Callable[..., nnx.Module], features: int, *, axis: str = "embed", epsilon: float = 1e-6, dtype=None, param_dtype=jnp.float32,
              rngs: nnx.Rngs):
    """A normalisation over the last axis: one of Flax's, or your own.

    Args:
      kind: 'rms' (``x / rms(x) * scale``), 'layer' (``(x - mean) / std * scale + bias``), or a constructor that is called as
        ``kind(features, dtype=..., param_dtype=..., rngs=...)``.
      features: size of the last axis.
      axis: logical name of that axis.
      epsilon: added to the variance; your own constructor is not told.
      dtype, param_dtype, rngs: as in Flax.

    Returns:
      A module that maps [..., features] to the same.

    Raises:
      ValueError: for a name that is not known.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> make_norm('rms', 2, rngs=nnx.Rngs(0))(jnp.array([3.0, 3.0])).round(3).tolist()
      [1.0, 1.0]
    """
    common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    if callable(kind):
        return kind(features, **common)
    names = logical_axes(axis)
    if kind == "rms":
        return nnx.RMSNorm(features, epsilon=epsilon, scale_metadata=names, **common)
    if kind == "layer":
        return nnx.LayerNorm(features, epsilon=epsilon, scale_metadata=names, bias_metadata=names, **common)
    raise ValueError(f"norm: expected 'rms', 'layer' or a constructor, got {kind!r}")


class HeadNorm(nnx.Module):
    """RMS norm of each head, with gains of its own: ``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axis of [..., N, H], scale [N, H].

    Statistics are float32. Used where heads are normalised apart but scaled as one vector.

    Example:
      >>> import jax.numpy as jnp
      >>> HeadNorm(2, 4)(3 * jnp.ones((5, 2, 4)))[0, 0].round(3).tolist()
      [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, heads: int, head_size: int, *, epsilon: float = 1e-6, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None):
        del rngs  # nothing is random
        self.scale = nnx.Param(jnp.ones((heads, head_size), param_dtype), **logical_axes("heads", "head_size"))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x):
        """[..., N, H] to the same."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (normal * self.scale[...]).astype(self.dtype or x.dtype)
