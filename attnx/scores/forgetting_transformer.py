"""Forgetting attention: softmax attention whose scores decay by what the tokens in between decide to forget.

Lin, Nikishin, He, Courville: "Forgetting Transformer: Softmax Attention with a Forget Gate" (ICLR 2025, arXiv 2503.02130):

    s_ij + c_i - c_j,       c_t = sum over l <= t of log f_l,        f = sigmoid(w x + b), a gate a token and head

so key j loses log f_(j+1) + ... + log f_i on its way to query i; its own gate does not count. With constant gates this is ALiBi, with f = 1
softmax attention. It needs no positions, and forgets what a gate near 0 tells it to. Tiles whose keys are all but forgotten may be skipped, as in Lin,
Obando-Ceron, He, Courville: "Adaptive Computation Pruning for the Forgetting Transformer" (2025, arXiv 2504.06949).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import cache, checks
from attnx.core.attention import attention
from attnx.core.decode import decode
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.nn.attention import Attention, SelfState
from attnx.nn.common import rows
from attnx.nn.frozen import Constant
from attnx.nn.norms import HeadNorm
from pallas_kernels.parts import Cover, Mask, Operand, Range, Score, part, static

LOST = -10.0  # log of the share of a row's weight that automatic pruning may lose


@part
class Forgetting(Score):
    """See :func:`forgetting`."""

    query: Any
    key: Any

    def operands(self, sizes):
        return Operand(self.query, ("batch", "query", "head")), Operand(self.key, ("batch", "key", "head"))

    def tile(self, s, at, query, key):
        return s + (query - key).astype(s.dtype)  # subtracted as wide as they come: both may be large


def forgetting(query: Float[Array, "B T N"], key: Float[Array, "B S N"]) -> Score:
    """Adds ``query_i - key_j``, the cumulated log of forget gates at a query and at a key.

    Args:
      query: [B, T, N], cumulated log gates of the queries, float32 or wider.
      key: [B, S, N], those of the keys.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = jnp.zeros((1, 3, 1, 8))
    >>> c = jnp.cumsum(jnp.log(jnp.array([0.1, 1.0, 0.5])))[None, :, None]
    >>> attnx.attention_weights(q, k, scores=attnx.scores.forgetting(c, c), mask=attnx.masks.causal())[0, 0, 2]
    Array([0.25, 0.25, 0.5 ], dtype=float32)
    """
    return Forgetting(checks.check_real("query", query, ranks=(3,)), checks.check_real("key", key, ranks=(3,)))


@part
class Remembered(Mask):
    """Pairs whose decay ``c_i - c_j`` has not fallen below a threshold; tiles where all have are never visited."""

    query: Any
    key: Any
    threshold: Any

    def operands(self, sizes):
        axes = ("head",) * jnp.ndim(self.threshold)
        return (Operand(self.query, ("batch", "query", "head")), Operand(self.key, ("batch", "key", "head")), Operand(self.threshold, axes))

    def tile(self, at, query, key, threshold):
        return query - key >= threshold

    def block(self, query, key, decayed: Range, ahead: Range, threshold: Range):
        return Cover(decayed.high - ahead.low >= threshold.low, decayed.low - ahead.high >= threshold.high)


def prune_threshold(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], scale: float) -> Float[Array, ""]:
    """The decay below which keys together hold at most e^-10 of any row's weight: ``-(2 U + log S) - 10``, U = scale max |q| max |k| bounding the scores."""
    largest = lambda x: jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), axis=-1), initial=0))
    bound = abs(scale) * largest(query) * largest(key)
    return jax.lax.stop_gradient(LOST - 2 * bound - np.log(max(key.shape[1], 1)))


