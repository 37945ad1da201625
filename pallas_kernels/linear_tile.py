"""The mathematics of a chunk of the recurrent engine, written once.

    S_t = exp(g_t) * S_(t-1) + k_t v_t^T,        o_t = q_t S_t

over C tokens of one head splits into a part that needs no state and a part that is one matrix product with the state that arrives:

    o_i = sum_(j <= i) <q_i * exp(g_(j+1) + ... + g_i), k_j> v_j  +  (q_i * exp(g_1 + ... + g_i)) S_0
    S_C = exp(g_1 + ... + g_C) * S_0  +  sum_j (k_j * exp(g_(j+1) + ... + g_C)) v_j^T

The usual factorisation exp(G_i - G_j) = exp(G_i) exp(-G_j), G = cumsum g, overflows for strong decays, and the difference G_i - G_j loses
the decays between i and j to rounding (and is NaN once some g is -inf). Here no two sums are ever subtracted. With one decay for the head the
sums between j and i are made for every pair. With one for each channel each pair j < i is separated by the middle of exactly one
dyadic block, and its exponent is the sum from j to that middle plus the sum from there to i. So every decay from 1 down to exact 0
(g = -inf, which is how documents are kept apart) costs no more than rounding.

The functions take any number L of chunks (those of several heads, or the one of a kernel) and G queries per token and state. They are plain
``jax.numpy``, may be differentiated any number of times in both modes where products are not narrowed, and compile inside a kernel on TPU; the
backward chunk is ``jax.vjp`` of these functions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 8  # of a vector register, and of the tiles of memory


class Weighed(NamedTuple):
    """All of a chunk that neither needs its values nor the state that arrives.

    Attributes:
      scores: [L, G C, C], decayed, 0 for j > i.
      query: [L, G C, H], decayed since the chunk's start.
      key: [L, C, H], decayed until the chunk's end.
      total: [L, 1, 1 or H], the sum of the chunk's log-decays; None without decay.
    """

    scores: Any
    query: Any
    key: Any
    total: Any


# Matrix products ----------------------------------------------------------------------------------------------------


def product(spec: str, a, b, narrow=None):
    """``einsum(spec, a[l], b[l])`` for every l; with ``narrow``, of operands (and in gradients, cotangents) rounded to that dtype, as matrix
    units like them, but accumulated and returned in the operands' own."""
    if narrow in (None, a.dtype):
        return jax.vmap(partial(jnp.einsum, spec))(a, b)
    return _narrow_product(spec, narrow, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow_product(spec, narrow, a, b):
    def one(x, y):  # rounded as matrices, which fills vector registers
        return jnp.einsum(spec, x.astype(narrow), y.astype(narrow), preferred_element_type=a.dtype)

    return jnp.stack([one(a[n], b[n]) for n in range(a.shape[0])])


def _narrow_product_backward(spec, narrow, operands, cotangent):
    (x, y), z = spec.split("->")[0].split(","), spec.split("->")[1]
    a, b = operands
    return _narrow_product(f"{z},{y}->{x}", narrow, cotangent, b), _narrow_product(f"{z},{x}->{y}", narrow, cotangent, a)


_narrow_product.defvjp(lambda spec, narrow, a, b: (_narrow_product(spec, narrow, a, b), (a, b)), _narrow_product_backward)


# Sums of log-decays, scores -----------------------------------------------------------------------------------------


def _index(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _decays(log_decay):
    """The decays of a head, rows [L, 1, C]: between tokens, [L, C, C], since the chunk's start and until its end, [L, C, 1], and the sum of their logarithms."""
    chunks, _, size = log_decay.shape
    i, j = _index((chunks, size, size), 1), _index((chunks, size, size), 2)
    column, distance = jnp.swapaxes(log_decay, 1, 2), 1
    between = jnp.where(i > j, column, 0)
    while distance < size:  # sums down the columns: kernels on TPU have no cumulative sum
        between = between + jnp.concatenate([jnp.zeros_like(between[:, :distance]), between[:, :-distance]], axis=1)
        distance *= 2
    decay, last = jnp.where(i >= j, jnp.exp(between), 0), between[:, -1:]
    since = decay[:, :, :1] * jnp.exp(log_decay[:, :, :1])
    return decay, since, jnp.swapaxes(jnp.exp(last), 1, 2), last[:, :, :1] + log_decay[:, :, :1]


def _spread(x, rows):
    """``x`` [.., tokens, .] for each row of ``rows`` [.., G tokens, .]."""
    return jnp.tile(x, (1, rows.shape[1] // x.shape[1], 1))


def _select(first, second, half):
    """The rows of ``second`` [.., tokens, .] in the second of every two blocks of ``half`` tokens, those of ``first`` elsewhere."""
    *_, size, width = second.shape
    if half < ROWS:
        tile = min(ROWS, size), width
        late = _index((1, *tile), 1) & half != 0
        return jnp.where(late, second.reshape(-1, *tile), first.reshape(-1, *tile)).reshape(second.shape)
    pairs = -1, 2, half, width
    return jnp.concatenate([first.reshape(pairs)[:, :1], second.reshape(pairs)[:, 1:]], axis=1).reshape(second.shape)


def _exchange(x, half):
    """The rows of ``x`` with every two blocks of ``half`` tokens exchanged."""
    *_, size, width = x.shape
    if half < ROWS:
        tiles = x.reshape(-1, min(ROWS, size), width)
        return _select(jnp.roll(tiles, -half, axis=1), jnp.roll(tiles, half, axis=1), half).reshape(x.shape)
    first, second = jnp.split(x.reshape(-1, 2, half, width), 2, axis=1)
    return jnp.concatenate([second, first], axis=1).reshape(x.shape)


def _scores_of_blocks(query, key, log_decay, narrow):
    """:func:`decayed_scores` by products of whole blocks, one for each size of dyadic block, of which a mask keeps what it separates."""
    blocks, size, _ = key.shape
    pairs = (blocks, query.shape[1], size)
    i, j = _index(pairs, 1) & (size - 1), _index(pairs, 2)
    since, until, total, half = log_decay, jnp.zeros_like(log_decay), log_decay, 1
    scores = product("ih,jh->ij", query, key, narrow)
    while half < size:
        decay = jnp.exp(_select(until, since, half))  # queries are read in second halves, keys in first ones
        across = product("ih,jh->ij", query * _spread(decay, query), key * decay, narrow)
        scores = jnp.where((i ^ j) >= half, across, scores)
        sibling = _exchange(total, half)
        since, until = _select(since, since + sibling, half), _select(until + sibling, until, half)
        total, half = total + sibling, 2 * half
    return jnp.where(i >= j, scores, 0), since, until, total


def decayed_scores(query, key, log_decay, *, block: int, narrow=None):
    """The scores of chunks, <q_i * exp(g_(j+1) + ... + g_i), k_j> for j <= i and 0 otherwise, and the sums of g from and to their borders.

    Args:
      query: [L, G C, H], C a power of two.
      key, log_decay: [L, C, H].
      block: a power of two. Within blocks of so many tokens every product is one of whole blocks, more multiplications in fewer operations.
      narrow: the dtype of operands of matrix products, or None for their own.

    Returns:
      ``(scores [L, G C, C], since [L, C, H], until [L, C, H], total [L, 1, H])``: ``since_i = g_1 + ... + g_i`` is what a state that arrives
      has lost by token i, ``until_i = g_(i+1) + ... + g_C`` what the contribution of token i loses until the end of the chunk.
    """
    (chunks, size, head), groups = key.shape, query.shape[1] // key.shape[1]
    block = min(block, size)
    cut = lambda x: x.reshape(chunks * size // block, block, head)
    turned = jnp.swapaxes(query.reshape(chunks, groups, size // block, block, head), 1, 2)
    blocks = turned.reshape(chunks * size // block, groups * block, head)
    scores, since, until, total = _scores_of_blocks(blocks, cut(key), cut(log_decay), narrow)
    total = total[:, :1]
    scores = scores.reshape(chunks * size // block, groups, block, block)
    while block < size:  # blocks are joined in pairs to those of the next size
        pairs = size // (2 * block)
        late = jnp.swapaxes(query.reshape(chunks, groups, pairs, 2, block, head)[:, :, :, 1], 1, 2).reshape(chunks * pairs, groups, block, head)
        early = key.reshape(chunks * pairs, 2, block, head)[:, 0]
        early_scores, early_since, early_until, early_total = (x[::2] for x in (scores, since, until, total))
        late_scores, late_since, late_until, late_total = (x[1::2] for x in (scores, since, until, total))
        across = product("gih,jh->gij", late * jnp.exp(late_since)[:, None], early * jnp.exp(early_until), narrow)
        upper = jnp.concatenate([early_scores, jnp.zeros_like(across)], axis=3)
        lower = jnp.concatenate([across, late_scores], axis=3)
        scores = jnp.concatenate([upper, lower], axis=2)
        since = jnp.concatenate([early_since, late_since + early_total], axis=1)
        until = jnp.concatenate([early_until + late_total, late_until], axis=1)
        total, block = early_total + late_total, 2 * block
    return scores.reshape(chunks, groups * size, size), since, until, total


# A chunk ------------------------------------------------------------------------------------------------------------


def weigh(query, key, log_decay, *, block: int = 1, narrow=None) -> Weighed:
    """The scores of chunks, and their queries and keys as the states before and after them see these.

    Args:
      query: [L, G C, H], C a power of two; row ``g C + t`` is query g of token t.
      key: [L, C, H].
      log_decay: None (no decay), [L, 1, C] (one for the head) or [L, C, H] (one for each channel of the key); at most 0, -inf allowed.
      block, narrow: as for :func:`decayed_scores`.
    """
    if log_decay is not None and log_decay.shape == key.shape:
        scores, since, until, total = decayed_scores(query, key, log_decay, block=block, narrow=narrow)
        return Weighed(scores, query * jnp.exp(_spread(since, query)), key * jnp.exp(until), total)
    scores = product("ih,jh->ij", query, key, narrow)
    if log_decay is None:
        i, j = _index(scores.shape, 1) & (key.shape[1] - 1), _index(scores.shape, 2)
        return Weighed(jnp.where(i >= j, scores, 0), query, key, None)
    between, since, until, total = _decays(log_decay)
    return Weighed(scores * _spread(between, scores), query * _spread(since, query), key * until, total)


def attend(query, key, value, log_decay, memory, normalizer=None, **options):
    """Chunks and the states that arrive: ``(numerator, denominator, memory, normalizer)``, the latter two the states that leave.

        numerator = scores v + query S,              S <- forget(S, total) + key^T v
        denominator = sum_j scores + query z,        z <- forget(z, total) + sum_j key_j

    Args:
      query, key, log_decay, options: as for :func:`weigh`.
      value: [L, C, Hv].
      memory: S [L, H, Hv].
      normalizer: z [L, 1, H], or None for no denominator.

    Returns:
      [L, G C, Hv], [L, G C, 1] or None, [L, H, Hv], [L, 1, H] or None.
    """
    dot = partial(product, narrow=options.get("narrow"))
    scores, query, key, total = weigh(query, key, log_decay, **options)
    numerator = dot("ij,jv->iv", scores, value) + dot("ih,hv->iv", query, memory)
    memory = forget(memory, None if total is None else jnp.swapaxes(total, 1, 2)) + dot("jh,jv->hv", key, value)
    if normalizer is None:
        return numerator, None, memory, None
    denominator = jnp.sum(scores, axis=2, keepdims=True) + jnp.sum(query * normalizer, axis=2, keepdims=True)
    return numerator, denominator, memory, forget(normalizer, total) + jnp.sum(key, axis=1, keepdims=True)


def divide(numerator, denominator, floor: float | None = None):
    """``numerator / denominator``, 0 where that is 0; with ``floor``, ``numerator / max(abs(denominator), floor)``."""
    if floor is not None:
        return numerator / jnp.maximum(jnp.abs(denominator), floor)
    some = denominator != 0
    return jnp.where(some, numerator / jnp.where(some, denominator, 1), 0)


def forget(state, log_decay):
    """``exp(log_decay) * state``, or the state itself for None.

    A factor just below 1 would be rounded the same way in thousands of steps, so there the (small) loss is computed, and subtracted.
    """
    if log_decay is None:
        return state
    half = jnp.tanh(log_decay / 2)
    loss = 2 * half / (1 - half)  # expm1, which kernels on TPU lack
    return jnp.where(log_decay > -0.5, state + loss * state, jnp.exp(log_decay) * state)
