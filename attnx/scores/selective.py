"""Selective attention: tokens tell those after them what may be forgotten, and a cache forgets it.

Leviathan, Kalman, Matias: "Selective Attention Improves Transformer" (ICLR 2025, arXiv 2410.02703). One head's scores, besides being its own, are read as opinions: a
positive score of token m for token j says that nobody after m needs j. What all tokens before i have said against j is taken off every head's score:

    S = causal scores,      G_mj = relu(S_mj, one head) for 0 < j < m, else 0,      F_ij = sum over m < i of G_mj,      out = softmax(S - F) V

No parameters are added. A token never speaks against itself or the first token, and its word counts only for queries after it, so that F_ij = 0 up to i = j + 1.
The scores of a row depend on all rows before, which no fold over key blocks can do: rows are made in blocks of queries, F going from block to block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import cache, checks
from attnx.core.halves import attend_scores, attention_scores
from attnx.core.row_blocks import IMPLEMENTATIONS, rows_at_once, scan_rows
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.nn.attention import Attention
from attnx.nn.frozen import release
from pallas_kernels.parts import part, static


def selection_penalty(scores: Float[Array, "B T S"], *, counted: Bool[Array, "#B T S"] | None = None) -> Float[Array, "B T S"]:
    """What the tokens before each query hold against each key.

    ::

        F_ij = sum over m < i of relu(s_mj) where counted_mj

    Args:
      scores: [B, T, S], one head's; the T queries are the last of the S tokens.
      counted: booleans [B or 1, T, S], whose opinion of whom counts; by default that of every token of those before it but the first of all.

    Returns:
      [B, T, S] in float32 (float64 for float64), at least 0 and never falling with i; 0 for the first query.

    Cost: O(T S).

    >>> selection_penalty(jnp.ones((1, 4, 4)))[0]
    Array([[0., 0., 0., 0.],
           [0., 0., 0., 0.],
           [0., 0., 0., 0.],
           [0., 1., 0., 0.]], dtype=float32)
    """
    scores = checks.check_real("scores", scores, ranks=(3,))
    t, s = scores.shape[1:]
    if counted is None:
        keys = jnp.arange(s)
        counted = (keys < jnp.arange(t)[:, None] + s - t) & (keys > 0)
    return _penalties(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), counted)[0]


def _penalties(scores, counted):
    """F of each row, and what all rows together add."""
    opinions = jnp.where(counted, jax.nn.relu(scores), 0)
    total = jnp.cumsum(jnp.pad(opinions, ((0, 0), (1, 0), (0, 0))), axis=1)  # shifted before it is summed, so that nothing is exactly 0
    return total[:, :-1], total[:, -1]


class Selection(NamedTuple):
    """What selective attention finds besides its output.

    Attributes:
      penalty: [B, S], what all tokens so far hold against each key: F of the next query.
      memory: [B, T], how many keys each query has use for: sum over visible j of 1 - min(F_ij, tau) / tau.
    """

    penalty: Float[Array, "B S"]
    memory: Float[Array, "B T"]


def selective_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *, head: int = 0, bos: int | None = 0,
                        scale: float | None = None, segment_ids: Int[Array, "B S"] | None = None, query_positions: Int[Array, "*B T"] | None = None,
                        key_positions: Int[Array, "*B S"] | None = None, penalty: Float[Array, "B S"] | None = None, tau: float = 1.0,
                        return_selection: bool = False, implementation: str | None = None, block_size: int | None = None):
    """Causal softmax attention less what earlier tokens hold against each key.

    ::

        out_i = sum over j <= i of softmax_j(scale q_i . k_j - F_ij) v_j,      F_ij = sum over m < i of relu(scale q_m . k_j, one head) for 0 < j < m

    Args:
      query: [B, T, N, H], the last T of the S tokens, in the order of their positions.
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      head: the query head whose scores are the opinions.
      bos: the position of a token that nobody speaks against, or None. With ``segment_ids`` the first token of each document is one too.
      scale: of the dot products; 1 / sqrt(H) by default.
      segment_ids: int32 [B, S], documents that do not see each other.
      query_positions, key_positions: int32 [T] or [B, T] ([S] or [B, S]), -1 is padding, which neither is seen nor speaks. By default 0, 1, 2, ... for keys, and
        the last of the keys' for queries.
      penalty: [B, S], what tokens before these queries hold against each key; 0 by default.
      tau: the penalty at which a key counts as forgotten, in ``memory``.
      return_selection: whether to return a :class:`Selection` too.
      implementation: "reference" (all rows at once), "blockwise" (blocks of queries), None for the latter.
      block_size: queries of a block; chosen by default.

    Returns:
      [B, T, N, Hv] in the query's dtype; with return_selection the pair of it and the selection. Differentiable, through the penalties too.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(T S) time; memory O(T + S), N block S scores, and in the backward pass T / block penalties of S.

    >>> import attnx, jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> silent = q.at[:, :, 0].set(0)  # a head that has no opinions
    >>> bool(jnp.allclose(selective_attention(silent, k, v), attnx.attention(silent, k, v, mask=attnx.masks.causal()), atol=1e-6))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    (batch, length, heads, _), total = query.shape, key.shape[1]
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    head = checks.check_integer("head", head, least=0, most=heads - 1)
    if block_size is not None:
        block_size = checks.check_integer("block_size", block_size, least=1)
    if length > total:
        raise ValueError(f"query: expected at most as many tokens as key has ({total}), the last of them, got {length}")
    if segment_ids is not None and (segment_ids := checks.check_integers("segment_ids", segment_ids, ranks=(2,))).shape != (batch, total):
        raise ValueError(f"segment_ids: expected shape {[batch, total]} ([B, S]), got {checks.describe(segment_ids)}")
    if penalty is not None and jnp.shape(penalty) != (batch, total):
        raise ValueError(f"penalty: expected shape {[batch, total]} ([B, S]), got {checks.describe(penalty)}")
    if not tau > 0:
        raise ValueError(f"tau: expected a number above 0, got {tau}")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    places = jnp.arange(total, dtype=jnp.int32) if key_positions is None else checks.check_positions("key_positions", key_positions, batch, total)
    places = jnp.broadcast_to(places, (batch, total))
    positions = places[:, total - length:] if query_positions is None else checks.check_positions("query_positions", query_positions, batch, length)
    spared = jnp.zeros((batch, total), bool) if bos is None else places == bos
    if segment_ids is not None:
        spared |= jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    groups, values = heads // key.shape[2], jnp.moveaxis(value, 1, 2)[:, :, None]

    def block(penalty, rows):
        query, positions, ids = rows
        mask = causal() if ids is None else causal() & documents(ids, segment_ids)
        s, seen = attention_scores(query, key, scale=scale, mask=mask, query_positions=positions, key_positions=places)
        counted = seen[:, head] & ~spared[:, None] & (places[:, None] != positions[..., None])
        against, more = _penalties(s[:, head], counted)
        against += penalty[:, None]
        split = lambda x: x.reshape(batch, -1, groups, *x.shape[2:])
        out = attend_scores(split(s - against[:, None]), values, mask=split(seen))
        needed = jnp.sum(jnp.where(seen[:, head], 1 - jnp.minimum(against, tau) / tau, 0), axis=-1)
        return penalty + more, (jnp.moveaxis(out.reshape(batch, heads, *out.shape[3:]), 1, 2), needed)

    rows = (query, jnp.broadcast_to(positions, (batch, length)), None if segment_ids is None else segment_ids[:, total - length:])
    start = jnp.zeros((batch, total), wide) if penalty is None else jnp.asarray(penalty, wide)
    after, (out, memory) = scan_rows(block, start, rows, block_size=rows_at_once(implementation, block_size, length))
    return (out, Selection(after, memory)) if return_selection else out


