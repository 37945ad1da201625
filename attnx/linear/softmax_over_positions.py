"""Softmax over positions, one for each channel of the keys, causal or not, in linear time: what latent attention and efficient attention share.

    m_tl  = sum over s of  e^(k_sl) v_s / sum over s of e^(k_sl)              over all s or, causal, over s <= t
    out_t = sum over l of  w_tl m_tl

Causal, the normaliser grows with every token. With L_t = log sum over s <= t of e^(k_s) the mean of a channel obeys

    m_t = (1 - b_t) m_(t-1) + b_t v_t,         b_t = sigmoid(k_t - L_(t-1))

a linear recurrence with the log-decay log(1 - b_t), which :func:`attnx.core.linear.linear_attention` computes in all its executions. b_1 = 1 (so m_1 = v_1) and
every factor is at most 1, so logits of any offset are safe; and what is added and what is kept come from one number, so weights sum to 1 to rounding after any
number of tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attnx.core import checks, linear, linear_forms
from pallas_kernels.parts import part, static
from pallas_kernels.tile import accumulator_dtype


class PositionSoftmaxState(NamedTuple):
    """What later tokens need of earlier ones: each channel's mean of values [B, K, L, Hv], and the log of its normaliser [B, K, L], -inf before the first token."""

    mean: Float[Array, "B K L Hv"]
    log_total: Float[Array, "B K L"]


def position_softmax_init(batch: int, heads: int, channels: int, value_size: int, *, dtype=jnp.float32) -> PositionSoftmaxState:
    """The state before the first token, of the same size after any number of tokens.

    Args:
      batch, heads, channels, value_size: B, K, L and Hv.
      dtype: float32, or float64 for such inputs.

    >>> position_softmax_init(2, 4, 16, 8).mean.shape
    (2, 4, 16, 8)
    """
    return PositionSoftmaxState(jnp.zeros((batch, heads, channels, value_size), dtype), jnp.full((batch, heads, channels), -jnp.inf, dtype))


def position_softmax_attention(weights: Float[Array, "B T N L"], logits: Float[Array, "B S K L"], value: Float[Array, "B S K Hv"], *, is_causal: bool = True,
                               key_positions: Int[Array, "*B S"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                               initial_state: PositionSoftmaxState | None = None, return_state: bool = False, chunk_size: int | None = None,
                               implementation: str | None = None, axis_name=None):
    """Values averaged by each channel's softmax over positions, and mixed by each query.

    ::

        out_t = sum over l of  w_tl  sum over s of softmax_s(k_sl) v_s               s <= t where causal

    Args:
      weights: w [B, T, N, L], used as they are.
      logits: k [B, S, K, L], N a multiple of K; S = T where causal.
      value: [B, S, K, Hv].
      is_causal: whether token t sees the keys up to its own only, in the normaliser as in the sum.
      key_positions: int32 [S] or [B, S]; -1 is padding, which has no weight. Where nothing may be seen the output is zero.
      segment_ids: int32 [B, T], causal only: documents that do not see each other; tokens of negative ids are padding.
      initial_state: causal only: what came before.
      return_state: causal only: also return the state after the last token.
      chunk_size, implementation, axis_name: as in :func:`attnx.linear_attention`: 'parallel' (all pairs), 'chunked', 'recurrent', 'pallas' or None; and the mesh axis
        over which the sequence is sharded, inside ``jax.shard_map``.

    Returns:
      [B, T, N, Hv] in the dtype of ``weights``; with ``return_state`` a pair with the :class:`PositionSoftmaxState`, in at least float32.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T L (C + Hv)) time a head with chunks of C tokens, O(T (L + Hv)) memory; not causal O(T L Hv).

    >>> import jax.numpy as jnp
    >>> value = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    >>> ones = jnp.ones((1, 3, 1, 1))
    >>> position_softmax_attention(ones, 80 * ones, value)[0, :, 0, 0].round(3)
    Array([1., 2., 4.], dtype=float32)
    >>> position_softmax_attention(ones, 80 * ones, value, is_causal=False)[0, :, 0, 0].round(3)
    Array([4., 4., 4.], dtype=float32)
    """
    weights, logits, value = checks.check_query_key_value(weights, logits, value)
    (b, t, _, channels), (_, s, heads, _) = weights.shape, logits.shape
    key_positions = checks.check_positions("key_positions", key_positions, b, s)
    attend = partial(linear.linear_attention, is_causal=is_causal, chunk_size=chunk_size, implementation=implementation, axis_name=axis_name)
    dtype = accumulator_dtype(weights.dtype)
    lowest = jnp.finfo(dtype).min / 4  # stands for -inf, whose differences are undefined
    wide = jnp.maximum(logits.astype(dtype), lowest)
    seen = wide > lowest
    if key_positions is not None:
        seen &= (jnp.broadcast_to(key_positions, (b, s)) >= 0)[..., None, None]
    if not is_causal:
        for name, given in (("segment_ids", segment_ids), ("initial_state", initial_state), ("return_state", return_state or None)):
            if given is not None:
                raise ValueError(f"{name}: expected none with is_causal=False, where tokens have no order; mark padding by key_positions of -1")
        return attend(weights, _softmax(wide, seen, axis_name).astype(logits.dtype), value)
    if s != t:
        raise ValueError(f"logits: expected the {t} tokens of weights with is_causal=True, got {checks.describe(logits)}")
    restarts = None
    if segment_ids is not None:
        segment_ids = checks.check_integers("segment_ids", segment_ids, ranks=(2,))
        if segment_ids.shape != (b, t):
            raise ValueError(f"segment_ids: expected shape {[b, t]}, got {checks.describe(segment_ids)}")
        seen &= (segment_ids >= 0)[..., None, None]
        restarts = linear.restarts(segment_ids, axis_name)
    state = position_softmax_init(b, heads, channels, value.shape[3], dtype=dtype)
    if initial_state is not None:
        state = _check_state(initial_state, state)
    before, last = _log_totals(jnp.where(seen, wide, lowest), jnp.maximum(state.log_total, lowest), restarts, axis_name)
    some = seen & (before > lowest)
    step = jnp.where(some, wide - before, 0)
    added = jnp.where(seen, jnp.where(some, jax.nn.sigmoid(step), 1), 0).astype(logits.dtype)
    log_kept = jnp.where(seen, jnp.where(some, jax.nn.log_sigmoid(-step), -jnp.inf), 0)
    out, memory = attend(weights, added, value, log_decay=log_kept, segment_ids=segment_ids, initial_state=linear.LinearState(state.mean), return_state=True)
    return (out, PositionSoftmaxState(memory.memory, jnp.where(last > lowest, last, -jnp.inf))) if return_state else out


def _softmax(logits, seen, axis_name):
    """Over axis 1, of all devices; zero where nothing is seen."""
    top = lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True, where=seen, initial=jnp.finfo(logits.dtype).min / 4))
    top = top if axis_name is None else lax.pmax(top, axis_name)
    exponentials = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top, 0)), 0)
    total = jnp.sum(exponentials, axis=1, keepdims=True)
    total = total if axis_name is None else lax.psum(total, axis_name)
    return exponentials / jnp.where(total > 0, total, 1)


