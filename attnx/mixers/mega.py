"""Mega: single-head gated attention whose queries and keys are made of a moving average of the tokens.

Ma, Zhou, Kong, He, Gui, Neubig, May, Zettlemoyer: "Mega: Moving Average Equipped Gated Attention" (ICLR 2023, arXiv 2209.10655). With x = norm(X),

    h_t = (1 - p a) h_(t-1) + p beta x_t,    e_t = silu(<gamma, h_t> / sqrt(n) + omega x_t)          p = sigmoid(delta), a = sigmoid(alpha), n numbers a channel
    u, z, r, c = sigmoid, silu, silu, 1 of e W + b;      q, k = g_q z + b_q, g_k z + b_k;      v = silu(x W_v)
    o_i = sum_j f(s_ij) v_j,     H = silu(c + (o r) W_h),     Y = X + u (H - X)

s_ij = q_i . k_j / sqrt(Z) + b_(j-i) for f = softmax, q_i . k_j / (number of keys that i sees) + b_(j-i) for f = laplace or squared ReLU, which have no row sums. The
average brings in what is near and in which order, so one head does, and attention may be cut into chunks (Mega-chunk): linear in T, with a state of constant
size. Both directions have averages of their own where it is not causal.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.core.attention import attention
from attnx.core.convolve import convolution, ema, ema_init, ema_kernel, ema_step, two_sided_kernel
from attnx.core.halves import row_statistics
from attnx.masks.causal import causal as causal_mask
from attnx.masks.documents import documents
from attnx.masks.strided import within_blocks
from attnx.mechanism import pairs
from attnx.nn.common import check_sequence, dropout
from attnx.nn.mlp import MLP
from attnx.nn.norms import make_norm
from attnx.weights import laplace, relu_squared, softmax
from pallas_kernels.parts import Operand, Score, part

ACTIVATIONS = {"softmax": softmax, "laplace": laplace, "relu2": relu_squared}

# Moving averages ----------------------------------------------------------------------------------------------------


class EMA(NamedTuple):
    """Parameters of :func:`multihead_ema`; 2 D rows, the second half for the future, where it is two-sided.

    Attributes:
      delta, alpha: [D or 2 D, n], logits of the step and of the damping.
      beta, gamma: [D or 2 D, n], what enters the average and what is read of it.
      omega: [D], the skip.
    """

    delta: Float[Array, "C n"]
    alpha: Float[Array, "C n"]
    beta: Float[Array, "C n"]
    gamma: Float[Array, "C n"]
    omega: Float[Array, " D"]


def _coefficients(params: EMA) -> tuple[Array, Array, Array]:
    """Decay, gain and readout."""
    step = jax.nn.sigmoid(params.delta)
    return 1 - step * jax.nn.sigmoid(params.alpha), step * params.beta, params.gamma / math.sqrt(params.gamma.shape[1])


def multihead_ema(x: Float[Array, "B T D"], params: EMA, *, positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                  initial_state: Float[Array, "B D n"] | None = None, implementation: str | None = None, return_state: bool = False):
    """Damped moving average in n dimensions a channel, with a skip: ``y_t = <gamma, h_t> / sqrt(n) + omega x_t``.

    Args:
      x: [B, T, D].
      params: with D rows causal; with 2 D rows the sum of an average over the past and one over the future, both with the present.
      positions: int32 [T] or [B, T]; -1 marks padding, which does not enter averages (but keeps its skip).
      segment_ids: int32 [B, T], documents that are averaged apart.
      initial_state: h before the first token, [B, D, n] (causal only).
      implementation: 'fft' O(T log T), 'direct' O(T^2) or 'chunked' O(T), the only one that knows states and segments; None chooses.
      return_state: return h after the last token, too (causal only).

    Returns:
      [B, T, D] in the dtype of x, or a pair with [B, D, n]. Take its silu for Mega's input to queries and keys.

    Raises:
      ValueError: shapes that do not fit. NotImplementedError: a state of a two-sided average.

    >>> one = jnp.ones((1, 1))
    >>> params = EMA(0 * one, 0 * one, one, one, jnp.zeros(1))  # y_t = x_t / 2 + 3/4 y_(t-1)
    >>> multihead_ema(jnp.ones((1, 3, 1)), params, implementation="chunked")[0, :, 0]
    Array([0.5    , 0.875  , 1.15625], dtype=float32)
    """
    if x.ndim != 3:
        raise ValueError(f"x: expected shape [B, T, D], got {checks.describe(x)}")
    features, rows = x.shape[2], params.delta.shape[0]
    if rows not in (features, 2 * features) or params.omega.shape != (features,):
        raise ValueError(f"params: expected {features} or {2 * features} rows and omega [{features}] for x {checks.describe(x)}, got {rows} rows "
                         f"and omega {checks.describe(params.omega)}")
    both = rows == 2 * features
    if both and (initial_state is not None or return_state):
        raise NotImplementedError("initial_state, return_state: a two-sided average has no state; use a causal one")
    seen = x if positions is None else jnp.where((jnp.asarray(positions) >= 0)[..., None], x, 0)
    coefficients = _coefficients(params)
    state = None
    if not both:
        y = ema(seen, *coefficients, initial_state=initial_state, segment_ids=segment_ids, implementation=implementation, return_state=return_state)
        y, state = y if return_state else (y, None)
    else:
        past, future = ([a[:features] for a in coefficients], [a[features:] for a in coefficients])
        if implementation == "chunked" or segment_ids is not None:
            turned = None if segment_ids is None else jnp.flip(segment_ids, -1)
            average = partial(ema, implementation=implementation)
            y = average(seen, *past, segment_ids=segment_ids) + jnp.flip(average(jnp.flip(seen, 1), *future, segment_ids=turned), 1)
        elif x.size:
            forward, backward = (ema_kernel(side[0], side[1], side[2], x.shape[1]) for side in (past, future))
            y = convolution(seen, two_sided_kernel(forward, backward), origin=x.shape[1] - 1, implementation=implementation or "fft")
        else:
            y = seen
    y = (y + params.omega * x).astype(x.dtype)
    return (y, state) if return_state else y


# Attention ----------------------------------------------------------------------------------------------------------


@part
class RelativeTable(Score):
    """Adds ``table[j - i + L - 1]``, table [2 L - 1]; beyond its ends their values."""

    table: Any

    @property
    def horizon(self):
        return self.table.shape[0] // 2

    def operands(self, sizes):
        reach = self.horizon
        offsets = jnp.clip(jnp.arange(sizes.offsets[0], sizes.offsets[1] + 1), -reach, reach)
        return (Operand(self.table[offsets + reach], ("offset",)),)

    def tile(self, s, at, bias):
        return s + bias.astype(s.dtype)


def rotary_table(a: Float[Array, " Z"], b: Float[Array, " Z"], length: int) -> Float[Array, " M"]:
    """Mega's rotary bias as a table over j - i = 1 - L .. L - 1: ``<R_i a, R_j b>``, R_i turning halves by angles i 10000^(-2 m / Z).

    >>> rotary_table(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]), 2).round(3)  # cos(j - i)
    Array([0.54, 1.  , 0.54], dtype=float32)
    """
    if a.ndim != 1 or a.shape != b.shape or a.shape[0] % 2:
        raise ValueError(f"a: expected two vectors of one even size, got {checks.describe(a)} and {checks.describe(b)}")
    half = a.shape[0] // 2
    turn = 10000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(1 - length, length)[:, None] * turn.astype(a.dtype)
    (a1, a2), (b1, b2) = (x.reshape(2, half) for x in (a, b))
    return jnp.cos(angle) @ (a1 * b1 + a2 * b2) - jnp.sin(angle) @ (a1 * b2 - a2 * b1)


def _mask(causal, chunk, segment_ids=None):
    mask = causal_mask() if causal else None
    for other in (None if chunk is None else within_blocks(chunk), None if segment_ids is None else documents(segment_ids)):
        mask = other if mask is None else mask & other
    return mask


def _parts(activation, table) -> dict[str, Any]:
    checks.check_choice("activation", activation, tuple(ACTIVATIONS))
    return dict(scores=() if table is None else (RelativeTable(table),), weights=ACTIVATIONS[activation](), scale=1.0)


def gated_attention(query: Float[Array, "B T Z"], key: Float[Array, "B T Z"], value: Float[Array, "B T V"], table: Float[Array, " M"] | None = None, *,
                    activation: str = "softmax", causal: bool = True, chunk: int | None = None, positions: Int[Array, "*B T"] | None = None,
                    segment_ids: Int[Array, "B T"] | None = None, **options) -> Float[Array, "B T V"]:
    """Mega's attention: one head, softmax or elementwise weights, whole or in chunks.

    ::

        softmax          out_i = sum over j of softmax_j(q_i . k_j / sqrt(Z) + b_(j-i)) v_j
        laplace, relu2   out_i = sum over j of f(q_i . k_j / n_i + b_(j-i)) v_j,              n_i = number of keys that i sees

    Args:
      query, key: [B, T, Z].
      value: [B, T, V].
      table: b, [2 L - 1], of offsets 1 - L .. L - 1; L at least T, or ``chunk``; None for none.
      activation: 'softmax', 'laplace' or 'relu2'.
      causal: whether i sees no j > i.
      chunk: size of the chunks of consecutive positions outside of which a token sees nothing; None for one chunk.
      positions: int32 [T] or [B, T], logical positions; -1 is padding. 0, 1, 2, ... by default.
      segment_ids: int32 [B, T], documents that do not see each other.
      **options: implementation, block_sizes, dropout_rate, dropout_key, ... as in :func:`attnx.attention`.

    Returns:
      [B, T, V] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(T^2) time, O(T chunk) with chunks; O(T) memory.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 4))
    >>> first = gated_attention(q[:, :3], k[:, :3], v[:, :3], activation="laplace")
    >>> bool(jnp.allclose(gated_attention(q, k, v, activation="laplace", chunk=3)[:, :3], first, atol=1e-6))
    True
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 3 or x.shape[:2] != query.shape[:2]:
            raise ValueError(f"{name}: expected shape [B, T, features] with B, T = {query.shape[:2]} as query, got {checks.describe(x)}")
    parts = _parts(activation, table)
    length = query.shape[1]
    if chunk is not None:
        checks.check_integer("chunk", chunk, least=1)
    needed = length if chunk is None else min(chunk, length)
    if table is not None and (table.ndim != 1 or table.shape[0] % 2 == 0 or table.shape[0] < 2 * needed - 1):
        raise ValueError(f"table: expected shape [2 L - 1] with L of at least {needed}, got {checks.describe(table)}")
    mask = _mask(causal, chunk, segment_ids)
    places: dict[str, Any] = {} if positions is None else {"query_positions": positions, "key_positions": positions}
    if activation == "softmax":
        query = query * query.shape[-1] ** -0.5
    else:
        query = _divided(query, _count(query, mask, causal, chunk, places, segment_ids is not None))
    return attention(query[:, :, None], key[:, :, None], value[:, :, None], mask=mask, **parts, **places, **options)[:, :, 0]


