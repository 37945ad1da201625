"""Localized filtering: queries and keys are made of tokens that two short causal convolutions have mixed with the two before; values are not.

Wu, Zhao, Wang, Luo, Li, Chen, Zhao, Wang, and others: "YUAN 2.0: A Large Language Model with Localized Filtering-based Attention" (2023, arXiv 2311.15786):

    c_t = W1a x_(t-1) + W1b x_t + b1         D -> D/2
    u_t = W2a c_(t-1) + W2b c_t + b2         D/2 -> D
    y_t = RMSNorm(u_t + x_t),                q, k = y W_Q, y W_K,        v = x W_V

Softmax attention with rotary positions follows. Nearby words thus match as phrases. Before the first token x and c are 0 (c is not b1). All engines of attention
serve, for only the projections change.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.masks.causal import causal
from attnx.mechanism import Mechanism, pairs
from attnx.nn.attention import Attention
from attnx.nn.block import TransformerBlock
from attnx.nn.common import logical_axes
from attnx.nn.mlp import MLP
from attnx.positions.rotary import Rotary


class Filter(NamedTuple):
    """The parameters of :func:`localized_filter`, of g groups of channels.

    Attributes:
      first: [2, D / g, M], W1a and W1b; M is D / 2 in the paper.
      first_bias: [M].
      second: [2, M / g, D], W2a and W2b.
      second_bias: [D].
      scale: [D], of the norm.
    """

    first: Float[Array, "2 E M"]
    first_bias: Float[Array, " M"]
    second: Float[Array, "2 F D"]
    second_bias: Float[Array, " D"]
    scale: Float[Array, " D"]


class FilterState(NamedTuple):
    """The last token and what the first convolution made of it; 0 before the first token."""

    token: Float[Array, "B D"]
    hidden: Float[Array, "B M"]


def localized_filter_init(batch: int, params: Filter, dtype=jnp.float32) -> FilterState:
    """The state before the first token."""
    return FilterState(jnp.zeros((batch, len(params.scale)), dtype), jnp.zeros((batch, len(params.first_bias)), dtype))


def localized_filter(x: Float[Array, "B T D"], params: Filter, state: FilterState | None = None, *, positions: Int[Array, "*B T"] | None = None,
                     segment_ids: Int[Array, "B T"] | None = None, epsilon: float = 1e-6) -> tuple[Float[Array, "B T D"], FilterState]:
    """Two causal convolutions of two taps over time with nothing between, a residual and a norm; y_t depends on x_(t-2), x_(t-1) and x_t.

    ::

        c_t = W1a x_(t-1) + W1b x_t + b1,       u_t = W2a c_(t-1) + W2b c_t + b2,       y_t = RMSNorm(u_t + x_t)

    Args:
      x: [B, T, D].
      params: see :class:`Filter`.
      state: what came before, as returned; nothing by default.
      positions: int32 [T] or [B, T]; a token after padding (-1) is a first token.
      segment_ids: int32 [B, T]; so is the first of each document.
      epsilon: added to the mean square in the norm.

    Returns:
      ``(y [B, T, D] in the dtype of x, the state after the last token)``.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named.

    Cost: O(T D M / g).

    >>> params = Filter(jnp.zeros((2, 4, 2)), jnp.zeros(2), jnp.zeros((2, 2, 4)), jnp.zeros(4), jnp.ones(4))
    >>> y, state = localized_filter(3 * jnp.ones((1, 5, 4)), params)
    >>> y[0, 0].round(3).tolist(), state.hidden.shape
    ([1.0, 1.0, 1.0, 1.0], (1, 2))
    """
    x = checks.check_real("x", x, ranks=(3,))
    batch, length, features = x.shape
    hidden = len(params.first_bias)
    groups = features // max(params.first.shape[1], 1)
    expected = (2, features // max(groups, 1), hidden), (hidden,), (2, hidden // max(groups, 1), features), (features,), (features,)
    for name, array, shape in zip(Filter._fields, params, expected):
        if array.shape != shape:
            raise ValueError(f"params.{name}: expected shape {list(shape)} for x {checks.describe(x)} and {groups} groups of channels, got {checks.describe(array)}")
    follows = jnp.ones((1, length), bool)  # whether a token has one before it
    if segment_ids is not None:
        ids = checks.check_integers("segment_ids", segment_ids, ranks=(2,))
        follows &= jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    if positions is not None:
        places = jnp.atleast_2d(checks.check_positions("positions", positions, batch, length))
        follows &= jnp.pad(places[:, :-1] >= 0, ((0, 0), (1, 0)), constant_values=True)
    state = localized_filter_init(batch, params, x.dtype) if state is None else state
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def convolve(x, kernel, bias, last):
        before = jnp.where(follows[..., None], jnp.concatenate([last[:, None].astype(x.dtype), x], axis=1)[:, :-1], 0)
        split = lambda x: x.reshape(batch, length, groups, x.shape[-1] // groups)
        kernel = kernel.reshape(2, kernel.shape[1], groups, kernel.shape[2] // groups).astype(x.dtype)
        taps = (jnp.einsum("btge,ego->btgo", split(x), tap, preferred_element_type=wide) for x, tap in zip((before, x), kernel))
        return sum(taps).reshape(batch, length, len(bias)) + bias.astype(wide)

    c = convolve(x, params.first, params.first_bias, state.token).astype(x.dtype)
    u = convolve(c, params.second, params.second_bias, state.hidden) + x.astype(wide)
    y = u * jax.lax.rsqrt(jnp.mean(u**2, axis=-1, keepdims=True) + epsilon) * params.scale.astype(wide)
    if length:
        state = FilterState(x[:, -1].astype(state.token.dtype), c[:, -1].astype(state.hidden.dtype))
    return y.astype(x.dtype), state


def yuan_heads(query: Float[Array, "B T N H"], key: Float[Array, "B T N H"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """Queries and keys as released checkpoints cut them: [query, key] joined along all channels, cut into N heads, each halved into a query and a key. So both of a head
    come from the one projection, of query or of key.

    >>> query, key = yuan_heads(jnp.arange(4.0).reshape(1, 1, 2, 2), 10 + jnp.arange(4.0).reshape(1, 1, 2, 2))
    >>> query[0, 0].tolist(), key[0, 0].tolist()
    ([[0.0, 1.0], [10.0, 11.0]], [[2.0, 3.0], [12.0, 13.0]])
    """
    *lead, heads, size = query.shape
    joined = jnp.concatenate([query.reshape(*lead, -1), key.reshape(*lead, -1)], axis=-1)
    first, second = jnp.split(joined.reshape(*lead, heads, 2 * size), 2, axis=-1)
    return first, second


class FilteredState(NamedTuple):
    """What a layer with a filter remembers: as :class:`attnx.nn.attention.SelfState`, and the filter's state."""

    position: Array
    mechanism: Any
    filter: FilterState


