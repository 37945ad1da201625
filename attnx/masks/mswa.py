"""Multi-scale window attention: sliding windows that differ by head and by layer.

Xu, Nag, Li, Tian, Barsoum: "MSWA: Refining Local Attention with Multi-Scale Window Attention" (2025, arXiv 2501.01039):

    window(layer, head) = w * f_layer * f_head,        f = 1/4, 1/2, 1, 2 for the four groups of heads, and of layers from shallow to deep

so that some heads look near and others far, and deep layers further than shallow ones, from w / 16 to 4 w. Cost and cache are (15/16)^2 of those of a window w
everywhere. Reconstructed from the abstract: how groups are rounded is a choice made here.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.core.attention import attention
from attnx.masks.documents import documents
from attnx.masks.local import sliding_window
from attnx.mechanism import pairs, recurrent
from attnx.nn.attention import Attention
from pallas_kernels.parts import Cover, Mask, Operand, Range, part, static

IMPLEMENTATIONS = ("reference", "gathered", "blockwise", "pallas", "ring")
FACTORS = (1 / 4, 1 / 2, 1, 2)
_LARGEST = 512  # window, for which two blocks of that size at once are better than tiles one by one


def mswa_windows(num_layers: int, num_heads: int, window: int, *, mode: str = "both", factors: Sequence[float] = FACTORS) -> np.ndarray:
    """The windows of all heads of all layers.

    Args:
      num_layers, num_heads: L and N; where there are no equal groups, earlier ones have more members.
      window: w, the base.
      mode: "both"; "head", the same in all layers; or "layer", the same for all heads of a layer.
      factors: of the groups.

    Returns:
      Integers [L, N], rounded down, at least 1.

    >>> mswa_windows(4, 4, 64)
    array([[  4,   8,  16,  32],
           [  8,  16,  32,  64],
           [ 16,  32,  64, 128],
           [ 32,  64, 128, 256]])
    """
    for name, value in (("num_layers", num_layers), ("num_heads", num_heads), ("window", window)):
        checks.check_integer(name, value, least=1)
    if mode not in ("both", "head", "layer"):
        raise ValueError(f"mode: expected 'both', 'head' or 'layer', got {mode!r}")

    def of(count, varies):
        groups = np.array_split(np.arange(count), len(factors))
        return np.concatenate([np.full(len(group), factor if varies else 1.0) for group, factor in zip(groups, factors)])

    share = of(num_layers, mode != "head")[:, None] * of(num_heads, mode != "layer")
    return np.maximum(np.floor(window * share), 1).astype(int)


@part
class PerHeadWindow(Mask):
    """See :func:`per_head_window`."""

    windows: Any

    def operands(self, sizes):
        return (Operand(self.windows, ("head",)),)

    def tile(self, at, window):
        offset = at.key - at.query
        return (offset <= 0) & (offset > -window)

    def block(self, query, key, window: Range):
        lowest, highest = key.low - query.high, key.high - query.low
        return Cover((highest > -window.high) & (lowest <= 0), (lowest > -window.low) & (highest <= 0))


def per_head_window(windows: Int[Array, " N"]) -> Mask:
    """A sliding window a head: ``query - windows[head] < key <= query``.

    Skips what no head of a tile sees; :func:`multi_window_attention` costs what each head sees.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2, 8))
    >>> attnx.attention_weights(q, k, mask=per_head_window(jnp.array([1, 3])))[0, :, 3] > 0
    Array([[False, False, False,  True],
           [False,  True,  True,  True]], dtype=bool)
    """
    return PerHeadWindow(checks.check_integers("windows", windows, ranks=(1,)))


def _groups(windows: Sequence[int], kv_heads: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(window, its heads, the key-value heads that they read): of each distinct window, repeated where a group shares keys unequally."""
    sizes, shared = np.asarray(windows), len(windows) // kv_heads
    groups = []
    for window in np.unique(sizes):
        heads = np.flatnonzero(sizes == window)
        kv, counts = np.unique(heads // shared, return_counts=True)
        groups.append((int(window), heads, kv if (counts == counts[0]).all() else heads // shared))
    return groups


def _take(x, heads):
    """Heads of [B, T, N, H], without a copy where they are all of them."""
    return x if len(heads) == x.shape[2] and (heads == np.arange(len(heads))).all() else x[:, :, heads]


def _gather(outs, groups):
    """The outputs of groups in the order of heads."""
    return _take(jnp.concatenate(outs, axis=2), np.argsort(np.concatenate([heads for _, heads, _ in groups])))


def _check_windows(windows, heads: int | None = None) -> tuple[int, ...]:
    windows = tuple(checks.check_integer("windows", window, least=1) for window in np.asarray(windows).reshape(-1).tolist())
    if heads is not None and len(windows) != heads:
        raise ValueError(f"windows: expected one for each of the query's {heads} heads, got {len(windows)}")
    return windows


def multi_window_attention(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], windows: Sequence[int], *,
                           key_positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, scale: float | None = None,
                           dropout_rate: float = 0.0, dropout_key: Array | None = None, implementation: str | None = None,
                           block_sizes: tuple[int, int] | None = None) -> Float[Array, "B T N Hv"]:
    """Causal sliding-window attention with a window for each head, evaluated by groups of heads so that each costs what it sees.

    ::

        out_i = sum over i - w_n < j <= i of  softmax_j(scale q_i . k_j) v_j            for head n

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H], N a multiple of K.
      value: [B, T, K, Hv].
      windows: N integers, static: how many keys a query of each head sees, its own included.
      key_positions: int32 [T] or [B, T], of queries as well: -1 is padding; others grow by one from token to token.
      segment_ids: int32 [B, T], documents that do not see each other.
      scale: of the dot products; 1 / sqrt(H) by default.
      dropout_rate, dropout_key: as in :func:`attnx.attention`; not in "reference" and "gathered".
      implementation: "reference" (one mask for all heads, the definition); "gathered" (queries in blocks as long as the window, each of which attends to itself
        and to the block before); or one of the engine's, "blockwise", "pallas" and "ring", a call for each group. None takes "gathered" for small windows and the
        engine's choice for large ones.
      block_sizes: as in :func:`attnx.attention`, for the engine's.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(T H sum of windows) time; memory O(T sum of small windows) where gathered, else O(T).

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 10, 4, 8))
    >>> out = multi_window_attention(q, k, v, (1, 2, 4, 8))
    >>> bool(jnp.allclose(out, attention(q, k, v, mask=per_head_window(jnp.array([1, 2, 4, 8]))), atol=1e-5))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    batch, length, heads, _ = query.shape
    if key.shape[1] != length:
        raise ValueError(f"key: expected the query's {length} tokens, got {checks.describe(key)}")
    windows = _check_windows(windows, heads)
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    positions = checks.check_positions("key_positions", key_positions, batch, length)
    if segment_ids is not None and jnp.shape(segment_ids) != (batch, length):
        raise ValueError(f"segment_ids: expected shape [B, T] = {[batch, length]}, got {checks.describe(segment_ids)}")
    if dropout_rate and implementation in ("reference", "gathered"):
        raise NotImplementedError(f"implementation={implementation!r} has no dropout; use 'blockwise' or None")
    both = lambda mask: mask if segment_ids is None else mask & documents(segment_ids)
    if implementation == "reference":
        return attention(query, key, value, mask=both(per_head_window(jnp.array(windows))), scale=scale, query_positions=positions, key_positions=positions,
                         implementation="reference")
    groups, outs = _groups(windows, key.shape[2]), []
    for index, (window, of_query, of_key) in enumerate(groups):
        q, k, v = _take(query, of_query), _take(key, of_key), _take(value, of_key)
        if implementation == "gathered" or implementation is None and window <= _LARGEST and not dropout_rate:
            outs.append(_gathered(q, k, v, window, positions, segment_ids, scale))
        else:
            own = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            outs.append(attention(q, k, v, mask=both(sliding_window(window)), scale=scale, query_positions=positions, key_positions=positions,
                                  dropout_rate=dropout_rate, dropout_key=own, implementation=implementation, block_sizes=block_sizes))
    return _gather(outs, groups)


def _gathered(query, key, value, window, positions, segment_ids, scale):
    """Heads of one window: blocks of that many queries attend to their own and to the block before, as so many batch elements."""
    batch, length = query.shape[:2]
    if not batch or not length:
        return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    window = min(window, length)
    count = -(-length // window)

    def cut(x, fill=0):
        """[B, T, ...] as [B, blocks, window, ...]."""
        x = jnp.pad(x, [(0, 0), (0, count * window - length), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return x.reshape(x.shape[0], count, window, *x.shape[2:])

    def two(x, fill=0):
        """Blocks with the one before."""
        x = cut(x, fill)
        if count == 1:
            return x
        before = jnp.pad(x, [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)[:, :-1]
        return jnp.concatenate([before, x], axis=2)

    flat = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])).reshape(batch * count, *x.shape[2:])
    positions = jnp.atleast_2d(jnp.arange(length, dtype=jnp.int32) if positions is None else positions)
    mask = sliding_window(window)
    if segment_ids is not None:
        mask &= documents(flat(cut(segment_ids)), flat(two(segment_ids)))
    out = attention(flat(cut(query)), flat(two(key)), flat(two(value)), mask=mask, scale=scale, query_positions=flat(cut(positions, -1)),
                    key_positions=flat(two(positions, -1)), implementation="reference")
    return out.reshape(batch, count * window, *out.shape[2:])[:, :length]


@part
class MultiScaleWindow:
    """:func:`multi_window_attention` as an :class:`attnx.Mechanism`; see :func:`multi_scale_window`."""

    windows: tuple[int, ...] = static(default=(1,))
    scale: float | None = static(default=None)
    dropout_rate: float = static(default=0.0)
    implementation: str | None = static(default=None)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        rate = self.dropout_rate if dropout_key is not None else 0.0
        return multi_window_attention(query, key, value, self.windows, key_positions=key_positions, segment_ids=segment_ids, scale=self.scale,
                                      dropout_rate=rate, dropout_key=dropout_key, implementation=self.implementation)

    def _mechanisms(self, kv_heads):
        return [(pairs(mask=sliding_window(window), scale=self.scale), *heads) for window, *heads in _groups(self.windows, kv_heads)]

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        """A rolling cache a group, of as many tokens as its window."""
        return tuple(mechanism.init(batch, max_length, len(of_key), key_size, value_size, dtype) for mechanism, _, of_key in self._mechanisms(kv_heads))

    def step(self, state, query, key, value):
        states, outs = [], []
        for own, (mechanism, of_query, of_key) in zip(state, self._mechanisms(key.shape[2]), strict=True):
            own, out = mechanism.step(own, _take(query, of_query), _take(key, of_key), _take(value, of_key))
            states.append(own)
            outs.append(out)
        return tuple(states), _gather(outs, _groups(self.windows, key.shape[2]))


def multi_scale_window(windows: Sequence[int], *, scale: float | None = None, dropout_rate: float = 0.0,
                       implementation: str | None = None) -> MultiScaleWindow:
    """A mechanism with a sliding window for each head, and a rolling cache for each group of heads; arguments as in :func:`multi_window_attention`.

    >>> import jax.numpy as jnp
    >>> states = multi_scale_window((2, 2, 8, 8)).init(batch=1, max_length=100, kv_heads=4, key_size=16, value_size=16, dtype=jnp.float32)
    >>> [state.key.shape for state in states]
    [(1, 2, 2, 16), (1, 8, 2, 16)]
    """
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    return MultiScaleWindow(_check_windows(windows), scale, checks.check_dropout_rate(dropout_rate), implementation)


def _positive(x):
    return jax.nn.elu(x) + 1


def mswa_mechanisms(num_layers: int, num_heads: int, window: int, *, mode: str = "both", linear_every: int | None = None, **options) -> list:
    """The mechanisms of all layers of a model.

    Args:
      num_layers, num_heads, window, mode: as in :func:`mswa_windows`.
      linear_every: every so many layers one is linear attention (of elu(x) + 1), which sees all of the past; None for none.
      **options: of :func:`multi_scale_window`.

    >>> [type(mechanism).__name__ for mechanism in mswa_mechanisms(4, 4, 64, linear_every=2)]
    ['MultiScaleWindow', 'Recurrent', 'MultiScaleWindow', 'Recurrent']
    """
    local = [multi_scale_window(windows, **options) for windows in mswa_windows(num_layers, num_heads, window, mode=mode)]
    linear = recurrent(feature_map=_positive, normalize=True)
    return [linear if linear_every and (layer + 1) % linear_every == 0 else mechanism for layer, mechanism in enumerate(local)]


class MSWAttention(Attention):
    """Multi-head :func:`multi_window_attention`.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism. The paper has rotary positions.
      windows: of the heads, a row of :func:`mswa_windows`.
      dropout_rate, implementation: as in :func:`multi_window_attention`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = MSWAttention(32, 4, windows=mswa_windows(2, 4, 16)[0], rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, windows: Sequence[int], dropout_rate: float = 0.0, implementation: str | None = None, rngs,
                 **options):
        mechanism = multi_scale_window(_check_windows(windows, num_heads), dropout_rate=dropout_rate, implementation=implementation)
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