def memory_loss(penalty: Float[Array, "... T S"], *, tau: float = 1.0, allowed: Bool[Array, "... T S"] | None = None) -> Float[Array, "..."]:
    """How many keys a layer must keep at its worst: what a model is charged for, to make it forget.

    ::

        M = max over i of  sum over allowed j of  1 - min(F_ij, tau) / tau

    The paper trains on ``cross entropy + 0.1 * (mean over layers of M) / T``, T counting tokens that are no padding. Where the penalties were never materialised the
    same is ``selection.memory.max(-1)``, see :class:`Selection` and :meth:`SelectiveAttention.selection`.

    Args:
      penalty: [..., T, S], F; the T queries are the last of the S tokens.
      tau: the penalty at which a key counts as forgotten.
      allowed: booleans that broadcast to it, causal by default.

    Returns:
      [...], from 0 to S.

    >>> float(memory_loss(jnp.zeros((5, 5))))
    5.0
    """
    t, s = penalty.shape[-2:]
    allowed = jnp.tril(jnp.ones((t, s), bool), s - t) if allowed is None else allowed
    return jnp.max(jnp.sum(jnp.where(allowed, 1 - jnp.minimum(penalty, tau) / tau, 0), axis=-1), axis=-1, initial=0)


class SelectiveState(NamedTuple):
    """A cache from which each sequence of the batch may evict other keys: the position in each slot (-1: empty), what is held against it, and the next position."""

    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K Hv"]
    positions: Int[Array, "B L"]
    penalty: Float[Array, "B L"]
    next: Int[Array, ""]


