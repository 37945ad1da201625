"""What a model is handed: a mechanism with a parallel form and a streaming form, whatever engine it runs on."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from attnx.core import cache, decode, linear
from attnx.core.attention import IMPLEMENTATIONS, attention
from attnx.core.checks import check_choice, check_dropout_rate, check_function, check_parts, check_products, check_real, check_scale
from attnx.core.ring import mesh_in_context, usable_axes
from attnx.masks.documents import documents
from pallas_kernels.parts import Mask, Score, Softmax, Weights, part, static
from pallas_kernels.products import Products

FEW = 4  # tokens, at the most, for which reading the cache where it lies beats transposing it


class Mechanism(Protocol):
    """Queries, keys and values to outputs; :func:`pairs` makes one from parts."""

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        """[B, T, N, H], [B, S, K, H], [B, S, K, Hv] -> [B, T, N, Hv]; ``segment_ids`` [B, T] keep documents apart (T = S)."""

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype) -> Any:
        """The streaming state before the first token: a pytree of constant shape."""

    def step(self, state, query, key, value) -> tuple[Any, jax.Array]:
        """The next t tokens: ``(state, out [B, t, N, Hv])``; equals the parallel form on everything so far."""


@part
class Pairs:
    """See :func:`pairs`. A pytree; its arrays are those of its parts."""

    scores: tuple[Score, ...] = ()
    mask: Mask | None = None
    weights: Weights = Softmax()
    scale: float | None = static(default=None)
    dropout_rate: float = static(default=0.0)
    implementation: str | None = static(default=None)
    products: Products = static(default=Products())

    def _attend(self, query, key, value, mask, dropout_key=None, **kwargs):
        rate = self.dropout_rate if dropout_key is not None else 0.0
        return attention(query, key, value, scores=self.scores, mask=mask, weights=self.weights, scale=self.scale, products=self.products,
                         dropout_rate=rate, dropout_key=dropout_key, implementation=kwargs.pop("implementation", self.implementation), **kwargs)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None, hooks=None):
        mask = self.mask
        if segment_ids is not None:
            mask = documents(segment_ids) if mask is None else mask & documents(segment_ids)
        return self._attend(query, key, value, mask, dropout_key, query_positions=query_positions, key_positions=key_positions, hooks=hooks,
                            implementation=None if hooks else self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        back = None if self.mask is None else self.mask.span()[0]
        slots = max_length if back is None else min(max_length, back + 1)
        return cache.init(batch, slots, kv_heads, key_size, value_size, dtype)

    def step(self, state, query, key, value, *, hooks=None):
        """Appends to the cache and attends to it; a prefill longer than a rolling cache goes through in pieces.

        Computes in the wider dtype of query and cache, and returns the query's.
        """
        t, slots = query.shape[1], state.key.shape[1]
        rolling = self.mask is not None and self.mask.span()[0] is not None
        if t == 1 or (t <= min(FEW, slots) and not rolling):
            state = cache.append(state, key, value)
            if hooks or self.implementation not in (None, "blockwise", "pallas") or mesh_in_context() is not None or not self.products.exact:
                return state, self._attend_cache(query, state.key, state.value, state.next - t, state.positions, hooks)
            return state, decode.decode(query, state.key, state.value, state.next, key_positions=state.positions, scores=self.scores, mask=self.mask,
                                        weights=self.weights, scale=self.scale, implementation=self.implementation)
        # Tokens of this call may overwrite what its first queries still see, so attend to old and new side by side.
        both = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        positions = jnp.concatenate([state.positions, state.next + jnp.arange(t, dtype=jnp.int32)])
        out = self._attend_cache(query, both(state.key, key), both(state.value, value), state.next, positions, hooks)
        skipped = max(t - slots, 0)
        state = state._replace(next=state.next + skipped)
        return cache.append(state, key[:, skipped:], value[:, skipped:]), out

    def _attend_cache(self, query, key, value, start, positions, hooks):
        """Attends from the tokens from position ``start`` on by the engine of whole sequences."""
        dtype = cache.computation_dtype(query, key, value)
        out = self._attend(*(x.astype(dtype) for x in (query, key, value)), self.mask, query_positions=start + jnp.arange(query.shape[1], dtype=jnp.int32),
                           key_positions=positions, hooks=hooks, implementation=None if hooks else self.implementation)
        return out.astype(query.dtype)


def pairs(*, scores=(), mask: Mask | None = None, weights: Weights = Softmax(), scale: float | None = None, dropout_rate: float = 0.0,
          implementation: str | None = None, products: Products = Products()) -> Pairs:
    """A mechanism of the pairs engine.

    Args: as in :func:`attnx.attention`. Its streaming state is a key-value cache; a mask of limited reach (a sliding window) makes it rolling, so
    the state is constant in the length.

    >>> import attnx, jax, jax.numpy as jnp
    >>> window = attnx.pairs(mask=attnx.masks.sliding_window(4))
    >>> window.init(batch=1, max_length=1000, kv_heads=2, key_size=8, value_size=8, dtype=jnp.float32).key.shape
    (1, 4, 2, 8)
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if scale is not None:
        scale = check_scale(scale, 1)
    dropout_rate = check_dropout_rate(dropout_rate)
    check_products(products)
    return Pairs(check_parts(scores, mask, weights), mask, weights, scale, dropout_rate, implementation, products)


