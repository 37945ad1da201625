"""Neighbourhood attention in images: each pixel attends to the window around it, shifted inside at borders, with a bias for each difference of places; dilated too.

Hassani, Walton, Li, Li, Shi: "Neighborhood Attention Transformer" (CVPR 2023, arXiv 2204.07143); Hassani, Shi: "Dilated Neighborhood Attention Transformer" (2022, arXiv
2209.15001). In each dimension, of n places with dilation d, the token at i stands at i' = i div d among the n' of its residue class i mod d, and

    keys of i:      j' = start .. start + w - 1 of the same class,      start = clamp(i' - w div 2, 0, n' - w)
    out_i = sum_j softmax_j(q_i . k_j / sqrt(H) + B[n, j' - i' + w - 1]) v_j        over the keys of all dimensions

Every token has all w^dims keys, at borders too. w = n is full attention, w = 1 returns values. Alternating d = 1 with a large d lets the field of view grow
exponentially with depth.

:func:`attnx.masks.neighborhood_attention` does it by tiles; here are the form in two steps, which holds all weights, the layer and the block of the models.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.masks.grid import Neighborhood, Sizes, neighborhood, neighborhood_attention
from attnx.nn import make_norm


def _places(mask: Neighborhood):
    """Of a grid's tokens by rows, [T, P]: which tokens they see and which entries of a table of biases those have."""
    keys, entries = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)
    for n, d, w in zip(mask.query_order.grid, mask.query_order.dilation, mask.window):
        place, own = np.arange(n)[:, None] // d, np.arange(n)[:, None] % d
        seen = np.clip(place - w // 2, 0, (n - own + d - 1) // d - w) + np.arange(w)

        def outer(before, size, now):
            return (before[:, None, :, None] * size + now[None, :, None, :]).reshape(len(before) * n, -1)

        keys, entries = outer(keys, n, seen * d + own), outer(entries, 2 * w - 1, seen - place + w - 1)
    return keys, entries


def _check_grid(name, x, window, dilation):
    if x.ndim < 4:
        raise ValueError(f"{name}: expected [B, *grid, N, H], got {x.shape}")
    return neighborhood(x.shape[1:-2], window, dilation=dilation)


def neighborhood_qk(query: Float[Array, "B *grid N H"], key: Float[Array, "B *grid K H"], window: Sizes, *, dilation: Sizes = 1,
                    bias: Float[Array, "N ..."] | None = None, scale: float | None = None) -> Float[Array, "B *grid N P"]:
    """Scores of each token with its neighbourhood: the first of two steps, between which weights can be looked at.

    ::

        s_ip = scale q_i . k_j(i, p) + bias[n, j' - i' + w - 1],        j(i, p) the p-th key of i's neighbourhood, by rows

    Args:
      query: [B, *grid, N, H], a grid of 1 to 3 dimensions.
      key: [B, *grid, K, H], N a multiple of K.
      window: keys in each dimension; an integer, or one a dimension.
      dilation: likewise, at most size // window.
      bias: [N, 2 w - 1, ...], one axis a dimension.
      scale: 1 / sqrt(H) by default.

    Returns:
      [B, *grid, N, P], P the product of the window's sizes.

    Raises:
      ValueError: for shapes that do not match, and a grid smaller than window times dilation.

    Cost: O(B T P N H) time, O(B T P K H) memory.

    >>> x = jnp.ones((1, 5, 6, 2, 4))
    >>> neighborhood_qk(x, x, 3).shape
    (1, 5, 6, 2, 9)
    """
    mask = _check_grid("query", query, window, dilation)
    if key.shape[:-2] != query.shape[:-2] or key.shape[-1] != query.shape[-1] or query.shape[-2] % key.shape[-2]:
        raise ValueError(f"key: expected [B, *grid, K, H] for query {query.shape}, K a divisor of N, got {key.shape}")
    (batch, *grid, heads, size), kv_heads = query.shape, key.shape[-2]
    index, entries = _places(mask)
    q, k = query.reshape(batch, -1, kv_heads, heads // kv_heads, size), key.reshape(batch, -1, kv_heads, size)[:, index]
    s = jnp.einsum("btkgh,btpkh->btkgp", q, k).reshape(batch, *grid, heads, -1) * (size ** -0.5 if scale is None else scale)
    if bias is None:
        return s
    expected = (heads, *(2 * w - 1 for w in mask.window))
    if jnp.shape(bias) != expected:
        raise ValueError(f"bias: expected shape {expected} for {heads} heads and window {mask.window}, got {jnp.shape(bias)}")
    return s + bias.reshape(heads, -1)[:, entries].transpose(1, 0, 2).reshape(*grid, heads, -1).astype(s.dtype)


def neighborhood_av(weights: Float[Array, "B *grid N P"], value: Float[Array, "B *grid K Hv"], window: Sizes, *, dilation: Sizes = 1) -> Float[Array, "B *grid N Hv"]:
    """The values of each token's neighbourhood, weighted: the second of two steps.

    Args:
      weights: [B, *grid, N, P], in the order of :func:`neighborhood_qk`.
      value: [B, *grid, K, Hv], N a multiple of K.
      window, dilation: as there.

    Returns:
      [B, *grid, N, Hv].

    >>> x = jnp.ones((1, 5, 6, 2, 4))
    >>> bool(jnp.allclose(neighborhood_av(jax.nn.softmax(neighborhood_qk(x, x, 3)), x, 3), x))
    True
    """
    index, _ = _places(_check_grid("value", value, window, dilation))
    if weights.shape[:-2] != value.shape[:-2] or weights.shape[-1] != index.shape[1] or weights.shape[-2] % value.shape[-2]:
        raise ValueError(f"weights: expected [B, *grid, N, {index.shape[1]}] for value {value.shape}, N a multiple of K, got {weights.shape}")
    (batch, *grid, heads, _), kv_heads = weights.shape, value.shape[-2]
    v = value.reshape(batch, -1, kv_heads, value.shape[-1])[:, index]
    return jnp.einsum("btkgp,btpkv->btkgv", weights.reshape(batch, v.shape[1], kv_heads, heads // kv_heads, -1), v).reshape(batch, *grid, heads, -1)


def dilation_partition(x: Float[Array, "B ..."], dilation: Sequence[int]) -> list[Float[Array, "B ..."]]:
    """The residue classes of a grid, one after another, by rows: grids of their own, some of them smaller by one where the dilation does not divide the size.

    Args:
      x: [B, *grid, ...].
      dilation: one a dimension of the grid.

    >>> [part.tolist() for part in dilation_partition(jnp.arange(5).reshape(1, 5), (2,))]
    [[[0, 2, 4]], [[1, 3]]]
    """
    _check_dilation(x, dilation)
    return [x[:, *(slice(c, None, d) for c, d in zip(residues, dilation))] for residues in np.ndindex(*dilation)]


def dilation_merge(parts: Sequence[Float[Array, "B ..."]], dilation: Sequence[int]) -> Float[Array, "B ..."]:
    """The inverse of :func:`dilation_partition`.

    >>> x = jnp.arange(35).reshape(1, 5, 7)
    >>> bool((dilation_merge(dilation_partition(x, (2, 3)), (2, 3)) == x).all())
    True
    """
    if len(parts) != int(np.prod(dilation)):
        raise ValueError(f"parts: expected {int(np.prod(dilation))} for dilation {tuple(dilation)}, got {len(parts)}")
    dims = len(dilation)
    sizes = np.array([part.shape[1:1 + dims] for part in parts]).reshape(*dilation, dims)
    grid = [int(np.moveaxis(sizes[..., i], i, 0).reshape(d, -1)[:, 0].sum()) for i, d in enumerate(dilation)]
    first = parts[0]
    out = jnp.zeros((first.shape[0], *grid, *first.shape[1 + dims:]), first.dtype)
    for residues, part in zip(np.ndindex(*dilation), parts):
        out = out.at[:, *(slice(c, None, d) for c, d in zip(residues, dilation))].set(part)
    return out


def _check_dilation(x, dilation):
    if not dilation or x.ndim < 1 + len(dilation) or any(not 1 <= d <= n for d, n in zip(dilation, x.shape[1:])):
        raise ValueError(f"dilation: expected one of 1 .. size for each dimension of the grid of x {x.shape}, got {tuple(dilation)}")


class NeighborhoodAttention(nnx.Module):
    """Multi-head neighbourhood attention of a grid with relative biases.

    ::

        q, k, v = x W + b;      out = W_out concat_n(neighborhood_attention(q_n, k_n, v_n, bias_n))

    Args:
      features: D.
      num_heads: N, heads of size D / N.
      window: keys in each dimension; an integer, or one a dimension.
      dimensions: of the grid, 1 to 3.
      stride, dilation, is_causal: see :func:`attnx.masks.neighborhood`.
      use_bias: whether projections have biases.
      relative_bias: whether scores have, normal at the start, of standard deviation 0.02.
      implementation: as of :func:`attnx.attention`.
      dtype, param_dtype, rngs: as in Flax.

    >>> layer = NeighborhoodAttention(16, 2, 3, dilation=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 6, 7, 16))).shape
    (1, 6, 7, 16)
    """

    def __init__(self, features: int, num_heads: int, window: Sizes, *, dimensions: int = 2, stride: Sizes = 1, dilation: Sizes = 1,
                 is_causal: bool | Sequence[bool] = False, use_bias: bool = True, relative_bias: bool = True, implementation: str | None = None, dtype=None,
                 param_dtype=jnp.float32, rngs: nnx.Rngs):
        if features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        checks.check_integer("dimensions", dimensions, least=1, most=3)
        windows = (window,) * dimensions if isinstance(window, int) else tuple(window)
        if len(windows) != dimensions:
            raise ValueError(f"window: expected an integer or one for each of {dimensions} dimensions, got {window}")
        common: dict[str, Any] = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.features, self.num_heads, self.window, self.dimensions = features, num_heads, windows, dimensions
        self.stride, self.dilation, self.is_causal, self.implementation = stride, dilation, is_causal, implementation
        self.project, self.out = nnx.Linear(features, 3 * features, **common), nnx.Linear(features, features, **common)
        table = nnx.initializers.truncated_normal(0.02)
        self.bias = nnx.Param(table(rngs.params(), (num_heads, *(2 * w - 1 for w in windows)), param_dtype)) if relative_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "B *grid D"]) -> Float[Array, "B *grid D"]:
        """[B, *grid, D] to the same; a grid that is smaller than window times dilation raises, for padding would be attended to."""
        if x.ndim != 2 + self.dimensions or x.shape[-1] != self.features:
            raise ValueError(f"x: expected [B, *grid, {self.features}] with a grid of {self.dimensions} dimensions, got {x.shape}")
        query, key, value = (y.reshape(*x.shape[:-1], self.num_heads, -1) for y in jnp.split(self.project(x), 3, axis=-1))
        out = neighborhood_attention(query, key, value, self.window, stride=self.stride, dilation=self.dilation, is_causal=self.is_causal,
                                     bias=None if self.bias is None else self.bias[...], implementation=self.implementation)
        return self.out(out.reshape(x.shape))


class NATBlock(nnx.Module):
    """A pre-norm block of a grid.

    ::

        x <- x + gamma_1 attention(norm(x));      x <- x + gamma_2 W_2 gelu(W_1 norm(x))

    Args:
      features: D.
      attention: a module [B, *grid, D] -> the same, such as :class:`NeighborhoodAttention`.
      hidden: size of the hidden layer.
      drop_rate: the probability with which a sample leaves out a residual branch, where the call is given a key.
      layer_scale: what the gammas start at; None for none.
      dtype, param_dtype, rngs: as in Flax.

    >>> block = NATBlock(16, NeighborhoodAttention(16, 2, 3, rngs=nnx.Rngs(0)), 32, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 4, 5, 16))).shape
    (1, 4, 5, 16)
    """

    def __init__(self, features: int, attention: nnx.Module, hidden: int, *, drop_rate: float = 0.0, layer_scale: float | None = None, dtype=None,
                 param_dtype=jnp.float32, rngs: nnx.Rngs):
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.drop_rate, self.attention = checks.check_dropout_rate(drop_rate), attention
        self.attention_norm, self.mlp_norm = (make_norm("layer", features, **common) for _ in range(2))
        self.up, self.down = nnx.Linear(features, hidden, **common), nnx.Linear(hidden, features, **common)
        gamma = lambda: nnx.data(None) if layer_scale is None else nnx.Param(jnp.full(features, layer_scale, param_dtype))
        self.attention_scale, self.mlp_scale = gamma(), gamma()

    def __call__(self, x: Float[Array, "B *grid D"], *, dropout_key: Array | None = None) -> Float[Array, "B *grid D"]:
        """[B, *grid, D] to the same; ``dropout_key`` for stochastic depth."""
        first, second = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = x + self._branch(self.attention(self.attention_norm(x)), self.attention_scale, first)
        return x + self._branch(self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False)), self.mlp_scale, second)

    def _branch(self, x, gamma, key):
        x = x if gamma is None else x * gamma[...].astype(x.dtype)
        if key is None or not self.drop_rate:
            return x
        kept = jax.random.bernoulli(key, 1 - self.drop_rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(kept, x / (1 - self.drop_rate), 0)
