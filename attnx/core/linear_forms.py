"""The executions of the recurrent engine: ``parallel``, ``chunked``, ``recurrent``, and each of them over a sharded sequence.

A form maps ``(query, key, value, log_decay, state)`` to ``(out, state)``, with shapes that make every sharing of heads explicit:

    query [B, T, K, R, G, H]      K key-value heads, R decays for each of them, G queries for each of these
    key, value [B, T, K, H], [B, T, K, Hv]
    log_decay [B, T, K, R, 1 or H], or None
    state [B, K, R, H, Hv]

in the accumulator's dtype, except that query, key and value may be narrower. Documents reach a form as decays of exactly 0.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnx.core.compat import vary, varying_axes
from pallas_kernels import linear_tile

# Tokens of a chunk. Larger ones spend more on scores within the chunk, smaller ones more on states; heads of 64..128 want this.
CHUNK = 64

# Chunks are worked on in slabs, all of a slab at once: of at most 8 chunks, and of about so many tokens over all heads.
SLAB = 4096


def parallel(query, key, value, log_decay, state, *, features):
    """The definition, all pairs materialised: O(T^2 H) time and memory."""
    dtype, t = state.dtype, query.shape[1]
    query, key, value = features(query.astype(dtype)), features(key.astype(dtype)), value.astype(dtype)
    b, _, k, r, _, h = query.shape
    g = jnp.zeros((b, t, k, r, h), dtype) if log_decay is None else jnp.broadcast_to(log_decay, (b, t, k, r, h))
    i, j = jnp.arange(t)[:, None], jnp.arange(t)
    pair = lambda mask: mask[None, :, :, None, None, None]
    between = jnp.cumsum(jnp.where(pair(i > j), g[:, :, None], 0), axis=1)  # [B, i, j]: g_(j+1) + ... + g_i
    decay = jnp.where(pair(i >= j), jnp.exp(between), 0)
    since = jnp.exp(jnp.cumsum(g, axis=1))
    scores = jnp.einsum("bikrgh,bjkh,bijkrh->bkrgij", query, key, decay)
    out = jnp.einsum("bkrgij,bjkv->bikrgv", scores, value) + jnp.einsum("bikrgh,bikrh,bkrhv->bikrgv", query, since, state)
    return out, since[:, -1, ..., None] * state + jnp.einsum("bjkrh,bjkh,bjkv->bkrhv", decay[:, -1], key, value)


def recurrent(query, key, value, log_decay, state, *, features):
    """One token after the other: O(T) time, constant memory, but T sequential steps, whose states a gradient keeps."""

    def step(state, token):
        q, k, v, g = token
        q, k, v = features(q.astype(state.dtype)), features(k.astype(state.dtype)), v.astype(state.dtype)
        state = state if g is None else jnp.exp(g)[..., None] * state
        state = state + (k[..., None] * v[..., None, :])[:, :, None]
        return state, jnp.einsum("bkrgh,bkrhv->bkrgv", q, state)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value, log_decay))
    state, out = lax.scan(step, vary(state, varying_axes(tokens)), tokens)
    return jnp.moveaxis(out, 0, 1), state


def _slab(state, tokens, *, size, features):
    """``(state, out)`` of one slab [B, s * size, ...]: all its chunks at once, then the states that pass between them."""
    dtype = state.dtype
    b, t, kv, r, g, _ = tokens[0].shape
    s = t // size

    def cut(x):  # [s * B * K, size, ...]; few axes, because every transformation of the caller adds one
        return jnp.moveaxis(x.reshape(b, s, size, *x.shape[2:]), (1, 3), (0, 2)).reshape(s * b * kv, size, *x.shape[3:])

    q, k, v, log_decay = jax.tree.map(lambda x: cut(x.astype(dtype)), tokens)
    q, k = features(q), features(k)
    tile = jax.vmap(linear_tile.chunk, in_axes=(1, None, None, None), out_axes=(0, 0, None, None))  # over G
    tile = jax.vmap(tile, in_axes=(1, None, None, None if log_decay is None else 1))  # over R
    out, q, *change = jax.vmap(tile)(q, k, v, log_decay)

    def carry(state, change):
        keep, added = change
        return (state if keep is None else keep * state) + added, state

    lanes = (s, b * kv)
    state, arriving = lax.scan(carry, state.reshape(b * kv, *state.shape[2:]), jax.tree.map(lambda x: x.reshape(*lanes, *x.shape[1:]), change),
                               unroll=True)
    out = out + q @ arriving.reshape(s * b * kv, *arriving.shape[2:])[:, :, None]
    out = jnp.moveaxis(out.reshape(s, b, kv, r, g, size, v.shape[-1]), (0, 5), (1, 2))
    return state.reshape(b, kv, *state.shape[1:]), out.reshape(b, t, *out.shape[3:])


def chunked(query, key, value, log_decay, state, *, features, chunk_size):
    """Chunks by matrix products, slab after slab: O(T) time and memory, also for gradients, which recompute a slab from its first state."""
    b, t, kv, r, g, _ = query.shape
    size = min(chunk_size or CHUNK, 1 << (t - 1).bit_length())
    chunks = -(-t // size)
    most = min(max(SLAB // max(b * kv * r * g * size, 1), 1), 8)
    most = max(most, -(-min(state.shape[-2:]) // size))  # the states kept must not outweigh the tokens
    slabs = -(-chunks // most)
    slab = -(-chunks // slabs) * size

    def cut(x, fill=0):
        x = jnp.pad(x, ((0, 0), (0, slabs * slab - t)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(b, slabs, slab, *x.shape[2:]), 1, 0)

    # Padding holds values 0, which add nothing, and ones elsewhere, which features map to something finite.
    tokens = cut(query, 1), cut(key, 1), cut(value), jax.tree.map(cut, log_decay)
    body = jax.checkpoint(partial(_slab, size=size, features=features), prevent_cse=False)
    state, out = lax.scan(body, vary(state, varying_axes(tokens)), tokens)
    return jnp.moveaxis(out, 0, 1).reshape(b, slabs * slab, *out.shape[3:])[:, :t], state


def unordered(query, key, value, state, *, features, axis_name):
    """Not causal: every query reads the sum over all keys. O(T), and O(T H') memory for the features."""
    dtype = state.dtype
    query, key, value = features(query.astype(dtype)), features(key.astype(dtype)), value.astype(dtype)
    added = jnp.einsum("bjkh,bjkv->bkhv", key, value)[:, :, None]
    state = state + (added if axis_name is None else lax.psum(added, axis_name))
    return jnp.einsum("bikrgh,bkrhv->bikrgv", query, state), state


def parallel_unordered(query, key, value, state, *, features, runs):
    """The definition where not causal: all pairs, in ``runs`` [B, T] (or None) those of equal number; run 0 reads the given state."""
    dtype = state.dtype
    query, key, value = features(query.astype(dtype)), features(key.astype(dtype)), value.astype(dtype)
    queries, keys = (jnp.zeros(x.shape[:2], jnp.int32) if runs is None else runs for x in (query, key))
    scores = jnp.einsum("bikrgh,bjkh,bij->bkrgij", query, key, queries[:, :, None] == keys[:, None])
    given = jnp.einsum("bikrgh,bkrhv,bi->bikrgv", query, state, queries == 0)
    last = keys[:, -1:]
    state = jnp.einsum("bkrhv,bj->bkrhv", state, last == 0) + jnp.einsum("bjkh,bjkv,bj->bkhv", key, value, keys == last)[:, :, None]
    return jnp.einsum("bkrgij,bjkv->bikrgv", scores, value) + given, state


# A sequence over several devices ------------------------------------------------------------------------------------


def scan_devices(combine, element, first, axis_name, reverse=False):
    """What reaches each device from those before it along a mesh axis: ``first`` on the first, then combined with their elements.

    An exclusive prefix sum of the associative ``combine(earlier, later)`` in log2(devices) exchanges of one element each; ``reverse`` scans
    from the last device to the first. Call inside ``jax.shard_map``.
    """
    size = lax.axis_size(axis_name)
    rank = _rank(axis_name, reverse)

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


def _rank(axis_name, reverse):
    index = lax.axis_index(axis_name)
    return lax.axis_size(axis_name) - 1 - index if reverse else index


def over_devices(form, query, key, value, log_decay, state, *, axis_name, reverse=False):
    """``form`` over a sequence whose shards lie on the devices of a mesh axis; the last state comes back on all of them.

    All devices run through their tokens at once, first for the change that these make to a state, then, with the state that arrives, for
    the outputs. Communicates O(log devices) states.
    """
    rank = _rank(axis_name, reverse)
    # No queries: the same form computes states alone. The first device starts from the state given.
    _, change = form(query[:, :, :, :, :0], key, value, log_decay, jnp.where(rank == 0, state, 0))
    keep = jnp.ones((1, 1), state.dtype) if log_decay is None else jnp.exp(jnp.sum(log_decay, axis=1))[..., None]

    def combine(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    _, arriving = scan_devices(combine, (keep, change), (jnp.ones_like(keep), state), axis_name, reverse)
    out, state = form(query, key, value, log_decay, arriving)
    return out, lax.psum(jnp.where(rank == lax.axis_size(axis_name) - 1, state, 0), axis_name)
