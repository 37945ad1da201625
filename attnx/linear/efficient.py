"""Efficient attention: keys and values first, into a few global vectors, then queries.

Shen, Zhang, Zhao, Yi, Li: "Efficient Attention: Attention with Linear Complexities" (WACV 2021, arXiv 1812.01243):

    out = rho_q(Q) (rho_k(K)^T V)                       the product in brackets is [H, Hv]: one vector a channel of the keys, of any number of tokens

    "softmax":  rho_q: softmax over the channels of each query,  rho_k: softmax over the positions of each channel of the keys
    "scale":    rho_q(Q) = Q / sqrt(n),  rho_k(K) = K / sqrt(n):  dot products divided by the number of keys, exactly

There is neither a scale of the dot product nor a denominator: with softmaxes the weights rho_q(Q) rho_k(K)^T sum to 1 by themselves, but each is a mixture of H
distributions over positions, not softmax attention. Made for feature maps of many pixels, where pairs do not fit into memory. Causal (an extension), the keys'
softmax is over each token's past.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks, linear
from attnx.linear.softmax_over_positions import PositionSoftmaxState, channel_softmax, position_softmax_attention, position_softmax_init
from attnx.nn.common import logical_axes

NORMS = ("softmax", "scale")


def efficient_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *, norm: str = "softmax",
                        key_positions: Int[Array, "*B S"] | None = None, implementation: str | None = None) -> Float[Array, "B T N Hv"]:
    """Attention through global vectors, self or cross.

    ::

        out_t = sum over channels c of  softmax_c(q_tc)  sum over s of softmax_s(k_sc) v_s             norm = "softmax"
        out_t = 1/n sum over s of (q_t . k_s) v_s,      n keys                                         norm = "scale"

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      norm: "softmax" or "scale".
      key_positions: int32 [S] or [B, S]; -1 is padding, which has no weight and does not count. Where all is padding the output is zero.
      implementation: 'parallel' (all pairs) or 'chunked', as in :func:`attnx.linear_attention`; None for the latter.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O((T + S) H Hv) time a head and O((T + S) (H + Hv) + H Hv) memory.

    Source: Zhuoran Shen, Mingyuan Zhang, Haiyu Zhao, Shuai Yi, Hongsheng Li, "Efficient Attention: Attention with Linear Complexities", 2021, arXiv 1812.01243.

    >>> import jax.numpy as jnp
    >>> value = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    >>> efficient_attention(jnp.ones((1, 2, 1, 4)), jnp.ones((1, 3, 1, 4)), value)[0, :, 0, 0].round(3)
    Array([4., 4.], dtype=float32)
    """
    _check_norm(norm)
    if norm == "softmax":
        return position_softmax_attention(channel_softmax(query), key, value, is_causal=False, key_positions=key_positions, implementation=implementation)
    query, key, value = checks.check_query_key_value(query, key, value)
    batch, length = key.shape[:2]
    key_positions = checks.check_positions("key_positions", key_positions, batch, length)
    seen = jnp.ones((batch, length), bool) if key_positions is None else jnp.broadcast_to(key_positions, (batch, length)) >= 0
    count = jnp.maximum(seen.sum(1), 1).astype(jnp.promote_types(query.dtype, jnp.float32))[:, None, None, None]
    value = jnp.where(seen[..., None, None], value / count, 0).astype(value.dtype)  # divided here, so that sums in 16 bits do not overflow
    return linear.linear_attention(query, key, value, is_causal=False, implementation=implementation)


def _check_norm(norm):
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")


def efficient_attention_causal(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], **options):
    """:func:`efficient_attention` with softmaxes, of each token's past.

    ::

        out_t = sum over c of  softmax_c(q_tc)  sum over s <= t of  e^(k_sc) v_s / sum over s <= t of e^(k_sc)

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H], N a multiple of K.
      value: [B, T, K, Hv].
      **options: key_positions, segment_ids, initial_state, return_state, chunk_size, implementation, axis_name as in
        :func:`attnx.linear.position_softmax_attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype; with ``return_state`` a pair with the state. The last row is that of :func:`efficient_attention`.

    Cost: O(T H (C + Hv)) time a head with chunks of C tokens.

    >>> import jax.numpy as jnp
    >>> value = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    >>> efficient_attention_causal(jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4)), value)[0, :, 0, 0].round(3)
    Array([1., 2., 4.], dtype=float32)
    """
    return position_softmax_attention(channel_softmax(query), key, value, **options)


def efficient_init(batch: int, heads: int, key_size: int, value_size: int, *, dtype=jnp.float32) -> PositionSoftmaxState:
    """The state of :func:`efficient_attention_causal` before the first token, [B, K, H, Hv] and [B, K, H] whatever the length.

    >>> efficient_init(1, 2, 8, 4).mean.shape
    (1, 2, 8, 4)
    """
    return position_softmax_init(batch, heads, key_size, value_size, dtype=dtype)


def efficient_step(state: PositionSoftmaxState, query: Float[Array, "B t N H"], key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"],
                   **options) -> tuple[PositionSoftmaxState, Float[Array, "B t N Hv"]]:
    """The next t tokens of :func:`efficient_attention_causal`: ``(state, out)``. O(H Hv) a token and head.

    >>> import jax.numpy as jnp
    >>> state, x = efficient_init(1, 1, 1, 1), jnp.ones((1, 1, 1, 1))
    >>> for number in (1.0, 3.0):
    ...     state, out = efficient_step(state, x, x, number * x)
    >>> round(out.item(), 3)
    2.0
    """
    out, state = efficient_attention_causal(query, key, value, initial_state=state, return_state=True, **options)
    return state, out


class EfficientAttention2d(nnx.Module):
    """The paper's module for feature maps: :func:`efficient_attention` between all pixels, added to its input.

    ::

        out = x + W_o heads(efficient_attention(x W_q, x W_k, x W_v))                   1x1 convolutions with biases

    Args:
      in_channels: C of the map.
      key_channels: of queries and keys, of all heads together.
      value_channels: of values, of all heads together; as ``key_channels`` by default.
      num_heads: a divisor of both.
      norm: as in :func:`efficient_attention`.
      dtype, param_dtype: of the computation and of the parameters.
      rngs: the generator of initial values.

    >>> layer = EfficientAttention2d(8, key_channels=4, num_heads=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 6, 8))).shape
    (1, 5, 6, 8)
    """

    def __init__(self, in_channels: int, *, key_channels: int, value_channels: int | None = None, num_heads: int = 1, norm: str = "softmax", dtype: Any = None,
                 param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        value_channels = key_channels if value_channels is None else value_channels
        for name, channels in (("key_channels", key_channels), ("value_channels", value_channels)):
            if channels % num_heads:
                raise ValueError(f"{name}: expected a multiple of num_heads = {num_heads}, got {channels}")
        _check_norm(norm)
        self.in_channels, self.norm = in_channels, norm
        dense = partial(nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = lambda size: dense(in_channels, (num_heads, size // num_heads), kernel_metadata=logical_axes("embed", "heads", "head_size"),
                                     bias_metadata=logical_axes("heads", "head_size"))
        self.query, self.key, self.value = project(key_channels), project(key_channels), project(value_channels)
        self.out = dense((num_heads, value_channels // num_heads), in_channels, axis=(-2, -1), kernel_metadata=logical_axes("heads", "head_size", "embed"),
                         bias_metadata=logical_axes("embed"))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """[B, h, w, C] -> [B, h, w, C]."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"x: expected shape [B, h, w, {self.in_channels}], got {checks.describe(x)}")
        tokens = x.reshape(x.shape[0], -1, self.in_channels)
        found = efficient_attention(self.query(tokens), self.key(tokens), self.value(tokens), norm=self.norm)
        return x + self.out(found).reshape(x.shape)
