"""Softmax attention in pieces: partial states of some keys, their merging, and decoding by any plan.

    state of keys J:   m = max s_j,   l = sum e^(s_j - m),   o = sum e^(s_j - m) v_j            out = o / l,   lse = m + log l
    merge:             m = max(m_a, m_b),   l = e^(m_a - m) l_a + e^(m_b - m) l_b,   o likewise

Merging is associative and commutative, with (-inf, 0, 0) as its identity, so keys may be cut anywhere. :func:`attnx.merge` is the same of finished pairs (out, lse);
:func:`attnx.decode` is what to decode with: it plans on the device and reads caches where they lie. Here a plan made on the host is followed to the letter.

Sanovar, Bharadwaj, St. Amant, Ruehle, Rajmohan: "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers" (2024,
arXiv 2405.10480).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attnx.core import checks
from pallas_kernels.decode.plans import SplitPlan
from pallas_kernels.tile import accumulator_dtype


class SoftmaxState(NamedTuple):
    """What is known of a row after some keys: the largest score [...], the sum [...] of e^(s - that), and the sum [..., D] of values weighed so."""

    maximum: Float[Array, "..."]
    total: Float[Array, "..."]
    weighed: Float[Array, "... D"]


def softmax_state_identity(shape: tuple[int, ...], size: int, dtype=jnp.float32) -> SoftmaxState:
    """The state after no keys: (-inf, 0, 0).

    Args:
      shape: of the rows.
      size: D, of a value.

    >>> softmax_state_identity((), 2)
    SoftmaxState(maximum=Array(-inf, dtype=float32), total=Array(0., dtype=float32), weighed=Array([0., 0.], dtype=float32))
    """
    return SoftmaxState(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, size), dtype))


def softmax_state_of(scores: Float[Array, "... S"], value: Float[Array, "... S D"], allowed=True) -> SoftmaxState:
    """The state after keys with these scores and values, of those that are allowed.

    >>> softmax_state_of(jnp.zeros(3), jnp.arange(3.0)[:, None]).weighed
    Array([3.], dtype=float32)
    """
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    weights = jnp.exp(scores - _finite(top)[..., None])
    return SoftmaxState(top, weights.sum(-1), jnp.einsum("...s,...sd->...d", weights, value.astype(weights.dtype)))


def softmax_state_merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state after the keys of both; two that have seen none make one that has seen none.

    >>> halves = [softmax_state_of(jnp.array([s]), jnp.array([[v]])) for s, v in ((0.0, 1.0), (jnp.log(3.0), 5.0))]
    >>> softmax_state_finish(softmax_state_merge(*halves))[0].round(3)
    Array([4.], dtype=float32)
    """
    maximum = jnp.maximum(a.maximum, b.maximum)
    p, q = (jnp.exp(x.maximum - _finite(maximum)) for x in (a, b))
    return SoftmaxState(maximum, p * a.total + q * b.total, p[..., None] * a.weighed + q[..., None] * b.weighed)


def softmax_state_finish(state: SoftmaxState) -> tuple[Float[Array, "... D"], Float[Array, "..."]]:
    """``(out, lse)``: 0 and -inf for rows that have seen no key."""
    some = state.total > 0
    total = jnp.where(some, state.total, 1)
    return jnp.where(some[..., None], state.weighed / total[..., None], 0), jnp.where(some, state.maximum + jnp.log(total), -jnp.inf)


def _finite(maximum):
    return jnp.where(jnp.isneginf(maximum), 0, maximum)


