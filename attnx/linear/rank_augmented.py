"""RALA: linear attention of images whose rank is raised twice.

Fan, Huang, He: "Breaking the Low-Rank Dilemma of Linear Attention" (CVPR 2025, arXiv 2411.07635). The sum over keys of phi(k) v^T in linear attention has a low rank,
and so has what is read of it. With phi = elu + 1, over the N tokens of an image:

    weigh        e = softmax over tokens of (mean phi(q) . phi(k_n) / sqrt(H)),      k_n <- N e_n phi(k_n)         tokens that matter fill the sum
    attend       y_n = rope(phi(q_n)) . sum over m of rope(k_m) v_m^T / (phi(q_n) . sum over m of k_m)             the denominator unturned, hence positive
    modulate     out = W ((y + dwconv(v)) * o)            o linear in the input: a product of features has the product of ranks

Attention within an image, not causal. The released code adds 1e-6 to the mean denominator, which is never 0 here unless there is no token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnx.core import checks, linear
from attnx.core.attention import attention
from attnx.linear.feature_maps import elu_plus_one
from attnx.nn.norms import make_norm
from attnx.positions.axial import AxialRotary
from pallas_kernels.linear_tile import divide
from pallas_kernels.tile import accumulator_dtype


def token_weights(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], *, mask: Bool[Array, "B T"] | None = None,
                  scale: float | None = None) -> Float[Array, "B T K"]:
    """How much each token adds to the sum over keys, 1 on average: ``N softmax over tokens of (scale mean q . k_n)``.

    Args:
      query, key: features [B, T, N, H] and [B, T, K, H], N a multiple of K; the mean is over tokens and the heads of a group.
      mask: booleans [B, T], the tokens that are there; the others weigh nothing.
      scale: 1 / sqrt(H) by default.

    >>> token_weights(jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4, 1, 2)))[0, :, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    scale, heads = checks.check_scale(scale, key.shape[3]), key.shape[2]
    seen = jnp.ones(key.shape[:2], bool) if mask is None else mask
    seen, wide = seen[..., None], accumulator_dtype(query.dtype)
    count = seen.sum(1, keepdims=True).astype(wide)
    groups = query.astype(wide).reshape(*query.shape[:2], heads, -1, query.shape[3]).mean(3)
    mean = jnp.sum(jnp.where(seen[..., None], groups, 0), axis=1) / jnp.maximum(count, 1)
    score = jnp.where(seen, scale * jnp.einsum("bkh,btkh->btk", mean, key.astype(wide)), -1e30)
    return jnp.where(seen, count * jax.nn.softmax(score, axis=1), 0)


def rala(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], *, position: Callable | None = None, augment_kv: bool = True,
         mask: Bool[Array, "B T"] | None = None, scale: float | None = None, implementation: str | None = None) -> Float[Array, "B T N Hv"]:
    """Linear attention among the tokens of an image, weighed by how well they agree with the mean query.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H], N a multiple of K.
      value: [B, T, K, Hv].
      position: ``(query, key, None, None) -> (query, key)`` of the features in the numerator, such as :class:`attnx.positions.AxialRotary`.
      augment_kv: weigh tokens; otherwise all count alike.
      mask: booleans [B, T], the tokens that are there.
      scale: of the scores of tokens, 1 / sqrt(H) by default.
      implementation: "parallel" or "chunked", as for :func:`attnx.linear_attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype; 0 for tokens that are not there.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: an implementation that cannot serve.

    Cost: O(T H Hv) time a head, no array of T x T.

    Source: Qihang Fan, Huaibo Huang, Ran He, "Breaking the Low-Rank Dilemma of Linear Attention", 2025, arXiv 2411.07635.

    >>> import attnx
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
    >>> plain = attnx.linear_attention(q, k, v, is_causal=False, normalize=True, feature_map=attnx.linear.elu_plus_one)
    >>> bool(jnp.allclose(rala(q, k, v, augment_kv=False), plain, atol=1e-6))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    (b, t, n, _), dtype, wide = query.shape, query.dtype, accumulator_dtype(query.dtype)
    if key.shape[1] != t:
        raise ValueError(f"key: expected the query's length {t}, tokens of one image, got {checks.describe(key)}")
    if mask is not None:
        mask = checks.as_array("mask", mask, "booleans")
        if mask.shape != (b, t) or mask.dtype != bool:
            raise ValueError(f"mask: expected booleans {[b, t]}, got {checks.describe(mask)}")
    query, key = (elu_plus_one(x.astype(wide)) for x in (query, key))
    if augment_kv:
        key = key * token_weights(query, key, mask=mask, scale=scale)[..., None]
    elif mask is not None:
        key = jnp.where(mask[..., None, None], key, 0)
    total = jnp.repeat(key.sum(1), n // key.shape[2], axis=1)
    denominator = jnp.einsum("btnh,bnh->btn", query, total)[..., None]
    turned = (query, key) if position is None else position(query, key, None, None)
    numerator = linear.linear_attention(*(x.astype(dtype) for x in turned), value, is_causal=False, key_mask=mask, implementation=implementation)
    out = divide(numerator.astype(wide), denominator)
    return (out if mask is None else jnp.where(mask[..., None, None], out, 0)).astype(dtype)


class Rank(NamedTuple):
    """Of matrices: the number of singular values above a thousandth of the largest, and ``exp`` of the entropy of their shares, each [...]."""

    numerical: Array
    effective: Float[Array, "*B"]


def _rank(matrix):
    values = jnp.linalg.svd(matrix.astype(accumulator_dtype(matrix.dtype)), compute_uv=False)
    share = values / jnp.maximum(values.sum(-1, keepdims=True), jnp.finfo(values.dtype).tiny)
    return Rank(jnp.sum(values > 1e-3 * values[..., :1], axis=-1), jnp.exp(jnp.sum(jax.scipy.special.entr(share), axis=-1)))


def kv_rank(key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"]) -> Rank:
    """The rank of the sum over tokens of keys' features times values, [H, Hv] for each image and head.

    >>> kv_rank(jnp.ones((1, 5, 1, 4)), jnp.ones((1, 5, 1, 4))).numerical.tolist()
    [[1]]
    """
    return _rank(jnp.einsum("btkh,btkv->bkhv", key, value))


def output_rank(out: Float[Array, "*B T D"]) -> Rank:
    """The rank of outputs, as matrices [T, D] of tokens by channels.

    >>> output_rank(jnp.eye(4)).numerical.item(), round(float(output_rank(jnp.eye(4)).effective), 3)
    (4, 4.0)
    """
    return _rank(out)


class _Modulated(nnx.Module):
    """Attention among the pixels of an image, with a convolution of the values beside it and a product with the input behind it; subclasses attend."""

    def __init__(self, features: int, num_heads: int, *, convolve: bool = True, modulate: bool = True, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        if features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_heads, self.modulate = num_heads, modulate
        self.project = nnx.Linear(features, (4 if modulate else 3) * features, **common)
        self.near = nnx.Conv(features, features, (5, 5), feature_group_count=features, **common) if convolve else nnx.data(None)
        self.out = nnx.Linear(features, features, **common)

    def attend(self, query, key, value, width: int):
        """[B, T, N, H] three times to the same, T tokens of an image of a width."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """[B, h, w, D] to the same."""
        if x.ndim != 4:
            raise ValueError(f"x: expected shape [B, h, w, D], got {x.shape}")
        *parts, last = jnp.split(self.project(x), 4 if self.modulate else 3, axis=-1)
        query, key, value = parts if self.modulate else (*parts, last)
        heads = lambda y: y.reshape(y.shape[0], -1, self.num_heads, y.shape[3] // self.num_heads)
        y = self.attend(*map(heads, (query, key, value)), x.shape[2]).reshape(x.shape)
        y = y if self.near is None else y + self.near(value)
        return self.out(y * last if self.modulate else y)


class RALA2d(_Modulated):
    """:func:`rala` among the pixels of an image, in its layer.

    ::

        q, k, v, o = x W;      out = W_out ((rala(q, k, v) + dwconv5x5(v)) * o)

    Args:
      features: D, of the input and of the output.
      num_heads: N, heads of size D / N, a multiple of 4 with ``rotate``.
      augment_kv: whether tokens are weighed.
      modulate: whether there is o.
      convolve: whether there is the convolution.
      rotate: whether queries and keys turn with row and column.
      dtype, param_dtype, rngs: as in Flax.

    >>> layer = RALA2d(16, 2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 4, 5, 16))).shape
    (1, 4, 5, 16)
    """

    def __init__(self, features: int, num_heads: int, *, augment_kv: bool = True, modulate: bool = True, convolve: bool = True, rotate: bool = True, rngs: nnx.Rngs,
                 **options):
        super().__init__(features, num_heads, modulate=modulate, convolve=convolve, rngs=rngs, **options)
        self.augment_kv, self.rotate = augment_kv, rotate

    def attend(self, query, key, value, width):
        return rala(query, key, value, position=AxialRotary(width) if self.rotate else None, augment_kv=self.augment_kv)


class SoftmaxModulated2d(_Modulated):
    """Softmax attention among the pixels of an image in the same layer, for stages with few of them.

    Args: as for :class:`RALA2d`, without ``augment_kv``.

    >>> layer = SoftmaxModulated2d(16, 2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 4, 5, 16))).shape
    (1, 4, 5, 16)
    """

    def __init__(self, features: int, num_heads: int, *, modulate: bool = True, convolve: bool = True, rotate: bool = True, rngs: nnx.Rngs, **options):
        super().__init__(features, num_heads, modulate=modulate, convolve=convolve, rngs=rngs, **options)
        self.rotate = rotate

    def attend(self, query, key, value, width):
        query, key = AxialRotary(width)(query, key) if self.rotate else (query, key)
        return attention(query, key, value)


class RavltBlock(nnx.Module):
    """The block of RAVLT: positions by convolution, attention, and a feed-forward network with a convolution inside.

    ::

        x <- x + dwconv3x3(x);      x <- x + gamma_1 attention(norm(x));      x <- x + gamma_2 W_2 (h + dwconv3x3(h)),  h = gelu(W_1 norm(x))

    Args:
      features: D.
      attention: a module [B, h, w, D] -> [B, h, w, D], such as :class:`RALA2d`.
      hidden: size of the hidden layer.
      drop_rate: the probability with which a sample leaves out a residual branch, where the call is given a key.
      layer_scale: what the gammas start at; None for none.
      dtype, param_dtype, rngs: as in Flax.

    >>> block = RavltBlock(16, RALA2d(16, 2, rngs=nnx.Rngs(0)), 32, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 4, 5, 16))).shape
    (1, 4, 5, 16)
    """

    def __init__(self, features: int, attention: nnx.Module, hidden: int, *, drop_rate: float = 0.0, layer_scale: float | None = 1.0, dtype=None, param_dtype=jnp.float32,
                 rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        depthwise = lambda size: nnx.Conv(size, size, (3, 3), feature_group_count=size, **common)
        self.drop_rate, self.attention = checks.check_dropout_rate(drop_rate), attention
        self.position, self.mix = depthwise(features), depthwise(hidden)
        self.attention_norm, self.mlp_norm = (make_norm("layer", features, **common) for _ in range(2))
        self.up, self.down = nnx.Linear(features, hidden, **common), nnx.Linear(hidden, features, **common)
        gamma = lambda: nnx.data(None) if layer_scale is None else nnx.Param(jnp.full(features, layer_scale, param_dtype))
        self.attention_scale, self.mlp_scale = gamma(), gamma()

    def __call__(self, x: Float[Array, "B h w D"], *, dropout_key: Array | None = None) -> Float[Array, "B h w D"]:
        """[B, h, w, D] to the same; ``dropout_key`` for stochastic depth."""
        first, second = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = x + self.position(x)
        x = x + self._branch(self.attention(self.attention_norm(x)), self.attention_scale, first)
        hidden = jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False)
        return x + self._branch(self.down(hidden + self.mix(hidden)), self.mlp_scale, second)

    def _branch(self, x, gamma, key):
        x = x if gamma is None else x * gamma[...].astype(x.dtype)
        if key is None or not self.drop_rate:
            return x
        kept = jax.random.bernoulli(key, 1 - self.drop_rate, (x.shape[0], 1, 1, 1))
        return jnp.where(kept, x / (1 - self.drop_rate), 0)