def prune_cache(state: SelectiveState, budget: int | Int[Array, ""]) -> SelectiveState:
    """The cache with no more than ``budget`` keys a sequence: those go that have the most held against them, the oldest among equals, and never come back.

    Args:
      state: of :class:`SelectiveMechanism`.
      budget: how many keys stay, traced or not.

    Returns:
      The state with the slots of the others empty.

    Cost: a sort of L slots.

    >>> state = SelectiveMechanism().init(1, 4, 1, 2, 2, jnp.float32)
    >>> state = state._replace(positions=jnp.array([[0, 1, 2, -1]]), penalty=jnp.array([[0.0, 3.0, 1.0, 0.0]]))
    >>> prune_cache(state, 2).positions.tolist()
    [[0, -1, 2, -1]]
    """
    order = jnp.lexsort((-state.positions, state.penalty, state.positions < 0), axis=-1)
    kept = (jnp.argsort(order, axis=-1) < budget) & (state.positions >= 0)
    return state._replace(positions=jnp.where(kept, state.positions, -1), penalty=jnp.where(kept, state.penalty, 0))


def allocate_budgets(loss: Callable[[tuple[int, ...]], float], layers: int, length: int, *, step: int = 8, least: int = 1,
                     until: Callable[[tuple[int, ...], float], bool] | None = None) -> list[tuple[tuple[int, ...], float]]:
    """Shares memory out among layers, greedily: again and again the layer that can best do without is given ``step`` keys less.

    Args:
      loss: ``loss(budgets) -> float``, what the model loses on held-out text with caches of so many keys, one number a layer.
      layers: how many.
      length: the budget of each to begin with: the longest sequence.
      step: how much a budget is lowered at a time.
      least: the lowest budget.
      until: ``until(budgets, loss) -> bool``, whether to stop there; by default once no budget can be lowered.

    Returns:
      ``[(budgets, loss), ...]`` from full budgets on, one entry a reduction.

    Cost: ``layers`` evaluations a reduction.

    >>> path = allocate_budgets(lambda budgets: -3 * budgets[0] - budgets[1], 2, 20, step=5, until=lambda budgets, loss: sum(budgets) <= 25)
    >>> path[-1]
    ((20, 5), -65.0)
    """
    budgets = (length,) * checks.check_integer("layers", layers, least=1)
    path = [(budgets, float(loss(budgets)))]
    while until is None or not until(*path[-1]):
        lowered = [budgets[:i] + (budget - step,) + budgets[i + 1:] for i, budget in enumerate(budgets) if budget - step >= least]
        if not lowered:
            break
        path.append(min(((each, float(loss(each))) for each in lowered), key=lambda found: found[1]))
        budgets = path[-1][0]
    return path