def _divided(query, count):
    return (query / jnp.maximum(count, 1)[..., None]).astype(query.dtype)


def _count(query, mask, causal, chunk, places, packed):
    """How many keys each query sees, [B or 1, T]: in closed form where nothing is padding, else as the sum of e^0 over what the mask lets through."""
    length = query.shape[1]
    if not places and not packed:
        first = jnp.arange(length) // (chunk or max(length, 1)) * (chunk or max(length, 1))
        last = jnp.arange(length) if causal else jnp.minimum(first + (chunk or length), length) - 1
        return (last - first + 1)[None]
    nothing = jnp.zeros((query.shape[0], length, 1, 1), jnp.promote_types(query.dtype, jnp.float32))
    return jnp.exp(row_statistics(nothing, nothing, mask=mask, **places))[..., 0]


# Layers -------------------------------------------------------------------------------------------------------------


class MegaState(NamedTuple):
    """What a layer remembers: the position of the next token, its averages, and the keys and values of the chunk."""

    position: Int[Array, ""]
    average: Float[Array, "B D n"]
    cache: Any


class MegaLayer(nnx.Module):
    """The gated attention of Mega with its residual; see the module's equations.

    Args:
      features: D.
      z_size: Z, size of queries and keys.
      value_size: V.
      ema_size: n, dimensions of the average of a channel.
      max_length: longest sequence, without chunks.
      causal: whether it is; otherwise averages go both ways, and there is no streaming form.
      chunk: size of the chunks of attention, or None.
      activation: 'softmax', 'laplace' or 'relu2'.
      bias: of relative positions: 'simple', a learned table, 'rotary', two learned vectors, or None.
      norm: as in :func:`attnx.nn.make_norm`.
      norm_position: 'pre' or 'post'.
      dropout_rate: of averages and of H; attention_dropout_rate: of weights; hidden_dropout_rate: of values.
      implementation: as in :func:`attnx.attention`.
      rngs: the generator of initial values.

    Cost: O(T D (n + log T)) and that of :func:`gated_attention`; state O(D n + chunk (Z + V)).

    >>> layer = MegaLayer(16, 8, 32, chunk=4, activation="laplace", rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 10, 16))
    >>> state = layer.init_state(batch=1, max_length=10)
    >>> state, first = layer.step(state, x[:, :7])
    >>> state, last = layer.step(state, x[:, 7:])
    >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), layer(x), atol=1e-5)), state.cache.key.shape
    (True, (1, 4, 1, 8))
    """

    def __init__(self, features: int, z_size: int, value_size: int, ema_size: int = 16, *, max_length: int = 1024, causal: bool = True,
                 chunk: int | None = None, activation: str = "softmax", bias: str | None = "simple", norm=partial(nnx.LayerNorm, epsilon=1e-5),
                 norm_position: str = "pre", dropout_rate: float = 0.0, attention_dropout_rate: float = 0.0, hidden_dropout_rate: float = 0.0,
                 implementation: str | None = None, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        checks.check_choice("activation", activation, tuple(ACTIVATIONS))
        checks.check_choice("bias", bias, ("simple", "rotary"))
        checks.check_choice("norm_position", norm_position, ("pre", "post"))
        checks.check_integer("ema_size", ema_size, least=1)
        if chunk is not None:
            checks.check_integer("chunk", chunk, least=1)
        self.features, self.sizes, self.causal, self.chunk = features, (z_size, value_size), causal, chunk
        self.activation, self.bias_kind, self.norm_position, self.implementation = activation, bias, norm_position, implementation
        self.reach = checks.check_integer("max_length", max_length, least=1) if chunk is None else chunk
        self.rates = tuple(map(checks.check_dropout_rate, (dropout_rate, attention_dropout_rate, hidden_dropout_rate)))
        self.norm = make_norm(norm, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        dense = partial(nnx.Linear, kernel_init=small, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.value, self.mixed, self.out = dense(features, value_size), dense(features, 2 * features + z_size + value_size), dense(value_size, features)
        normal = lambda shape, std=1.0: nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))
        rows = (features if causal else 2 * features, ema_size)
        self.delta, self.alpha, self.gamma, self.omega = normal(rows, 0.2), normal(rows, 0.2), normal(rows), normal((features,))
        signs = (-1.0) ** jnp.arange(ema_size, dtype=param_dtype)
        self.beta = nnx.Param(signs + 0.02 * jax.random.normal(rngs.params(), rows, param_dtype))
        self.affine, self.affine_bias = normal((2, z_size), 0.02), nnx.Param(jnp.zeros((2, z_size), param_dtype))
        shape = {"simple": (2 * self.reach - 1,), "rotary": (2, z_size), None: None}[bias]
        self.bias = nnx.data(None) if shape is None else normal(shape, 0.02)

    @property
    def table(self) -> Float[Array, " M"] | None:
        """The bias by offset, or None."""
        if self.bias is None:
            return None
        return rotary_table(self.bias[0], self.bias[1], self.reach) if self.bias_kind == "rotary" else self.bias[...]

    @property
    def ema(self) -> EMA:
        """The parameters of the average."""
        return EMA(*(x[...] for x in (self.delta, self.alpha, self.beta, self.gamma, self.omega)))

    def __call__(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                 dropout_key: Array | None = None) -> Float[Array, "B T D"]:
        """[B, T, D] to the same; positions (-1 is padding) and segment_ids as in :func:`gated_attention`."""
        check_sequence("x", x, self.features)
        keys = (None,) * 4 if dropout_key is None else jax.random.split(dropout_key, 4)
        normed = self.norm(x) if self.norm_position == "pre" else x
        average = self._average(normed, positions, segment_ids)
        query, key, gates = self._project(dropout(average, self.rates[0], keys[0]))
        value = dropout(jax.nn.silu(self.value(normed)), self.rates[2], keys[1])
        found = gated_attention(query, key, value, self.table, activation=self.activation, causal=self.causal, chunk=self.chunk, positions=positions,
                                segment_ids=segment_ids, dropout_rate=self.rates[1] if dropout_key is not None else 0.0, dropout_key=keys[2],
                                implementation=self.implementation)
        return self._finish(x, found, gates, keys[3])

    def init_state(self, batch: int, max_length: int, *, dtype=None, **options) -> MegaState:
        """The state before the first token; its cache holds one chunk, or without chunks ``max_length`` tokens."""
        if not self.causal:
            raise NotImplementedError("causal=False: averages of the future have no streaming form")
        if self.chunk is None and max_length > self.reach:
            raise ValueError(f"max_length: expected at most the layer's {self.reach}, got {max_length}")
        dtype = dtype or self.out.kernel.dtype
        cache = self._mechanism().init(batch, max_length, 1, *self.sizes, dtype)
        return MegaState(jnp.zeros((), jnp.int32), ema_init(batch, self.delta[...], dtype), cache)

    def step(self, state: MegaState, x: Float[Array, "B t D"], **options) -> tuple[MegaState, Float[Array, "B t D"]]:
        """The next t tokens: ``(state, [B, t, D])``; equals the call on everything so far."""
        check_sequence("x", x, self.features)
        normed = self.norm(x) if self.norm_position == "pre" else x
        memory, y = ema_step(state.average, *_coefficients(self.ema), normed)
        query, key, gates = self._project(jax.nn.silu((y + self.omega[...] * normed).astype(x.dtype)))
        positions = state.position + jnp.arange(x.shape[1], dtype=jnp.int32)
        count = (positions if self.chunk is None else positions % self.chunk) + 1
        query = query * query.shape[-1] ** -0.5 if self.activation == "softmax" else _divided(query, count[None])
        value = jax.nn.silu(self.value(normed))
        cache, found = self._mechanism().step(state.cache, *(a[:, :, None] for a in (query, key, value)))
        return MegaState(state.position + x.shape[1], memory, cache), self._finish(x, found[:, :, 0], gates, None)

    def _mechanism(self):
        return pairs(mask=_mask(True, self.chunk), implementation=self.implementation, **_parts(self.activation, self.table))

    def _average(self, x, positions, segment_ids):
        return jax.nn.silu(multihead_ema(x, self.ema, positions=positions, segment_ids=segment_ids))

    def _project(self, average):
        """Query, key and the gates (u, r, c) from the averaged tokens."""
        (z_size, value_size), features = self.sizes, self.features
        u, z, r, c = jnp.split(self.mixed(average), (features, features + z_size, features + z_size + value_size), axis=-1)
        z = jax.nn.silu(z)[..., None, :] * self.affine[...] + self.affine_bias[...]
        query, key = (z[..., side, :].astype(average.dtype) for side in (0, 1))
        return query, key, (jax.nn.sigmoid(u), jax.nn.silu(r), c)

    def _finish(self, x, found, gates, key):
        update, reset, candidate = gates
        hidden = dropout(jax.nn.silu(candidate + self.out(found * reset)), self.rates[0], key)
        out = (x + update * (hidden - x)).astype(x.dtype)
        return out if self.norm_position == "pre" else self.norm(out)


class NormalizedFFN(nnx.Module):
    """``x + silu(norm(x) W_1 + b_1) W_2 + b_2``, or the norm of the sum of x and its network: the other half of a Mega block.

    Args:
      features, hidden_features: D and the size of the hidden layer.
      norm, norm_position, dropout_rate: as in :class:`MegaLayer`.

    >>> NormalizedFFN(8, 16, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8))).shape
    (1, 3, 8)
    """

    def __init__(self, features: int, hidden_features: int, *, norm=partial(nnx.LayerNorm, epsilon=1e-5), norm_position: str = "pre", dropout_rate: float = 0.0,
                 dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        checks.check_choice("norm_position", norm_position, ("pre", "post"))
        self.norm = make_norm(norm, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp = MLP(features, hidden_features, gated=False, use_bias=True, kernel_init=nnx.initializers.normal(0.02), dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm_position, self.dropout_rate = norm_position, checks.check_dropout_rate(dropout_rate)

    def __call__(self, x: Float[Array, "B T D"], *, dropout_key: Array | None = None) -> Float[Array, "B T D"]:
        """[B, T, D] to the same."""
        pre = self.norm_position == "pre"
        out = x + dropout(self.mlp(self.norm(x) if pre else x), self.dropout_rate, dropout_key)
        return out if pre else self.norm(out)
