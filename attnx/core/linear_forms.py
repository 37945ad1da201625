"""The executions of the recurrent engine: ``parallel``, ``chunked``, ``recurrent``, and each of them over a sharded sequence.

A form maps ``(query, key, value, log_decay, state)`` to ``(out, state)``:

    query [B, T, N, H]
    key, value [B, T, K, H], [B, T, K, Hv]
    log_decay [B, T, M, 1 or H], or None
    state [B, M, H, Hv]           M states, a multiple of K that divides N

out is [B, T, N, Hv], in the accumulator's dtype as log_decay and state are. Documents reach a form as decays of exactly 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnx.core.compat import vary, varying_axes
from pallas_kernels import linear_tile

# Tokens of a chunk. Larger ones spend more on scores within the chunk, smaller ones more on states; heads of 64..128 want this.
CHUNK = 64

# Chunks are worked on in slabs, all chunks of a slab at once: at most 8, and about so many tokens times heads.
SLAB = 4096


def _prepare(query, key, value, features, state):
    """For each state its queries [..., M, G, H], key and value, as features in the accumulator's dtype."""
    m, dtype = state.shape[1], state.dtype
    spread = lambda x: jnp.repeat(x, m // x.shape[-2], axis=-2)
    q, k = features(query.astype(dtype)), features(key.astype(dtype))
    return q.reshape(*q.shape[:-2], m, q.shape[-2] // m, q.shape[-1]), spread(k), spread(value.astype(dtype))


def _join(out):
    """[..., M, G, Hv] -> [..., N, Hv]."""
    return out.reshape(*out.shape[:-3], out.shape[-3] * out.shape[-2], out.shape[-1])


def parallel(query, key, value, log_decay, state, *, features):
    """The definition, all pairs materialised: O(T^2 H) time and memory."""
    q, k, v = _prepare(query, key, value, features, state)
    g = jnp.zeros_like(k) if log_decay is None else jnp.broadcast_to(log_decay, k.shape)
    i, j = jnp.arange(k.shape[1])[:, None, None, None], jnp.arange(k.shape[1])[:, None, None]
    between = jnp.cumsum(jnp.where(i > j, g[:, :, None], 0), axis=1)  # [B, i, j, M, H]: g_(j+1) + ... + g_i
    decay = jnp.where(i >= j, jnp.exp(between), 0)
    since = jnp.exp(jnp.cumsum(g, axis=1))
    scores = jnp.einsum("bimgh,bjmh,bijmh->bmgij", q, k, decay)
    out = jnp.einsum("bmgij,bjmv->bimgv", scores, v) + jnp.einsum("bimgh,bimh,bmhv->bimgv", q, since, state)
    return _join(out), since[:, -1, ..., None] * state + jnp.einsum("bjmh,bjmh,bjmv->bmhv", decay[:, -1], k, v)


def recurrent(query, key, value, log_decay, state, *, features):
    """One token after the other: O(T) time, constant memory, but T sequential steps, whose states a gradient keeps."""

    def step(state, token):
        q, k, v, g = token
        q, k, v = _prepare(q, k, v, features, state)
        state = linear_tile.forget(state, None if g is None else g[..., None]) + k[..., None] * v[..., None, :]
        return state, _join(jnp.einsum("bmgh,bmhv->bmgv", q, state))

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value, log_decay))
    state, out = lax.scan(step, vary(state, varying_axes(tokens)), tokens)
    return jnp.moveaxis(out, 0, 1), state


def _slab(state, tokens, *, chunks, size, features):
    """``(state, out)`` of a slab of tokens [B chunks size, ...]: all chunks at once, then the states that pass between them."""
    b, m = state.shape[:2]
    *tokens, log_decay = tokens
    q, k, v = _prepare(*tokens, features, state)

    # Chunks and heads as one axis, the batch by vmap: arrays of few axes (XLA on CPU has crashed on products of many), and
    # axes that may be sharded, the batch and the heads, stay in front.
    def cut(x):  # [B, M chunks, size, ...]
        return jnp.moveaxis(x.reshape(b, chunks, size, *x.shape[1:]), 3, 1).reshape(b, m * chunks, size, *x.shape[2:])

    def by_chunk(x):
        return jnp.moveaxis(x.reshape(b, m, chunks, *x.shape[2:]), 2, 0)

    def carry(state, change):
        total, added = change
        return linear_tile.forget(state, total) + added, state

    q, k, v, log_decay = jax.tree.map(cut, (q, k, v, log_decay))
    groups = q.shape[3]
    q = jnp.swapaxes(q, 2, 3).reshape(*q.shape[:2], groups * size, q.shape[4])
    if log_decay is not None and log_decay.shape[3] == 1:  # one for the head: in rows
        log_decay = jnp.swapaxes(log_decay, 2, 3)
    scores, q, k, total = jax.vmap(linear_tile.weigh)(q, k, log_decay)
    change = None if total is None else jnp.swapaxes(total, 2, 3), jnp.einsum("bljh,bljv->blhv", k, v)
    state, arriving = lax.scan(carry, state, jax.tree.map(by_chunk, change), unroll=True)
    arriving = jnp.moveaxis(arriving, 0, 2).reshape(b, m * chunks, *state.shape[2:])
    out = jnp.einsum("blij,bljv->bliv", scores, v) + jnp.einsum("blih,blhv->bliv", q, arriving)
    out = jnp.transpose(out.reshape(b, m, chunks, groups, size, v.shape[-1]), (0, 2, 4, 1, 3, 5))
    return state, out.reshape(*tokens[0].shape[:2], v.shape[-1])