def forgetting_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], log_forget: Float[Array, "B S N"], *,
                         scale: float | None = None, segment_ids: Int[Array, "B S"] | None = None, key_positions: Int[Array, "*B S"] | None = None,
                         prune: str | float | None = None, **options):
    """Causal softmax attention with forget gates.

    ::

        out_i = sum over j <= i of  softmax_j(scale q_i . k_j + sum over j < l <= i of log f_l) v_j

    Args:
      query: [B, T, N, H], the last T of the S tokens.
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      log_forget: [B, S, N], log f <= 0 of each token and query head, such as ``jax.nn.log_sigmoid(x W)``; cumulated in float32 (float64 for float64).
      scale: of the dot products; 1 / sqrt(H) by default.
      segment_ids: int32 [B, S], documents that do not see each other.
      key_positions: int32 [S] or [B, S], the positions of the tokens, 0, 1, 2, ... by default; -1 is padding, which neither is seen nor forgets.
      prune: None; or "auto" to leave out keys that have decayed so far that all of them together hold at most e^-10 of a row's weight; or that
        threshold of the decay itself, a number below 0.
      **options: implementation, block_sizes, return_residual, hooks, dropout_rate, dropout_key as in :func:`attnx.attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype, or as there with return_residual.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: as causal attention, O(T S) time and O(T + S) memory; with ``prune`` in proportion to the tiles that are not forgotten.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> constant = jnp.broadcast_to(-jnp.array([0.5, 0.1]), (1, 6, 2))
    >>> alibi = attnx.attention(q, k, v, mask=attnx.masks.causal(), scores=attnx.scores.alibi(jnp.array([0.5, 0.1])))
    >>> bool(jnp.allclose(forgetting_attention(q, k, v, constant), alibi, atol=1e-5))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    batch, length, heads = query.shape[:3]
    total = key.shape[1]
    log_forget = checks.check_real("log_forget", log_forget, ranks=(3,))
    if log_forget.shape != (batch, total, heads):
        raise ValueError(f"log_forget: expected shape {[batch, total, heads]} ([B, S, N]), got {checks.describe(log_forget)}")
    if length > total:
        raise ValueError(f"query: expected at most as many tokens as key has ({total}), the last of them, got {length}")
    log_forget = log_forget.astype(jnp.promote_types(log_forget.dtype, jnp.float32))
    if key_positions is not None:
        key_positions = checks.check_positions("key_positions", key_positions, batch, total)
        log_forget = jnp.where((key_positions < 0)[..., None], 0, log_forget)
    decay = jnp.cumsum(log_forget, axis=1)
    first = total - length
    mask = causal()
    if segment_ids is not None:
        mask &= documents(segment_ids[:, first:], segment_ids)
    if prune is not None:
        mask &= Remembered(decay[:, first:], decay, _threshold(prune, query, key, scale))
    positions: dict[str, Any] = {}
    if first or key_positions is not None:
        places = jnp.arange(total, dtype=jnp.int32) if key_positions is None else key_positions
        positions = {"query_positions": places[..., first:], "key_positions": key_positions}
    return attention(query, key, value, scores=Forgetting(decay[:, first:], decay), mask=mask, scale=scale, **positions, **options)


def _threshold(prune, query, key, scale):
    if isinstance(prune, str):
        checks.check_choice("prune", prune, ("auto",))
        return prune_threshold(query, key, checks.check_scale(scale, query.shape[3]))
    if not prune < 0:
        raise ValueError(f"prune: expected None, 'auto' or a number below 0, got {prune}")
    return jnp.asarray(prune, jnp.float32)


class ForgettingState(NamedTuple):
    """A key-value cache, the cumulated log gate of the token in each slot, and that of all tokens so far."""

    cache: cache.KVCache
    decay: Float[Array, "B L N"]
    total: Float[Array, "B N"]


@part
class ForgettingMechanism:
    """:func:`forgetting_attention` as an :class:`attnx.Mechanism` that is also handed ``log_forget`` [B, T, N]; made by :class:`ForgettingAttention`."""

    heads: int = static(default=1)
    scale: float | None = static(default=None)
    prune: str | float | None = static(default=None)
    dropout_rate: float = static(default=0.0)
    implementation: str | None = static(default=None)

    def __call__(self, query, key, value, *, log_forget, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None, hooks=None):
        rate = self.dropout_rate if dropout_key is not None else 0.0
        return forgetting_attention(query, key, value, log_forget, scale=self.scale, prune=self.prune, segment_ids=segment_ids, key_positions=key_positions,
                                    dropout_rate=rate, dropout_key=dropout_key, hooks=hooks, implementation=None if hooks else self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        wide = jnp.promote_types(dtype, jnp.float32)
        return ForgettingState(cache.init(batch, max_length, kv_heads, key_size, value_size, dtype), jnp.zeros((batch, max_length, self.heads), wide),
                               jnp.zeros((batch, self.heads), wide))

    def step(self, state, query, key, value, *, log_forget):
        decay = state.total[:, None] + jnp.cumsum(log_forget.astype(state.total.dtype), axis=1)
        known = jax.lax.dynamic_update_slice_in_dim(state.decay, decay, state.cache.next, axis=1)
        state = ForgettingState(cache.append(state.cache, key, value), known, decay[:, -1])
        mask = causal() if self.prune is None else causal() & Remembered(decay, known, _threshold(self.prune, query, state.cache.key, self.scale))
        out = decode(query, state.cache.key, state.cache.value, state.cache.next, scores=Forgetting(decay, known), mask=mask, scale=self.scale)
        return state, out


class ShiftedState(NamedTuple):
    """What a layer with token shift remembers: as :class:`attnx.nn.attention.SelfState`, and the last token's projections."""

    position: Array
    mechanism: Any
    key: Float[Array, "B 1 K H"]
    value: Float[Array, "B 1 K Hv"]


