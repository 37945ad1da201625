"""Infini-attention: softmax attention within segments, and a compressive memory of fixed size of all segments before.

Munkhdalai, Faruqui, Gopal: "Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention" (2024, arXiv 2404.07143). With sigma = elu + 1, for
segment s of each head:

    retrieve     A_mem = sigma(Q) M_(s-1) / (sigma(Q) z_(s-1))                       0 where the memory is empty
    attend       A_dot = causal softmax(rope(Q) rope(K)^T / sqrt(H)) V               within the segment
    combine      out   = g A_mem + (1 - g) A_dot                                     g = sigmoid(beta), one number a head
    update       M_s   = M_(s-1) + sigma(K)^T V,      z_s = z_(s-1) + sum sigma(K)   "linear"
                 M_s   = M_(s-1) + sigma(K)^T (V - sigma(K) M_(s-1) / (sigma(K) z_(s-1)))      "delta": what the memory knows already is not added again

Both rules read the memory as it was before the segment. It is addressed by queries and keys without positions. Its size does not depend on the length, so
neither do the memory and the time for a token. A port that is much used has the gate the other way round, on the local part.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks, linear
from attnx.core.attention import attention
from attnx.core.linear import LinearState, elu_plus_one
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.mechanism import skipped
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes
from attnx.nn.frozen import hold, release
from pallas_kernels.tile import accumulator_dtype

RULES = ("linear", "delta")

_memory = partial(linear.linear_attention, is_causal=False, normalize=True, feature_map=elu_plus_one)


def memory_retrieve(query: Float[Array, "B T N H"], memory: LinearState) -> Float[Array, "B T N Hv"]:
    """What the memory answers, ``sigma(q) M / (sigma(q) z)``.

    Args:
      query: [B, T, N, H], without positions.
      memory: M [B, K, H, Hv] and z [B, K, H], N a multiple of K; see :func:`attnx.core.linear.init`.

    Returns:
      [B, T, N, Hv] in the query's dtype; 0 of an empty memory.

    Cost: O(T H Hv) a head.

    >>> memory = linear.init(1, 1, 2, 3, normalize=True)
    >>> memory_retrieve(jnp.ones((1, 1, 1, 2)), memory)[0, 0, 0].tolist()
    [0.0, 0.0, 0.0]
    """
    heads, _, value_size = memory.memory.shape[1:]
    nothing = lambda size: jnp.zeros((query.shape[0], 0, heads, size), query.dtype)
    return _memory(query, nothing(query.shape[3]), nothing(value_size), initial_state=memory)


def memory_update(key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], memory: LinearState, *, rule: str = "linear",
                  key_mask: Bool[Array, "B T"] | None = None) -> LinearState:
    """The memory after a segment.

    Args:
      key, value: [B, T, K, H] and [B, T, K, Hv], keys without positions.
      memory: M and z before it.
      rule: "linear" (associations are added), or "delta" (less what the memory answers to their keys already).
      key_mask: booleans [B, T], the tokens that are there.

    Returns:
      M and z after it.

    Cost: O(T H Hv) a head.

    >>> memory, x = linear.init(1, 1, 2, 2, normalize=True), jnp.ones((1, 1, 1, 2))
    >>> for rule in ("linear", "delta"):
    ...     once = memory_update(x, 3 * x, memory, rule=rule)
    ...     twice = memory_update(x, 3 * x, once, rule=rule)
    ...     print(once.memory[0, 0, 0].tolist(), twice.memory[0, 0, 0].tolist())
    [6.0, 6.0] [12.0, 12.0]
    [6.0, 6.0] [6.0, 6.0]
    """
    _check_rule(rule)
    if rule == "delta":
        key, value = (x.astype(memory.memory.dtype) for x in (key, value))
        value = value - memory_retrieve(key, memory)
    return _memory(key[:, :0], key, value, initial_state=memory, key_mask=key_mask, return_state=True)[1]


def _check_rule(rule):
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")


def infini_segment(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], memory: LinearState, beta: Float[Array, " N"], *,
                   rule: str = "linear", position: Callable | None = None, scale: float | None = None, implementation: str | None = None):
    """One segment: ``(out [B, T, N, Hv], memory after it)``.

    Args:
      query, key, value: of its tokens.
      memory: of all segments before; ``attnx.core.linear.init(B, K, H, Hv, normalize=True)`` for none.
      beta: real [N], logits of the memory's share.
      rule, position, scale, implementation: as for :func:`infini_attention`.

    >>> import attnx, jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
    >>> out, memory = infini_segment(q, k, v, linear.init(1, 2, 4, 4, normalize=True), jnp.zeros(2))
    >>> bool(jnp.allclose(out, attnx.attention(q, k, v, mask=attnx.masks.causal()) / 2, atol=1e-6))
    True
    """
    query, key, value = _check(query, key, value, beta, rule)
    cut = partial(jnp.expand_dims, axis=1)
    turned = (query, key) if position is None else position(query, key, None, None)
    everywhere = jnp.zeros((query.shape[0], 1, query.shape[1]), jnp.int32)
    return _segments(*map(cut, (query, key, value, *turned)), everywhere >= 0, everywhere, memory, beta, rule, scale=scale, implementation=implementation)


def infini_attention(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], beta: Float[Array, " N"], *,
                     segment_length: int = 2048, rule: str = "linear", position: Callable | None = None, positions: Int[Array, "*B T"] | None = None,
                     segment_ids: Int[Array, "B T"] | None = None, stop_gradient_every: int | None = None, scale: float | None = None,
                     implementation: str | None = None, block_sizes: tuple[int, int] | None = None) -> Float[Array, "B T N Hv"]:
    """Causal attention within segments and to a compressive memory of the segments before.

    ::

        out = g A_mem + (1 - g) A_dot,        g = sigmoid(beta)                 see above

    Args:
      query: [B, T, N, H], without positions.
      key: [B, T, K, H], N a multiple of K.
      value: [B, T, K, Hv].
      beta: real [N], logits of the memory's share: large for the memory alone, and very negative for segments alone.
      segment_length: tokens of a segment; the last may be shorter.
      rule: by which the memory is updated, "linear" or "delta".
      position: ``(query, key, query_positions, key_positions) -> (query, key)`` such as :class:`attnx.positions.Rotary`, for attention within segments.
      positions: int32 [T] or [B, T], for that; 0, 1, 2, ... by default.
      segment_ids: int32 [B, T], documents that do not see each other (segments are cut where they were); tokens of negative ids are padding, skipped and zero in the
        output.
      stop_gradient_every: no gradient flows into the memory before every so many segments; None: through all.
      scale: of attention within segments, 1 / sqrt(H) by default.
      implementation, block_sizes: by which it is computed, as for :func:`attnx.attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost a head: O(T (L H + H Hv)) time with segments of L, O(T (H + Hv) + T H Hv / L) memory where differentiated.

    Source: Tsendsuren Munkhdalai, Manaal Faruqui, Siddharth Gopal, "Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention", 2024,
    arXiv 2404.07143.

    >>> import jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 10, 2, 4))
    >>> infini_attention(q, k, v, jnp.zeros(2), segment_length=4).shape
    (1, 10, 2, 4)
    """
    query, key, value = _check(query, key, value, beta, rule)
    (b, t, n, _), size = query.shape, min(checks.check_integer("segment_length", segment_length, least=1), max(query.shape[1], 1))
    if stop_gradient_every is not None:
        checks.check_integer("stop_gradient_every", stop_gradient_every, least=1)
    ids = jnp.zeros((b, t), jnp.int32) if segment_ids is None else checks.check_integers("segment_ids", segment_ids, ranks=(2,))
    if ids.shape != (b, t):
        raise ValueError(f"segment_ids: expected shape {[b, t]}, got {checks.describe(segment_ids)}")
    if not t:
        return jnp.zeros((b, t, n, value.shape[3]), query.dtype)
    runs = jnp.zeros_like(ids) if segment_ids is None else jnp.cumsum(linear.restarts(ids), axis=1)
    turned = (query, key) if position is None else position(query, key, positions, positions)
    memory = linear.init(b, key.shape[2], key.shape[3], value.shape[3], normalize=True, dtype=accumulator_dtype(query.dtype))
    cut = partial(_cut, size=size)
    out, _ = _segments(*map(cut, (query, key, value, *turned)), cut(ids + 1) > 0, cut(runs, mode="edge"), memory, beta, rule, apart=segment_ids is not None,
                       stop_gradient_every=stop_gradient_every, scale=scale, implementation=implementation, block_sizes=block_sizes)
    return out[:, :t]


def _check(query, key, value, beta, rule):
    query, key, value = checks.check_query_key_value(query, key, value)
    _check_rule(rule)
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key: expected the query's length {query.shape[1]}, got {checks.describe(key)}")
    if checks.check_real("beta", beta, ranks=(1,)).shape != query.shape[2:3]:
        raise ValueError(f"beta: expected shape {[query.shape[2]]}, one for each query head, got {checks.describe(beta)}")
    return query, key, value


def _cut(x, size, mode="constant"):
    """[B, T, ...] in segments, [B, S, size, ...]."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)], mode=mode)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _segments(query, key, value, turned_query, turned_key, seen, runs, memory, beta, rule, *, closed=None, apart=False, stop_gradient_every=None, **options):
    """Segments [B, S, L, ...]: ``(out [B, S L, N, Hv], memory)``.

    ``seen`` [B, S, L] says which tokens there are, ``runs`` in which document, by rising numbers of which the memory has the first's to begin with; ``apart`` whether
    there are several. Segments from the index ``closed`` on are not added to the memory.
    """
    (b, count, size), heads = seen.shape, query.shape[3]
    flat = lambda x: x.reshape(b * count, *x.shape[2:])
    mask = causal() & documents(flat(runs)) if apart else causal()
    places = jnp.arange(size, dtype=jnp.int32)
    local = attention(flat(turned_query), flat(turned_key), flat(value), mask=mask, key_positions=jnp.where(flat(seen), places, -1), **options)

    def segment(carry, new):
        memory, of = carry
        index, query, key, value, seen, runs = new
        if stop_gradient_every is not None:
            memory = jax.tree.map(lambda x: jnp.where(index % stop_gradient_every == 0, lax.stop_gradient(x), x), memory)
        found = jnp.where((runs == of[:, None])[..., None, None], memory_retrieve(query, memory), 0)
        last = runs[:, -1]
        same = (last == of)[:, None, None]
        kept = LinearState(jnp.where(same[..., None], memory.memory, 0), jnp.where(same, memory.normalizer, 0))
        updated = memory_update(key, value, kept, rule=rule, key_mask=seen & (runs == last[:, None]))
        if closed is not None:
            updated = jax.tree.map(lambda old, new: jnp.where(index < closed, new, old), memory, updated)
        return (updated, last), found

    by_segment = (jnp.arange(count), *(jnp.moveaxis(x, 1, 0) for x in (query, key, value, seen, runs)))
    (memory, _), found = lax.scan(segment, (memory, runs[:, 0, 0]), by_segment)
    out = _combined(jnp.moveaxis(found, 0, 1).reshape(local.shape), local, beta)
    return jnp.where(seen.reshape(b, -1, 1, 1), out.reshape(b, count * size, heads, -1), 0), memory


def _combined(found, local, beta):
    share = jax.nn.sigmoid(beta.astype(accumulator_dtype(local.dtype)))[:, None]
    return (share * found + (1 - share) * local).astype(local.dtype)


class InfiniState(NamedTuple):
    """The memory of all closed segments, the keys (without positions) and values of the open one, [B, L, K, H] and [B, L, K, Hv], and how many tokens there were."""

    memory: LinearState
    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K Hv"]
    next: Int[Array, ""]


def infini_init(batch: int, heads: int, key_size: int, value_size: int, *, segment_length: int = 2048, dtype=jnp.float32) -> InfiniState:
    """The state before the first token: K (H (Hv + 1) + L (H + Hv)) numbers for each of the batch, whatever comes.

    Args:
      batch, heads, key_size, value_size, segment_length: B, K, H, Hv, L.
      dtype: of keys and values; the memory is float32, or float64 for that.

    >>> infini_init(1, 2, 4, 8, segment_length=16).value.shape
    (1, 16, 2, 8)
    """
    buffer = lambda size: jnp.zeros((batch, segment_length, heads, size), dtype)
    memory = linear.init(batch, heads, key_size, value_size, normalize=True, dtype=accumulator_dtype(dtype))
    return InfiniState(memory, buffer(key_size), buffer(value_size), jnp.zeros((), jnp.int32))


def infini_step(state: InfiniState, query: Float[Array, "B t N H"], key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"], beta: Float[Array, " N"], *,
                rule: str = "linear", position: Callable | None = None, scale: float | None = None) -> tuple[InfiniState, Float[Array, "B t N Hv"]]:
    """The next t tokens of :func:`infini_attention`: ``(state, out)``.

    A segment that closes is added to the memory.

    Args:
      state: from :func:`infini_init`, which says how long segments are, or the step before.
      query, key, value, beta, rule, position, scale: as there; positions are 0, 1, 2, ... from the first token on.

    Cost a head: O(L H + H Hv) for a token, O(t (L H + H Hv)) for t of them at once.

    >>> state, x = infini_init(1, 1, 1, 1, segment_length=2), jnp.ones((1, 1, 1, 1))
    >>> for _ in range(3):
    ...     state, out = infini_step(state, x, x, x, jnp.array([40.0]))
    >>> out.item(), state.memory.normalizer.item()  # the third token finds the memory of the first two
    (1.0, 4.0)
    """
    query, key, value = _check(query, key, value, beta, rule)
    (b, t), size = query.shape[:2], state.key.shape[1]
    if not t:
        return state, jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    at = state.next % size
    slots = size if t == 1 else -(-(size - 1 + t) // size) * size  # enough wherever the segment stands
    places = jnp.arange(slots, dtype=jnp.int32)

    def placed(buffer, x):
        wide = jnp.zeros((b, slots, *x.shape[2:]), buffer.dtype)
        return lax.dynamic_update_slice_in_dim(lax.dynamic_update_slice_in_dim(wide, buffer, 0, 1), x.astype(buffer.dtype), at, 1)

    keys, values = placed(state.key, key), placed(state.value, value)
    closed = (at + t) // size
    if t == 1:
        turned, turned_keys, near = query, keys.astype(query.dtype), values.astype(query.dtype)
        if position is not None:
            turned, turned_keys = position(turned, turned_keys, state.next[None], state.next - at + places)
        local = attention(turned, turned_keys, near, mask=causal(), scale=scale, query_positions=at[None], key_positions=places)
        out = _combined(memory_retrieve(query, state.memory), local, beta)
        memory = lax.cond(closed > 0, lambda memory: memory_update(keys, values, memory, rule=rule), lambda memory: memory, state.memory)
        return InfiniState(memory, keys, values, state.next + 1), out
    queries = placed(jnp.zeros((b, size, *query.shape[2:]), query.dtype), query)
    given = queries, keys.astype(query.dtype), values.astype(query.dtype)
    turned = given[:2] if position is None else position(*given[:2], state.next - at + places, state.next - at + places)
    seen = jnp.broadcast_to(places < at + t, (b, slots))
    cut = partial(_cut, size=size)
    out, memory = _segments(*map(cut, (*given, *turned)), cut(seen), cut(jnp.zeros((b, slots), jnp.int32)), state.memory, beta, rule, closed=closed, scale=scale)
    rest = lambda x: lax.dynamic_slice_in_dim(jnp.pad(x, ((0, 0), (0, size), (0, 0), (0, 0))), closed * size, size, 1)
    return InfiniState(memory, rest(keys), rest(values), state.next + t), lax.dynamic_slice_in_dim(out, at, t, 1)


class InfiniMechanism(nnx.Module):
    """:func:`infini_attention` with its gates, as an :class:`attnx.Mechanism`; made by :class:`InfiniAttention`."""

    def __init__(self, num_heads: int, *, segment_length: int, rule: str, position: Callable | None, stop_gradient_every: int | None, implementation: str | None,
                 param_dtype=jnp.float32, rngs: nnx.Rngs | None = None):
        del rngs  # nothing is random
        self.beta = nnx.Param(jnp.zeros(num_heads, param_dtype), **logical_axes("heads"))
        self.segment_length, self.rule, self.position = segment_length, rule, hold(position)
        self.stop_gradient_every, self.implementation = stop_gradient_every, implementation

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        told = skipped(query, key, query_positions, key_positions, segment_ids)
        return infini_attention(query, key, value, self.beta[...], segment_length=self.segment_length, rule=self.rule, position=release(self.position),
                                positions=query_positions, segment_ids=told["segment_ids"], stop_gradient_every=self.stop_gradient_every,
                                implementation=self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        return infini_init(batch, kv_heads, key_size, value_size, segment_length=self.segment_length, dtype=dtype)

    def step(self, state, query, key, value):
        return infini_step(state, query, key, value, self.beta[...], rule=self.rule, position=release(self.position))


class InfiniAttention(Attention):
    """Multi-head :func:`infini_attention` with its gates beta, 0 to begin with.

    Args:
      features, num_heads: as for :class:`attnx.nn.Attention`, as are all options but the mechanism.
      segment_length, rule, stop_gradient_every, implementation: as there.
      position: of attention within segments, e.g. ``attnx.positions.Rotary()``; the memory has none.

    >>> layer = InfiniAttention(32, 4, segment_length=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, segment_length: int = 2048, rule: str = "linear", position: Callable | None = None,
                 stop_gradient_every: int | None = None, implementation: str | None = None, rngs: nnx.Rngs, **options):
        _check_rule(rule)
        mechanism = partial(InfiniMechanism, num_heads, segment_length=checks.check_integer("segment_length", segment_length, least=1), rule=rule, position=position,
                            stop_gradient_every=stop_gradient_every, implementation=implementation, param_dtype=options.get("param_dtype", jnp.float32))
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
