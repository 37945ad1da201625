"""Caches of keys and values for decoding: constant shapes under jit.

A cache stores tokens in slots and remembers the logical position of each (-1: empty), so masks and scores, which see positions,
neither know nor care whether it is contiguous or rolling, full or half empty. A rolling cache is the same thing with fewer slots than tokens: slot
= position mod slots, the oldest token overwritten.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnx.core.checks import check_integer, describe


class KVCache(NamedTuple):
    """Keys [B, L, K, H], values [B, L, K, Hv], the logical position in each of the L slots [L] (-1: empty), and the next position []."""

    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K Hv"]
    positions: Int[Array, " L"]
    next: Int[Array, ""]


def init(batch: int, slots: int, kv_heads: int, key_size: int, value_size: int | None = None, dtype=jnp.float32) -> KVCache:
    """An empty cache. ``slots`` as large as the sequence makes it contiguous, smaller rolling.

    >>> import jax.numpy as jnp
    >>> cache = init(batch=1, slots=4, kv_heads=1, key_size=2)
    >>> append(cache, jnp.ones((1, 3, 1, 2)), jnp.ones((1, 3, 1, 2))).positions
    Array([ 0,  1,  2, -1], dtype=int32)
    """
    for name, x in (("batch", batch), ("slots", slots), ("kv_heads", kv_heads), ("key_size", key_size)):
        check_integer(name, x, least=1)
    value_size = key_size if value_size is None else check_integer("value_size", value_size, least=1)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype, got {describe(dtype)}")
    return KVCache(jnp.zeros((batch, slots, kv_heads, key_size), dtype), jnp.zeros((batch, slots, kv_heads, value_size), dtype),
                   jnp.full((slots,), -1, jnp.int32), jnp.zeros((), jnp.int32))


def append(cache: KVCache, key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"]) -> KVCache:
    """The cache after t more tokens, t no more than its slots; the oldest are overwritten once it is full.

    Cost: O(t) writes, in place where the cache is donated or carried by a loop.
    """
    for name, new, old in (("key", key, cache.key), ("value", value, cache.value)):
        if new.ndim != 4 or (new.shape[0], *new.shape[2:]) != (old.shape[0], *old.shape[2:]):
            raise ValueError(f"{name}: expected shape {[old.shape[0], 't', *old.shape[2:]]} as the cache {describe(old)}, got {describe(new)}")
    slots, t = cache.key.shape[1], key.shape[1]
    if t > slots:
        raise ValueError(f"key: expected at most as many new tokens as the cache has slots ({slots}), got {describe(key)}")
    if value.shape[1] != t:
        raise ValueError(f"value: expected {t} new tokens as in key {describe(key)}, got {describe(value)}")
    positions = cache.next + jnp.arange(t, dtype=jnp.int32)
    if t == 1:  # one contiguous write rather than a scatter
        slot = cache.next % slots
        write = lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis)
        return KVCache(write(cache.key, key, 1), write(cache.value, value, 1), write(cache.positions, positions, 0), cache.next + 1)
    slot = positions % slots
    return KVCache(cache.key.at[:, slot].set(key.astype(cache.key.dtype), unique_indices=True),
                   cache.value.at[:, slot].set(value.astype(cache.value.dtype), unique_indices=True),
                   cache.positions.at[slot].set(positions, unique_indices=True), cache.next + t)


def computation_dtype(query, *caches):
    """The dtype in which queries meet a cache: the wider of the two; a cache of 8 bits is widened to the query's."""
    wide = [x.dtype for x in caches if jnp.finfo(x.dtype).bits >= 16]
    return jnp.promote_types(query.dtype, jnp.result_type(*wide)) if wide else query.dtype