class LocalizedFilteringAttention(Attention):
    """Multi-head self-attention whose queries and keys are made of filtered tokens, see :func:`localized_filter`.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all other options.
      mechanism: causal softmax attention by default.
      groups: of channels in the convolutions.
      share_qk: the filter's alternative: none, and one projection z from which ``q = z w_0 + b_0`` and ``k = z w_1 + b_1`` by channel.
      layout: "plain", or "yuan" for released checkpoints, see :func:`yuan_heads`.
      epsilon: of the filter's norm.
      position: rotary by default.

    >>> layer = LocalizedFilteringAttention(32, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, mechanism: Mechanism | None = None, groups: int = 1, share_qk: bool = False, layout: str = "plain",
                 epsilon: float = 1e-6, position: Any = Rotary(), dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs, **options):
        super().__init__(features, num_heads, mechanism=pairs(mask=causal()) if mechanism is None else mechanism, position=position, dtype=dtype,
                         param_dtype=param_dtype, rngs=rngs, **options)
        if layout not in ("plain", "yuan"):
            raise ValueError(f"layout: expected 'plain' or 'yuan', got {layout!r}")
        if (share_qk or layout == "yuan") and self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected the {num_heads} of the queries with share_qk or layout='yuan', got {self.num_kv_heads}")
        if groups < 1 or features % (2 * groups):
            raise ValueError(f"groups: expected a divisor of features / 2 = {features / 2:g}, got {groups}")
        self.share_qk, self.layout, self.epsilon = share_qk, layout, epsilon
        self.shared_weight = self.shared_bias = self.filter = nnx.data(None)
        if share_qk:
            self.key = nnx.data(None)
            shape, axes = (2, num_heads, self.head_size), logical_axes(None, "heads", "head_size")
            self.shared_weight, self.shared_bias = nnx.Param(jnp.ones(shape, param_dtype), **axes), nnx.Param(jnp.zeros(shape, param_dtype), **axes)
        else:
            hidden, init = features // 2, nnx.initializers.lecun_normal()
            made = Filter(init(rngs.params(), (2, features // groups, hidden), param_dtype), jnp.zeros(hidden, param_dtype),
                          init(rngs.params(), (2, hidden // groups, features), param_dtype), jnp.zeros(features, param_dtype), jnp.ones(features, param_dtype))
            trained: Any = map(nnx.Param, made)
            self.filter = nnx.data(Filter(*trained))

    def _params(self):
        return Filter(*(param[...] for param in self.filter))

    def _projected(self, x, context, positions, context_positions, segment_ids):
        if context is not x:
            raise ValueError("context: expected None: the filter is of a sequence that attends to itself")
        if self.share_qk:
            return self._project(x, x)
        return self._project(localized_filter(x, self._params(), positions=positions, segment_ids=segment_ids, epsilon=self.epsilon)[0], x)

    def _next_projected(self, state, x):
        if self.share_qk:
            return state, *self._project(x, x)
        y, filtered = localized_filter(x, self._params(), state.filter, epsilon=self.epsilon)
        return state._replace(filter=filtered), *self._project(y, x)

    def _project(self, y, x):
        """Queries and keys of ``y``, values of ``x``."""
        value = self._heads(self.value, x, "kv_heads")
        if self.share_qk:
            shared = self._heads(self.query, y, "heads")
            query, key = (shared * weight.astype(shared.dtype) + bias.astype(shared.dtype) for weight, bias in zip(self.shared_weight[...], self.shared_bias[...]))
        else:
            query, key = self._heads(self.query, y, "heads"), self._heads(self.key, y, "kv_heads")
        if self.layout == "yuan":
            query, key = yuan_heads(query, key)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def init_state(self, batch, max_length, *, context=None, context_positions=None, dtype=None):
        """As :meth:`attnx.nn.Attention.init_state`, of self-attention."""
        if context is not None:
            raise ValueError("context: expected None: the filter is of a sequence that attends to itself")
        state = super().init_state(batch, max_length, dtype=dtype)
        if self.share_qk:
            return state
        return FilteredState(*state, localized_filter_init(batch, self._params(), dtype or self.dtype or self.query.kernel.dtype))


class YuanBlock(TransformerBlock):
    """The pre-norm block of the paper's models: :class:`LocalizedFilteringAttention` and a gated network of SiLU, each behind an RMS norm.

    Args:
      features, num_heads: as in :class:`LocalizedFilteringAttention`; so are all other options.
      hidden_features: of the network; by default 8/3 features.

    >>> YuanBlock(32, 4, rngs=nnx.Rngs(0))(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, hidden_features: int | None = None, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs, **options):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(features, attention=LocalizedFilteringAttention(features, num_heads, **common, **options),
                         mlp=MLP(features, hidden_features or features * 8 // 3, **common), **common)
