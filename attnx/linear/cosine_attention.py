"""Cottention: linear attention of cosines, divided by a learned power of the number of tokens instead of a sum of weights.

Mongaras, Dohm, Larson: "Cottention: Linear Transformers With Cosine Attention" (2024, arXiv 2409.18747). With g = sigmoid(m), m one number a head,

    o_t = sum over s <= t of cos(q_t, k_s) v_s / s^g          or, not causal, over all n tokens, / n^g

without softmax, row sums or 1 / sqrt(H): weights lie in [-1, 1] and may be negative. As written, the sum is divided by t^g; the released decoder divides each value by
s^g before it is added, which is not the same but for g = 0, and trains well. Both are here. s and t count the tokens that can be seen, so that padding changes nothing.

The released recurrent code counts padding too, the released parallel code does not; here both forms do as the latter.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks, linear
from attnx.linear.feature_maps import unit
from attnx.mechanism import skipped
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes
from pallas_kernels.tile import accumulator_dtype

NORMS = ("key", "query")


def cosine_linear_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], m: Float[Array, " K"], *,
                            is_causal: bool = True, norm_by: str = "key", key_mask: Bool[Array, "B S"] | None = None,
                            segment_ids: Int[Array, "B T"] | None = None, chunk_size: int | None = None, implementation: str | None = None, axis_name=None):
    """Cosines times values, divided by a power of how many tokens there are.

    ::

        o_t = sum over s <= t of  cos(q_t, k_s) v_s c_s^-g                g = sigmoid(m), c the number of tokens seen so far; norm_by "key"
        o_t = c_t^-g  sum over s <= t of  cos(q_t, k_s) v_s               norm_by "query"

    Not causal, s runs over all keys and c is their number, so both are the same.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K; S = T where causal.
      value: [B, S, K, Hv].
      m: real [K], the logit of the exponent of each key-value head. 0.5 to begin with.
      is_causal: whether a token sees nothing later than itself.
      norm_by: "key" or "query".
      key_mask: booleans [B, S], the keys that are there; the others are not counted.
      segment_ids: int32 [B, T], S = T: documents that do not see each other, each counted from one; tokens of negative ids are padding, skipped and zero in the output.
      chunk_size, implementation, axis_name: as for :func:`attnx.linear_attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype; 0 where there is nothing to attend to, and where the query is 0.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T (C (H + Hv) + H Hv)) time a head, C tokens a chunk, and O(T (H + Hv)) memory, forward and backward.

    Source: Gabriel Mongaras, Trevor Dohm, Eric C. Larson, "Cottention: Linear Transformers With Cosine Attention", 2024, arXiv 2409.18747.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 4, 1, 1))
    >>> cosine_linear_attention(x, x, x, jnp.array([40.0]), norm_by="query")[0, :, 0, 0].round(5)  # g = 1: a mean
    Array([1., 1., 1., 1.], dtype=float32)
    >>> cosine_linear_attention(x, x, x, jnp.array([-40.0]))[0, :, 0, 0]  # g = 0: a sum
    Array([1., 2., 3., 4.], dtype=float32)
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    m = _check(m, key, norm_by)
    options = dict(is_causal=is_causal, key_mask=key_mask, segment_ids=segment_ids, chunk_size=chunk_size, axis_name=axis_name)
    ones = lambda x: jnp.ones_like(x, jnp.float32, shape=(*x.shape[:2], 1, 1))
    count = linear.linear_attention(ones(query), ones(key), ones(key), **options)[..., 0]  # a sum over ones is what the engine counts
    divided = partial(_divided, power=_power(count, m, accumulator_dtype(query.dtype)))
    attend = partial(linear.linear_attention, feature_map=unit, implementation=implementation, **options)
    if is_causal and norm_by == "key":
        return attend(query, key, divided(value))
    return divided(attend(query, key, value))


def _check(m, key, norm_by):
    if norm_by not in NORMS:
        raise ValueError(f"norm_by: expected one of {NORMS}, got {norm_by!r}")
    m = checks.check_real("m", m, ranks=(1,))
    if m.shape != key.shape[2:3]:
        raise ValueError(f"m: expected shape {[key.shape[2]]}, one for each key-value head, got {checks.describe(m)}")
    return m


def _power(count, m, dtype):
    """count^-g: [B, T, 1] and [K] to [B, T, K]."""
    return jnp.exp(-jax.nn.sigmoid(m.astype(dtype)) * jnp.log(jnp.maximum(count, 1).astype(dtype)))


def _divided(x, power):
    """x [B, T, N, Hv] times ``power`` [B, T, K] of the head of its group."""
    return (x * jnp.repeat(power, x.shape[2] // power.shape[2], axis=2)[..., None]).astype(x.dtype)


class CottentionState(NamedTuple):
    """The sum of keys times values, [B, K, H, Hv], and how many tokens there were, [B]."""

    memory: Float[Array, "B K H Hv"]
    count: Int[Array, " B"]


def cosine_attention_init(batch: int, heads: int, key_size: int, value_size: int, *, dtype=jnp.float32) -> CottentionState:
    """The state before the first token: B, K, H, Hv numbers, float32 or wider, and of that size whatever comes.

    >>> cosine_attention_init(1, 2, 4, 8).memory.shape
    (1, 2, 4, 8)
    """
    return CottentionState(linear.init(batch, heads, key_size, value_size, dtype=accumulator_dtype(dtype)).memory, jnp.zeros(batch, jnp.int32))


def cosine_attention_step(state: CottentionState, query: Float[Array, "B t N H"], key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"], m: Float[Array, " K"],
                          *, norm_by: str = "key", **options) -> tuple[CottentionState, Float[Array, "B t N Hv"]]:
    """The next t tokens of causal :func:`cosine_linear_attention`: ``(state, out)``.

    Args:
      state: from :func:`cosine_attention_init` or the step before.
      query, key, value, m, norm_by: as there; t = 1 decodes, t > 1 prefills.
      **options: chunk_size, implementation as there.

    Cost: O(H Hv) a token and head.

    >>> import jax.numpy as jnp
    >>> state, x, m = cosine_attention_init(1, 1, 1, 1), jnp.ones((1, 1, 1, 1)), jnp.array([40.0])
    >>> for _ in range(3):
    ...     state, out = cosine_attention_step(state, x, 3 * x, x, m, norm_by="query")
    >>> round(out.item(), 5), state.count.item()
    (1.0, 3)
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    m = _check(m, key, norm_by)
    count = state.count[:, None, None] + 1 + jnp.arange(query.shape[1])[:, None]
    divided = partial(_divided, power=_power(count, m, state.memory.dtype))
    inner, out = linear.step(linear.LinearState(state.memory), query, key, divided(value) if norm_by == "key" else value, feature_map=unit, **options)
    return CottentionState(inner.memory, state.count + query.shape[1]), out if norm_by == "key" else divided(out)


class CottentionMechanism(nnx.Module):
    """:func:`cosine_linear_attention` with its exponents, as an :class:`attnx.Mechanism`; made by :class:`CottentionAttention`."""

    def __init__(self, num_kv_heads: int, *, is_causal: bool, norm_by: str, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None):
        del rngs  # nothing is random
        self.m = nnx.Param(jnp.full(num_kv_heads, 0.5, param_dtype), **logical_axes("kv_heads"))
        self.is_causal, self.norm_by = is_causal, norm_by

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        told = skipped(query, key, query_positions, key_positions, segment_ids, is_causal=self.is_causal)
        return cosine_linear_attention(query, key, value, self.m[...], is_causal=self.is_causal, norm_by=self.norm_by, **told)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        if not self.is_causal:
            raise NotImplementedError("is_causal=False: every token reads the sum over all, so there is no streaming form; use is_causal=True")
        return cosine_attention_init(batch, kv_heads, key_size, value_size, dtype=dtype)

    def step(self, state, query, key, value):
        return cosine_attention_step(state, query, key, value, self.m[...], norm_by=self.norm_by)


class CottentionAttention(Attention):
    """Multi-head :func:`cosine_linear_attention`: projections without biases and the exponents m.

    Args:
      features, num_heads: as for :class:`attnx.nn.Attention`, as are all options but the mechanism; ``position=Rotary(fraction=...)`` turns queries and keys
        before they are normalised.
      is_causal: for a decoder (True) or an encoder.
      norm_by: as there.

    >>> layer = CottentionAttention(32, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, is_causal: bool = True, norm_by: str = "key", rngs: nnx.Rngs, **options):
        if norm_by not in NORMS:
            raise ValueError(f"norm_by: expected one of {NORMS}, got {norm_by!r}")
        mechanism = partial(CottentionMechanism, options.get("num_kv_heads") or num_heads, is_causal=is_causal, norm_by=norm_by,
                            param_dtype=options.get("param_dtype", jnp.float32))
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
