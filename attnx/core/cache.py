"""Caches of keys and values for decoding: constant shapes under jit.

A cache stores tokens in slots and remembers the logical position of each (-1: empty), so masks and scores, which see positions,
neither know nor care whether it is contiguous or rolling, full or half empty. A rolling cache is the same thing with fewer slots than tokens: slot
= position mod slots, the oldest token overwritten.

The caches of a model's layers, stacked, are worked on where they lie: a :class:`LayerCache` is one of them, which a loop over layers carries on.
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


class LayerCache(NamedTuple):
    """One layer's cache inside the stacked caches of all, used like a :class:`KVCache`: keys [M, B, L, K, H], values [M, B, L, K, Hv] of M layers,
    positions [L] and next position [] of this one, and its index []. A token is appended in place; reading ``key`` or ``value`` cuts a slice."""

    keys: Float[Array, "M B L K H"]
    values: Float[Array, "M B L K Hv"]
    positions: Int[Array, " L"]
    next: Int[Array, ""]
    layer: Int[Array, ""]

    @property
    def key(self) -> Float[Array, "B L K H"]:
        """This layer's keys."""
        return jax.lax.dynamic_index_in_dim(self.keys, self.layer, keepdims=False)

    @property
    def value(self) -> Float[Array, "B L K Hv"]:
        """This layer's values."""
        return jax.lax.dynamic_index_in_dim(self.values, self.layer, keepdims=False)


def layer_of(caches: KVCache, layer) -> LayerCache:
    """The cache of a layer, its index possibly traced, inside stacked ones; :func:`stacked` is the way back.

    >>> import jax, jax.numpy as jnp
    >>> caches = jax.tree.map(lambda x: jnp.stack([x] * 3), init(batch=1, slots=4, kv_heads=1, key_size=2))
    >>> first = append(layer_of(caches, 0), jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)))
    >>> stacked(caches, first).next.tolist()
    [1, 0, 0]
    """
    index = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    return LayerCache(caches.key, caches.value, index(caches.positions), index(caches.next), jnp.asarray(layer, jnp.int32))


def stacked(caches: KVCache, cache: LayerCache) -> KVCache:
    """The stacked caches with one layer's as it has become."""
    write = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, cache.layer, 0)
    return KVCache(cache.keys, cache.values, write(caches.positions, cache.positions), write(caches.next, cache.next))


def init(batch: int, slots: int, kv_heads: int, key_size: int, value_size: int | None = None, dtype=jnp.float32) -> KVCache:
    """An empty cache. ``slots`` as large as the sequence makes it contiguous, smaller rolling; ``value_size`` of 0 keeps keys alone.

    >>> import jax.numpy as jnp
    >>> cache = init(batch=1, slots=4, kv_heads=1, key_size=2)
    >>> append(cache, jnp.ones((1, 3, 1, 2)), jnp.ones((1, 3, 1, 2))).positions
    Array([ 0,  1,  2, -1], dtype=int32)
    """
    for name, x in (("batch", batch), ("slots", slots), ("kv_heads", kv_heads), ("key_size", key_size)):
        check_integer(name, x, least=1)
    value_size = key_size if value_size is None else check_integer("value_size", value_size, least=0)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype, got {describe(dtype)}")
    return KVCache(jnp.zeros((batch, slots, kv_heads, key_size), dtype), jnp.zeros((batch, slots, kv_heads, value_size), dtype),
                   jnp.full((slots,), -1, jnp.int32), jnp.zeros((), jnp.int32))


def append(cache: KVCache | LayerCache, key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"]) -> KVCache | LayerCache:
    """The cache after t more tokens, t no more than its slots; the oldest are overwritten once it is full.

    Cost: O(t) writes, in place where the cache is donated or carried by a loop; for several tokens of one layer among stacked ones O(L).
    """
    if isinstance(cache, LayerCache) and (key.ndim, key.shape[1:2]) != (4, (1,)):
        own = append(KVCache(cache.key, cache.value, cache.positions, cache.next), key, value)
        write = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, cache.layer, 0)
        return LayerCache(write(cache.keys, own.key), write(cache.values, own.value), own.positions, own.next, cache.layer)
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
        after = dict(positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, 0), next=cache.next + 1)
        if isinstance(cache, LayerCache):
            place = [jnp.asarray(i, jnp.int32) for i in (cache.layer, 0, slot, 0, 0)]
            write = lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype)[None], place)
            return cache._replace(keys=write(cache.keys, key), values=write(cache.values, value), **after)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, 1)
        return cache._replace(key=write(cache.key, key), value=write(cache.value, value), **after)
    slot = positions % slots
    return KVCache(cache.key.at[:, slot].set(key.astype(cache.key.dtype), unique_indices=True),
                   cache.value.at[:, slot].set(value.astype(cache.value.dtype), unique_indices=True),
                   cache.positions.at[slot].set(positions, unique_indices=True), cache.next + t)


def computation_dtype(query, *caches):
    """The dtype in which queries meet a cache: the wider of the two; a cache of 8 bits is widened to the query's."""
    wide = [x.dtype for x in caches if jnp.finfo(x.dtype).bits >= 16]
    return jnp.promote_types(query.dtype, jnp.result_type(*wide)) if wide else query.dtype