def chunked(query, key, value, log_decay, state, *, features, chunk_size):
    """Chunks by matrix products, slab after slab: O(T) time and memory, also for gradients, which recompute a slab from its first state."""
    b, t, n, _ = query.shape
    size = min(chunk_size or CHUNK, 1 << (t - 1).bit_length())
    chunks = -(-t // size)
    most = min(max(SLAB // max(b * n * size, 1), 1), 8)
    most = max(most, -(-min(state.shape[-2:]) // size))  # the states kept must not outweigh the tokens
    slabs = -(-chunks // most)
    chunks = -(-chunks // slabs)
    slab = chunks * size

    def cut(x, fill=0):
        x = jnp.pad(x, ((0, 0), (0, slabs * slab - t)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        # Batch and slab as one axis: XLA copies arrays that have an axis of size 1 between them.
        return jnp.moveaxis(x.reshape(b, slabs, slab, *x.shape[2:]), 1, 0).reshape(slabs, b * slab, *x.shape[2:])

    # Padding holds values 0, which add nothing, and ones elsewhere, which features map to something finite.
    tokens = cut(query, 1), cut(key, 1), cut(value), jax.tree.map(cut, log_decay)
    body = jax.checkpoint(partial(_slab, chunks=chunks, size=size, features=features), prevent_cse=False)
    state, out = lax.scan(body, vary(state, varying_axes(tokens)), tokens)
    out = jnp.moveaxis(out.reshape(slabs, b, slab, *out.shape[2:]), 0, 1)
    return out.reshape(b, slabs * slab, *out.shape[3:])[:, :t], state


def unordered(query, key, value, state, *, features, axis_name):
    """Not causal: every query reads the sum over all keys. O(T), and O(T H') memory for the features."""
    q, k, v = _prepare(query, key, value, features, state)
    added = jnp.einsum("bjmh,bjmv->bmhv", k, v)
    state = state + (added if axis_name is None else lax.psum(added, axis_name))
    return _join(jnp.einsum("bimgh,bmhv->bimgv", q, state)), state


def own(query, key, value, state, *, features):
    """What each token reads of itself, (q_t . k_t) v_t: the part that a sum from either side has in common."""
    q, k, v = _prepare(query, key, value, features, state)
    return _join(jnp.einsum("bimgh,bimh,bimv->bimgv", q, k, v))


def parallel_unordered(query, key, value, state, *, features, runs):
    """The definition where not causal: all pairs, in ``runs`` [B, T] (or None) those of equal number; run 0 reads the given state."""
    q, k, v = _prepare(query, key, value, features, state)
    queries, keys = (jnp.zeros(x.shape[:2], jnp.int32) if runs is None else runs for x in (q, k))
    scores = jnp.einsum("bimgh,bjmh,bij->bmgij", q, k, queries[:, :, None] == keys[:, None])
    given = jnp.einsum("bimgh,bmhv,bi->bimgv", q, state, queries == 0)
    last = jnp.max(keys, axis=1, keepdims=True, initial=0)
    state = jnp.einsum("bmhv,bj->bmhv", state, last == 0) + jnp.einsum("bjmh,bjmv,bj->bmhv", k, v, keys == last)
    return _join(jnp.einsum("bmgij,bjmv->bimgv", scores, v) + given), state


# A sequence over several devices ------------------------------------------------------------------------------------


def _rank(axis_name, reverse):
    index = lax.axis_index(axis_name)
    return lax.axis_size(axis_name) - 1 - index if reverse else index


def scan_devices(combine, element, first, axis_name, reverse=False):
    """What reaches each device from those before it along a mesh axis: ``first``, combined with their elements in order.

    An exclusive prefix sum of the associative ``combine(earlier, later)`` in log2(devices) exchanges of one element each; ``reverse`` scans
    from the last device to the first. Call inside ``jax.shard_map``.
    """
    size, rank = lax.axis_size(axis_name), _rank(axis_name, reverse)

    def receive(x, distance):
        hops = [(i, i + distance) for i in range(size - distance)]
        hops = [(size - 1 - i, size - 1 - j) for i, j in hops] if reverse else hops
        return jax.tree.map(lambda x: lax.ppermute(x, axis_name, hops), x)

    def where(condition, x, y):
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)

    carry, distance = where(rank == 0, first, receive(element, 1)), 1
    while distance < size:
        carry = where(rank >= distance, combine(receive(carry, distance), carry), carry)
        distance *= 2
    return carry


def over_devices(form, query, key, value, log_decay, state, *, axis_name, reverse=False):
    """``form`` over a sequence whose shards lie on the devices of a mesh axis; the last state comes back on all of them.

    All devices run through their tokens at once, first for what these add to a state, then, with the state that arrives, for the
    outputs. Communicates O(log devices) states.
    """
    total = None if log_decay is None else jnp.sum(log_decay, axis=1)[..., None]
    _, added = form(query[:, :, :0], key, value, log_decay, jnp.zeros_like(state))  # no queries: the form computes states alone

    def combine(earlier, later):
        return jax.tree.map(jnp.add, earlier[0], later[0]), linear_tile.forget(earlier[1], later[0]) + later[1]

    _, arriving = scan_devices(combine, (total, added), (jax.tree.map(jnp.zeros_like, total), state), axis_name, reverse)
    out, state = form(query, key, value, log_decay, arriving)
    return out, lax.psum(jnp.where(_rank(axis_name, reverse) == lax.axis_size(axis_name) - 1, state, 0), axis_name)