def lean_attention_decode(query: Float[Array, "B 1 N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], lengths: Int[Array, " B"], plan: SplitPlan,
                          *, page_table: Int[Array, "B M"] | None = None, scale: float | None = None) -> tuple[Float[Array, "B 1 N Hv"], Float[Array, "B N"]]:
    """Attention of one query a sequence to its cache, by a plan.

    ::

        out_b = sum over j < lengths_b of  softmax_j(scale q_b . k_bj) v_bj

    Every segment of the plan is folded tile by tile into a partial state, all segments at once; then those of an output are merged in order.

    Args:
      query: [B, 1, N, H]; the query heads of a group are rows of one tile.
      key, value: [B, S, K, H] and [B, S, K, Hv], N a multiple of K; with ``page_table`` pages [P, p, K, H] and [P, p, K, Hv], which are gathered first.
      lengths: integers [B], traced or not, at most those that were planned for.
      plan: of :mod:`pallas_kernels.decode.plans`, for K heads.
      page_table: integers [B, M]: token j is in page ``page_table[b, j // p]``.
      scale: 1 / sqrt(H) by default.

    Returns:
      ``(out [B, 1, N, Hv] in the query's dtype, lse [B, N])``, lse in float32 or wider; 0 and -inf where a length is 0. Differentiable.

    Raises:
      ValueError: a plan for other sequences, heads or more keys than there are; or arrays that do not fit, named.

    >>> import attnx
    >>> from pallas_kernels.decode import stream_k_plan
    >>> q, k, v = (jax.random.normal(jax.random.key(n), (2, length, 2, 8)) for n, length in enumerate((1, 7, 7)))
    >>> plan = stream_k_plan([7, 4], heads=2, tile=2, workers=3)
    >>> out, _ = lean_attention_decode(q, k, v, jnp.array([7, 4]), plan)
    >>> bool(jnp.allclose(out, attnx.decode(q, k, v, jnp.array([7, 4])), atol=1e-6))
    True
    """
    if page_table is not None:
        table = checks.check_integers("page_table", page_table, ranks=(2,))
        key, value = (x[table].reshape(table.shape[0], -1, *x.shape[2:]) for x in (key, value))
    query, key, value = checks.check_query_key_value(query, key, value)
    (b, t, n, h), (_, s, k, _) = query.shape, key.shape
    lengths = checks.check_integers("lengths", lengths, ranks=(1,))
    if t != 1 or lengths.shape != (b,):
        raise ValueError(f"query: expected shape [B, 1, N, H] and lengths [B], got {checks.describe(query)} and {checks.describe(lengths)}")
    if plan.count.shape != (b, k) or (plan.end.max(initial=0) - 1) * plan.tile >= max(s, 1):
        raise ValueError(f"plan: expected one for {b} sequences of {k} heads and at most {s} keys, got one for {plan.count.shape[0]} of {plan.count.shape[1]} and "
                         f"{plan.end.max(initial=0)} tiles of {plan.tile}")
    dtype, size = accumulator_dtype(query.dtype), plan.tile
    scale = checks.check_scale(scale, h)
    rows = query.reshape(b, k, n // k, h).astype(dtype) * scale
    pad = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -s % size), (0, 0)))
    key, value = pad(key), pad(value)
    nothing = softmax_state_identity((n // k,), value.shape[-1], dtype)
    if not len(plan.slot):
        return jnp.zeros((b, 1, n, value.shape[-1]), query.dtype), jnp.full((b, n), -jnp.inf, dtype)

    def segment(batch, head, begin, end):
        def step(state, index):
            start = jnp.minimum((begin + index) * size, key.shape[2] - size)
            mine = lambda x: lax.dynamic_slice(x, (batch, head, start, 0), (1, 1, size, x.shape[3]))[0, 0].astype(dtype)
            allowed = (start + jnp.arange(size) < lengths[batch]) & (begin + index < end)
            return softmax_state_merge(state, softmax_state_of(rows[batch, head] @ mine(key).T, mine(value), allowed)), None

        return lax.scan(step, nothing, jnp.arange((plan.end - plan.begin).max()))[0]

    states = jax.vmap(segment)(*(jnp.asarray(x) for x in (plan.batch, plan.head, plan.begin, plan.end)))

    def output(first, count):
        def step(state, index):
            place = jnp.minimum(first + index, len(plan.slot) - 1)
            other = jax.tree.map(lambda x, none: jnp.where(index < count, x[place], none), states, nothing)
            return softmax_state_merge(state, other), None

        return lax.scan(step, nothing, jnp.arange(plan.count.max()))[0]

    out, lse = softmax_state_finish(jax.vmap(jax.vmap(output))(jnp.asarray(plan.first), jnp.asarray(plan.count)))
    return out.reshape(b, 1, n, -1).astype(query.dtype), lse.reshape(b, n)