def skipped(query, key, query_positions=None, key_positions=None, segment_ids=None, *, is_causal: bool = True) -> dict[str, Any]:
    """What a mechanism is told of padding and documents, as the keyword arguments of :func:`attnx.linear_attention` that say so.

    Order is all that counts to it: of positions only the sign is read, that of the queries where causal, that of the keys where not.
    """
    if is_causal and query_positions is not None:
        ids = jnp.zeros(query.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        segment_ids = jnp.where(jnp.broadcast_to(query_positions, ids.shape) < 0, -1, ids)
    masked = not is_causal and key_positions is not None
    return {"segment_ids": segment_ids, "key_mask": jnp.broadcast_to(jnp.asarray(key_positions) >= 0, key.shape[:2]) if masked else None}


@part
class Recurrent:
    """See :func:`recurrent`. A pytree; its array is the decay."""

    log_decay: Any = None
    feature_map: Callable | None = static(default=None)
    normalize: bool = static(default=False)
    scale: float | None = static(default=None)
    is_causal: bool = static(default=True)

    def _options(self):
        return dict(log_decay=self.log_decay, feature_map=self.feature_map, scale=self.scale)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        told = skipped(query, key, query_positions, key_positions, segment_ids, is_causal=self.is_causal)
        attend = partial(linear.linear_attention, normalize=self.normalize, is_causal=self.is_causal)
        mesh = mesh_in_context()
        if mesh is None:
            return attend(query, key, value, **told, **self._options())
        batch, heads = usable_axes(mesh, ("data", "fsdp"), query.shape[0]), usable_axes(mesh, ("tensor",), key.shape[2])
        sequence = usable_axes(mesh, ("sequence",), math.gcd(query.shape[1], key.shape[1]))
        tokens, whole = PartitionSpec(batch, sequence, heads, None), PartitionSpec(heads)

        def shard(query, key, value, told, log_decay):
            return attend(query, key, value, axis_name="sequence" if sequence else None, **told, **self._options() | {"log_decay": log_decay})

        by_token = {name: None if x is None else PartitionSpec(batch, sequence) for name, x in told.items()}
        specs = (tokens, tokens, tokens, by_token, None if self.log_decay is None else whole)
        return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(query, key, value, told, self.log_decay)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        if not self.is_causal:
            raise NotImplementedError("is_causal=False: every token reads the sum over all, so there is no streaming form; use is_causal=True")
        if self.feature_map is not None:
            key_size = jax.eval_shape(self.feature_map, jax.ShapeDtypeStruct((1, key_size), jnp.float32)).shape[-1]
        heads = kv_heads if self.log_decay is None else self.log_decay.shape[0]
        return linear.init(batch, heads, key_size, value_size, normalize=self.normalize, dtype=jnp.promote_types(dtype, jnp.float32))

    def step(self, state, query, key, value):
        return linear.step(state, query, key, value, **self._options())


def recurrent(*, log_decay=None, feature_map: Callable | None = None, normalize: bool = False, scale: float | None = None, is_causal: bool = True) -> Recurrent:
    """A mechanism of the recurrent engine: a state of constant size instead of a cache.

    ::

        S_t = e^g S_(t-1) + phi(k_t) v_t^T,        o_t = scale * phi(q_t) S_t        (over phi(q_t) . z_t with ``normalize``)

    Args:
      log_decay: g, at most 0: real [M], one a head (see :func:`attnx.core.linear.linear_attention`), or None for no decay.
      feature_map, normalize, scale: as there.
      is_causal: False for encoders and cross-attention: S is the sum over all keys, and there is no streaming form.

    On a mesh in context the sequence is sharded too; devices pass on states, not keys.

    >>> import attnx, jax.numpy as jnp
    >>> decayed = attnx.recurrent(log_decay=jnp.log(jnp.array([0.9, 0.99])))
    >>> decayed.init(batch=1, max_length=1000, kv_heads=2, key_size=8, value_size=8, dtype=jnp.float32).memory.shape
    (1, 2, 8, 8)
    """
    if log_decay is not None:
        log_decay = check_real("log_decay", log_decay, ranks=(1,))
    if feature_map is not None:
        check_function("feature_map", feature_map)
    if log_decay is not None and not is_causal:
        raise ValueError("log_decay: expected None with is_causal=False, where tokens have no order")
    return Recurrent(log_decay, feature_map, bool(normalize), scale, bool(is_causal))