class ForgettingAttention(Attention):
    """Multi-head :func:`forgetting_attention` with its gates, in the plain and in the 'Pro' form.

    Pro: queries and keys pass an RMS norm, keys and values a data-dependent token shift ``k_t <- a_t k_(t-1) + (1 - a_t) k_t`` (of the projections, a_t =
    sigmoid(x_t W), one a key-value head), and what each head found an RMS norm and a gate ``sigmoid(x W_g)``.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism.
      forget: "full" (a gate of each token, ``sigmoid(x W_f + b_f)``), "bias_only" (one learned constant a head), "fixed" (such a constant, not learned) or
        "none" (softmax attention).
      decay_times: (shortest, longest) number of tokens over which the heads of "bias_only" and "fixed" forget, log-uniformly spaced (at the start).
      pro: whether it is the Pro form.
      prune, scale: as in :func:`forgetting_attention`.

    >>> import jax.numpy as jnp
    >>> layer = ForgettingAttention(32, 4, pro=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, forget: str = "full", decay_times: tuple[float, float] = (4.0, 4096.0), pro: bool = False,
                 prune: str | float | None = None, scale: float | None = None, dropout_rate: float = 0.0, implementation: str | None = None,
                 rngs: nnx.Rngs, **options):
        checks.check_choice("forget", forget, ("full", "bias_only", "fixed", "none"))
        if pro:
            options = {"output_norm": partial(HeadNorm, num_heads), "output_gate": "channel"} | options
        mechanism = ForgettingMechanism(num_heads, scale, prune, checks.check_dropout_rate(dropout_rate), implementation)
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
        self.forget, self.pro = forget, pro
        self.forget_gate = self.forget_bias = self.key_shift = self.value_shift = nnx.data(None)
        dense = lambda outputs: nnx.Linear(features, outputs, use_bias=False, dtype=self.dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
        if forget == "full":
            self.forget_gate = dense(num_heads)
            self.forget_bias = nnx.Param(jnp.zeros(num_heads))
        elif forget != "none":
            times = np.geomspace(*decay_times, num_heads)
            bias = jnp.asarray(-np.log(np.expm1(1 / times)), jnp.float32)  # sigmoid(bias) = e^(-1 / time)
            kind: Any = nnx.Param if forget == "bias_only" else Constant
            self.forget_bias = kind(bias)
        if pro:
            self.query_norm, self.key_norm = (HeadNorm(heads, self.head_size, epsilon=1e-5, dtype=self.dtype) for heads in (num_heads, self.num_kv_heads))
            self.key_shift, self.value_shift = dense(self.num_kv_heads), dense(self.num_kv_heads)

    def extras(self, x):
        if self.forget == "none":
            return {"log_forget": jnp.zeros((*x.shape[:2], self.num_heads), jnp.promote_types(x.dtype, jnp.float32))}
        logit = self.forget_bias[...]
        if self.forget_gate is not None:
            logit = logit + self.forget_gate(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        return {"log_forget": jax.nn.log_sigmoid(jnp.broadcast_to(logit, (*x.shape[:2], self.num_heads)))}

    def init_state(self, batch, max_length, **options):
        state = super().init_state(batch, max_length, **options)
        if not self.pro or not isinstance(state, SelfState):
            return state
        dtype = options.get("dtype") or self.dtype or self.key.kernel.dtype
        before = lambda size: jnp.zeros((batch, 1, self.num_kv_heads, size), dtype)
        return ShiftedState(*state, before(self.head_size), before(self.value_size))

    def _key_value(self, context):
        return self._shifted(context, None, None)[0]

    def _next_key_value(self, state, x):
        if not self.pro:
            return super()._next_key_value(state, x)
        (key, value), last = self._shifted(x, state.key, state.value)
        return state._replace(key=last[0].astype(state.key.dtype), value=last[1].astype(state.value.dtype)), key, value

    def _shifted(self, x, key_before, value_before):
        """Keys and values, and the last token's projections."""
        plain = Attention._heads(self, self.key, x, "kv_heads"), Attention._heads(self, self.value, x, "kv_heads")
        key, value = plain
        if self.pro:
            key, value = (_shift(shift, x, now, before) for shift, now, before in
                          zip((self.key_shift, self.value_shift), plain, (key_before, value_before)))
        key = key if self.key_norm is None else self.key_norm(key)
        return (key, value), tuple(heads[:, -1:] for heads in plain)


def _shift(gate, x, now, before):
    """``a before + (1 - a) now``, each token's projection mixed with that of the token before."""
    before = jnp.zeros_like(now[:, :1]) if before is None else before.astype(now.dtype)
    share = jax.nn.sigmoid(gate(rows(x)).reshape(*x.shape[:2], -1))[..., None]
    return now + share * (jnp.concatenate([before, now[:, :-1]], axis=1) - now)