@part
class SelectiveMechanism:
    """:func:`selective_attention` as an :class:`attnx.Mechanism`; ``budget``: how many keys a step may see at the most, all by default."""

    head: int = static(default=0)
    bos: int | None = static(default=0)
    scale: float | None = static(default=None)
    budget: int | None = static(default=None)
    implementation: str | None = static(default=None)

    def _attend(self, query, key, value, **options):
        return selective_attention(query, key, value, head=self.head, bos=self.bos, scale=self.scale, implementation=self.implementation, **options)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        if query.shape[1] != key.shape[1]:
            raise ValueError(f"key: expected the query's {query.shape[1]} tokens, for tokens speak of their own sequence, got {checks.describe(key)}")
        return self._attend(query, key, value, query_positions=query_positions, key_positions=key_positions, segment_ids=segment_ids)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        slots = max_length if self.budget is None else min(max_length, self.budget)
        keys = cache.init(batch, slots, kv_heads, key_size, value_size, dtype)
        return SelectiveState(keys.key, keys.value, jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((batch, slots), jnp.promote_types(dtype, jnp.float32)),
                              keys.next)

    def step(self, state, query, key, value):
        if self.budget is None:
            slots = jnp.broadcast_to(state.next + jnp.arange(query.shape[1], dtype=jnp.int32), query.shape[:2])
            return self._append(state, slots, query, key, value)

        def one(state, token):  # tokens go one by one, for each may evict what the next would have seen
            state = prune_cache(state, state.key.shape[1] - 1)
            return self._append(state, jnp.argmax(state.positions < 0, axis=1, keepdims=True), *(x[:, None] for x in token))

        state, out = jax.lax.scan(one, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value)))
        return state, jnp.moveaxis(out[:, :, 0], 0, 1)

    def _append(self, state, slots, query, key, value):
        places = state.next + jnp.arange(query.shape[1], dtype=jnp.int32)
        put = lambda old, new: old.at[jnp.arange(len(old))[:, None], slots].set(new.astype(old.dtype), unique_indices=True)
        keys, values, positions = put(state.key, key), put(state.value, value), put(state.positions, jnp.broadcast_to(places, slots.shape))
        dtype = cache.computation_dtype(query, keys, values)
        out, found = self._attend(*(x.astype(dtype) for x in (query, keys, values)), query_positions=places, key_positions=positions,
                                  penalty=state.penalty, return_selection=True)
        penalty = found.penalty.astype(state.penalty.dtype)
        return SelectiveState(keys, values, positions, penalty, state.next + query.shape[1]), out.astype(query.dtype)


class SelectiveAttention(Attention):
    """Multi-head :func:`selective_attention`; no parameters beyond those of attention.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism.
      head, bos, scale, implementation: as in :func:`selective_attention`.
      budget: how many keys :meth:`step` keeps, see :func:`prune_cache`; all by default. The call sees all keys.

    >>> layer = SelectiveAttention(32, 4, budget=8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape, layer.init_state(1, 1000).mechanism.key.shape
    ((1, 10, 32), (1, 8, 4, 8))
    """

    def __init__(self, features: int, num_heads: int, *, head: int = 0, bos: int | None = 0, scale: float | None = None, budget: int | None = None,
                 implementation: str | None = None, rngs: nnx.Rngs, **options):
        checks.check_integer("head", head, least=0, most=num_heads - 1)
        if budget is not None:
            checks.check_integer("budget", budget, least=1)
        super().__init__(features, num_heads, mechanism=SelectiveMechanism(head, bos, scale, budget, implementation), rngs=rngs, **options)

    def selection(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                  tau: float = 1.0) -> Selection:
        """What a call with these arguments holds against keys, and how many it has use for: ``selection.memory.max(-1)`` is its :func:`memory_loss`."""
        projected = self._projected(x, x, positions, positions, segment_ids)
        query, key, value, _ = self._prepare({}, *projected, positions, positions)
        mechanism: Any = release(self.mechanism)
        return mechanism._attend(query, key, value, query_positions=positions, key_positions=positions, segment_ids=segment_ids, tau=tau, return_selection=True)[1]
