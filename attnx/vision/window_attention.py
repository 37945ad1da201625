"""Attention within windows that tile an image, shifted in every other block so that they mix, with a bias for each difference of places: the layer and block of Swin.

Liu et al.: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021, arXiv 2103.14030). Zhang: "Flash Window Attention: speedup the
attention computation for Swin Transformer" (2025, arXiv 2501.06480) computes it with whole maps on chip, here :func:`attnx.core.windows.window_attention`.

    out_i = sum over j in the window of i of softmax_j(q_i . k_j / sqrt(H) + B[(y_i - y_j + w - 1) (2 w - 1) + x_i - x_j + w - 1, n]) v_j

A shift by s rolls the image back before it is cut; what the roll brought together from opposite borders does not see each other. An image that windows do not tile
is padded at its end, and padding is not seen (released code for detection lets it be).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.core.axes import window_partition, window_regions, window_reverse
from attnx.core.windows import window_attention
from attnx.vision.neighborhood_attention import NATBlock


def relative_places(window: Sequence[int]) -> np.ndarray:
    """Which row of a table of biases the pairs of a window have, int [S, S], by rows: that of the query's place less the key's, in each dimension from 1 - w on.

    >>> relative_places((2, 1))
    array([[1, 0],
           [2, 1]])
    """
    places = np.stack(np.unravel_index(np.arange(math.prod(window)), tuple(window)))
    differences = places[:, :, None] - places[:, None] + np.array(window)[:, None, None] - 1
    return np.ravel_multi_index(tuple(differences), tuple(2 * w - 1 for w in window))


class WindowAttention(nnx.Module):
    """Multi-head attention within windows of a grid, with relative biases.

    ::

        q, k, v = x W + b;      out = W_out concat_n(window_attention(q_n, k_n, v_n, B_n))

    Args:
      features: D.
      num_heads: N, heads of size D / N.
      window: tokens of a window in each dimension; an integer, or one a dimension.
      shift: of the windows, likewise; Swin alternates 0 and ``window // 2``. A dimension no longer than its window is not shifted.
      dimensions: of the grid, 1 to 3.
      use_bias: whether projections have biases.
      relative_bias: whether scores have: a table [(2 w - 1) ..., N], normal at the start, of standard deviation 0.02.
      implementation: as of :func:`attnx.core.windows.window_attention`.
      dtype, param_dtype, rngs: as in Flax.

    >>> layer = WindowAttention(16, 2, 4, shift=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 6, 7, 16))).shape
    (1, 6, 7, 16)
    """

    def __init__(self, features: int, num_heads: int, window: int | Sequence[int], *, shift: int | Sequence[int] = 0, dimensions: int = 2, use_bias: bool = True,
                 relative_bias: bool = True, implementation: str | None = None, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        if features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        checks.check_integer("dimensions", dimensions, least=1, most=3)
        common: dict[str, Any] = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.features, self.num_heads, self.implementation = features, num_heads, implementation
        self.window, self.shift = (_per_dimension(name, x, dimensions, least) for name, x, least in (("window", window, 1), ("shift", shift, 0)))
        if any(s >= w for s, w in zip(self.shift, self.window)):
            raise ValueError(f"shift: expected less than the window {self.window}, got {self.shift}")
        self.project, self.out = nnx.Linear(features, 3 * features, **common), nnx.Linear(features, features, **common)
        rows = math.prod(2 * w - 1 for w in self.window)
        self.bias = nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (rows, num_heads), param_dtype)) if relative_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "B *grid D"]) -> Float[Array, "B *grid D"]:
        """[B, *grid, D] to the same."""
        if x.ndim != 2 + len(self.window) or x.shape[-1] != self.features:
            raise ValueError(f"x: expected [B, *grid, {self.features}] with a grid of {len(self.window)} dimensions, got {x.shape}")
        grid = x.shape[1:-1]
        shift = tuple(0 if n <= w else s for n, w, s in zip(grid, self.window, self.shift))
        tokens, regions = window_partition(self.project(x), self.window, shift=shift), window_regions(grid, self.window, shift=shift)
        query, key, value = (y.reshape(*tokens.shape[:2], self.num_heads, -1) for y in jnp.split(tokens, 3, axis=-1))
        bias = None if self.bias is None else jnp.moveaxis(self.bias[...][relative_places(self.window)], -1, 0)
        out = window_attention(query, key, value, bias=bias, regions=regions if regions.any() else None, implementation=self.implementation)
        return self.out(window_reverse(out.reshape(*tokens.shape[:2], -1), self.window, grid, shift=shift))


class SwinBlock(NATBlock):
    """A pre-norm block of a grid around attention within windows.

    ::

        x <- x + window attention(norm(x));      x <- x + W_2 gelu(W_1 norm(x))

    Args:
      features, num_heads, window, shift, dimensions, implementation: see :class:`WindowAttention`.
      hidden: size of the hidden layer; four times features by default.
      drop_rate: the probability with which a sample leaves out a residual branch, where the call is given a key.
      dtype, param_dtype, rngs: as in Flax.

    >>> block = SwinBlock(16, 2, 4, shift=2, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 8, 8, 16))).shape
    (1, 8, 8, 16)
    """

    def __init__(self, features: int, num_heads: int, window: int | Sequence[int], *, shift: int | Sequence[int] = 0, hidden: int | None = None, dimensions: int = 2,
                 drop_rate: float = 0.0, implementation: str | None = None, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        attention = WindowAttention(features, num_heads, window, shift=shift, dimensions=dimensions, implementation=implementation, **common)
        super().__init__(features, attention, 4 * features if hidden is None else hidden, drop_rate=drop_rate, **common)


def _per_dimension(name: str, value: int | Sequence[int], dimensions: int, least: int) -> tuple[int, ...]:
    values = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(values) != dimensions:
        raise ValueError(f"{name}: expected an integer or one for each of {dimensions} dimensions, got {value}")
    return tuple(checks.check_integer(name, x, least=least) for x in values)