def _log_totals(logits, initial, restarts, axis_name):
    """log sum of e^logits over all tokens before each [B, T, K, L], since the last restart; and over all [B, K, L]."""
    def combine(earlier, later):
        return earlier[0] | later[0], jnp.where(later[0], later[1], jnp.logaddexp(earlier[1], later[1]))

    restarts = jnp.zeros(logits.shape[:2], bool) if restarts is None else restarts
    restarts = restarts[..., None, None]
    flags, totals = lax.associative_scan(combine, (restarts, logits), axis=1)
    first = jnp.zeros_like(restarts, shape=(logits.shape[0], 1, 1, 1)), initial[:, None]
    if axis_name is not None:
        first = linear_forms.scan_devices(combine, (flags[:, -1:], totals[:, -1:]), first, axis_name)
    totals = jnp.concatenate([first[1], combine(first, (flags, totals))[1]], axis=1)
    last = totals[:, -1]
    if axis_name is not None:
        last = lax.psum(jnp.where(lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1, last, 0), axis_name)
    return jnp.where(restarts, jnp.finfo(logits.dtype).min / 4, totals[:, :-1]), last


def _check_state(given, expected):
    if not isinstance(given, PositionSoftmaxState):
        raise TypeError(f"initial_state: expected a PositionSoftmaxState, got {checks.describe(given)}")
    for name, x, like in zip(PositionSoftmaxState._fields, given, expected):
        if jnp.shape(x) != like.shape:
            raise ValueError(f"initial_state.{name}: expected shape {list(like.shape)}, got {checks.describe(x)}")
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), given, expected)


@part
class PositionSoftmax:
    """See :func:`position_softmax`."""

    is_causal: bool = static(default=True)
    implementation: str | None = static(default=None)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        return position_softmax_attention(channel_softmax(query), key, value, is_causal=self.is_causal, key_positions=key_positions, segment_ids=segment_ids,
                                          implementation=self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        if not self.is_causal:
            raise NotImplementedError("is_causal=False: every token sees the whole sequence, so there is no streaming form; use is_causal=True")
        return position_softmax_init(batch, kv_heads, key_size, value_size, dtype=jnp.promote_types(dtype, jnp.float32))

    def step(self, state, query, key, value):
        out, state = position_softmax_attention(channel_softmax(query), key, value, initial_state=state, return_state=True, implementation=self.implementation)
        return state, out


def position_softmax(*, is_causal: bool = True, implementation: str | None = None) -> PositionSoftmax:
    """:func:`position_softmax_attention` with the queries' softmax over channels as weights, as an :class:`attnx.Mechanism`.

    Args:
      is_causal, implementation: as there. Causal, its state is of constant size; otherwise there is no streaming form.

    >>> import jax.numpy as jnp
    >>> from attnx.nn import Attention
    >>> from flax import nnx
    >>> layer = Attention(16, 2, mechanism=position_softmax(), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 16))).shape
    (1, 5, 16)
    """
    return PositionSoftmax(bool(is_causal), implementation)


def channel_softmax(query: Float[Array, "B T N L"]) -> Float[Array, "B T N L"]:
    """The softmax of each query over its channels, computed in at least float32.

    >>> import jax.numpy as jnp
    >>> channel_softmax(jnp.zeros((1, 1, 1, 4)))[0, 0, 0]
    Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    checks.check_array("query", query)
    return jax.nn.softmax(query.astype(accumulator_dtype(query.dtype)), axis=-1).astype(query.dtype)
