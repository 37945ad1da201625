"""Neighbourhood attention on grids of one, two or three dimensions, with strides, dilation and causal axes, at the cost of the tiles that neighbourhoods touch.

Hassani et al.: "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light" (2025, arXiv 2504.16922). In each dimension, for the
query at i of n places, with i' = i div d in its residue class of n' places (those of equal remainder by the dilation d), window w and stride s:

    leader = min((i' div s) s + s div 2, n' - 1),      centre = clamp(leader, w div 2, n' - ceil(w / 2))
    keys     j' in centre - w div 2 .. centre + ceil(w / 2) - 1        of the same class: always w of them, shifted inside at borders
    causal:  leader = min((i' div s) s + s - 1, n' - 1),   leader - w < j' <= i'

A pair is allowed if all dimensions allow it. s = 1 is neighbourhood attention, s = w windows that do not overlap, w = n all pairs. Queries of a stride share keys.

Tokens are put into an order in which each tile of the grid, of one residue class, is contiguous (:func:`token_permute`), and then the mask is one among others: it
knows from the boxes of two tiles whether they have allowed pairs, so every execution skips the others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.core.attention import attention, picked
from attnx.core.fused import prefer, target
from attnx.core.halves import merge
from attnx.core.ring import mesh_in_context
from attnx.masks.grid_order import Order, Shape, Sizes, each_dimension, token_permute, token_unpermute
from pallas_kernels.parts import Cover, Mask, Operand, Range, Score, Weights, part, static

Flags = bool | Sequence[bool]
_TILES = {1: (256,), 2: (16, 16), 3: (4, 8, 8)}


@part
class Neighborhood(Mask):
    """See :func:`neighborhood`."""

    query_order: Order = static()
    key_order: Order = static()
    window: Shape = static()
    stride: Shape = static()
    is_causal: tuple[bool, ...] = static()

    def _dimensions(self):
        return zip(self.query_order.grid, self.query_order.dilation, self.window, self.stride, self.is_causal)

    def tile(self, at):
        allowed = True
        for (own, place), (others, key), (n, d, w, s, causal) in zip(self.query_order.boxes(at.query, at.query), self.key_order.boxes(at.key, at.key),
                                                                     self._dimensions()):
            size = _class_size(n, d, own.low)
            first, last = _reach(place.low, size, w, s, causal)
            allowed &= (key.low >= first) & (key.low <= jnp.where(place.low < size, last, -1))  # padding sees nothing
            if d > 1:
                allowed &= own.low == others.low
        return allowed

    def block(self, query, key):
        some, every = True, True
        for (own, place), (others, keys), (n, d, w, s, causal) in zip(self.query_order.boxes(*query), self.key_order.boxes(*key), self._dimensions()):
            most, least = (_class_size(n, d, c) for c in own)
            (first, _), (_, last) = _reach(place.low, least, w, s, causal), _reach(place.high, most, w, s, causal)
            some &= (keys.high >= first) & (keys.low <= last) & (own.low <= others.high) & (others.low <= own.high) & (place.low < most)
            (latest, _), (_, earliest) = _reach(place.high, most, w, s, causal), _reach(place.low, least, w, s, causal)
            every &= (keys.low >= latest) & (keys.high <= earliest) & (place.high < least)
            every &= (own.low == own.high) & (others.low == others.high) & (own.low == others.low)
        return Cover(some, every)


@part
class GridBias(Score):
    """Adds ``table[n, j' - i' + w - 1]`` to scores, a place of the table for each difference of places in a neighbourhood."""

    table: Any
    query_order: Order = static()
    key_order: Order = static()
    window: Shape = static()

    def operands(self, sizes):
        return (Operand(self.table.reshape(self.table.shape[0], -1), ("head", None)),)

    def tile(self, s, at, table):
        index = 0
        for (_, place), (_, key), w in zip(self.query_order.boxes(at.query, at.query), self.key_order.boxes(at.key, at.key), self.window):
            index = index * (2 * w - 1) + jnp.clip(key.low - place.low, 1 - w, w - 1) + w - 1
        return s + table.reshape(-1)[index].astype(s.dtype)


def _class_size(n, d, residue):
    return (n - residue + d - 1) // d


def _reach(place, size, window, stride, causal):
    """The first and the last key of the queries at a place in a class of a size; neither falls where place or size grows."""
    group = place // stride * stride
    if causal:
        return jnp.minimum(group + stride - 1, size - 1) - window + 1, place
    leader = jnp.minimum(group + stride // 2, size - 1)
    first = jnp.clip(leader, window // 2, size - (window + 1) // 2) - window // 2
    return first, first + window - 1


def _check(grid, window, stride, dilation, is_causal):
    grid = tuple(checks.check_integer("grid", n, least=1) for n in grid)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: expected 1 to 3 dimensions, got {grid}")
    dims = len(grid)
    window = each_dimension("window", window, dims, grid)
    dilation = each_dimension("dilation", dilation, dims, [n // w for n, w in zip(grid, window)])
    stride = each_dimension("stride", stride, dims, window)
    causal = (is_causal,) * dims if isinstance(is_causal, (bool, np.bool_)) else tuple(is_causal)
    if len(causal) != dims:
        raise ValueError(f"is_causal: expected a boolean or one for each of {dims} dimensions, got {is_causal}")
    return grid, window, stride, dilation, tuple(map(bool, causal))


def neighborhood(grid: Sequence[int], window: Sizes, *, stride: Sizes = 1, dilation: Sizes = 1, is_causal: Flags = False, query_tile: Sequence[int] | None = None,
                 key_tile: Sequence[int] | None = None) -> Neighborhood:
    """The mask of neighbourhoods on a grid; the equation stands above.

    Args:
      grid: sizes of 1 to 3 dimensions. Position p is the token at ``unravel_index(p, grid)``, or the p-th after :func:`token_permute`.
      window: keys a query has in each dimension, at most the size.
      stride: 1 .. window: queries that share their keys.
      dilation: at most size // window: of a query and its keys in each dimension, the places are equal modulo this.
      is_causal: whether a query sees no later place, in each dimension.
      query_tile, key_tile: the tiles by which tokens were permuted; None where they stand by rows.

    Raises:
      ValueError: for sizes that do not fit.

    Cost: by rows hardly a tile of a 2-D grid is empty; use :func:`neighborhood_attention`, or permute.

    >>> import attnx, jax.numpy as jnp
    >>> x = jnp.ones((1, 5, 1, 4))
    >>> attnx.attention_weights(x, x, mask=neighborhood((5,), 3))[0, 0, 0] > 0
    Array([ True,  True,  True, False, False], dtype=bool)
    """
    shape, windows, strides, dilations, causal = _check(grid, window, stride, dilation, is_causal)
    order = lambda name, tile: Order(shape, dilations, None if tile is None else each_dimension(name, tile, len(shape)))
    return Neighborhood(order("query_tile", query_tile), order("key_tile", key_tile), windows, strides, causal)


def _tiled(grid, window, stride, dilation, is_causal, query_tile, key_tile) -> Neighborhood:
    """The mask on tiles no larger than a class, also where none are asked for."""
    shape, windows, strides, dilations, causal = _check(grid, window, stride, dilation, is_causal)

    def order(name, tile):
        sizes = _TILES[len(shape)] if tile is None else each_dimension(name, tile, len(shape))
        return Order(shape, dilations, tuple(min(t, -(-n // d)) for t, n, d in zip(sizes, shape, dilations)))

    return Neighborhood(order("query_tile", query_tile), order("key_tile", key_tile), windows, strides, causal)


def neighborhood_attention(query: Float[Array, "B *grid N H"], key: Float[Array, "B *grid K H"], value: Float[Array, "B *grid K Hv"], window: Sizes, *,
                           stride: Sizes = 1, dilation: Sizes = 1, is_causal: Flags = False, extra_key: Float[Array, "B S K H"] | None = None,
                           extra_value: Float[Array, "B S K Hv"] | None = None, bias: Float[Array, "N ..."] | None = None, weights: Weights | None = None,
                           scale: float | None = None,
                           query_tile: Sequence[int] | None = None, key_tile: Sequence[int] | None = None, implementation: str | None = None,
                           return_residual: bool = False):
    """Attention of each token of a grid to its neighbourhood.

    ::

        out_i = sum_j softmax_j(scale q_i . k_j + bias[j' - i' + w - 1]) v_j        over the keys j of the neighbourhood of i, and the extra ones, without bias

    Args:
      query: [B, *grid, N, H], a grid of 1 to 3 dimensions.
      key: [B, *grid, K, H], N a multiple of K.
      value: [B, *grid, K, Hv].
      window, stride, dilation, is_causal: an integer, or one a dimension; see :func:`neighborhood`.
      extra_key, extra_value: [B, S, K, H] and [B, S, K, Hv], tokens that all queries also see (of a text, say).
      bias: [N, 2 w - 1, ...], for each difference of places of a class in each dimension. In kernels it enters by a product of queries and keys with as many more
        features as the window has tokens, at most 256, and is rounded as they are.
      weights: a member of :mod:`attnx.weights`; softmax by default. With extra keys, one that merges.
      scale: of the dot products; 1 / sqrt(H) by default.
      query_tile, key_tile: sizes of tiles, at most those of a residue class; by default 256 tokens. Tiles that match window and stride (:func:`neighborhood_plan`) cost
        no more than the window. In kernels for TPUs a tile is a block if its tokens are a power of two and at least 128; those for GPUs have blocks of their own.
      implementation: as of :func:`attnx.attention`.
      return_residual: whether the log of the normaliser is returned too.

    Returns:
      [B, *grid, N, Hv]; with ``return_residual`` also [B, *grid, N].

    Raises:
      ValueError: for shapes that do not match or sizes that do not fit.
      NotImplementedError: a named implementation cannot serve the call.

    Cost: O(B N visited tiles * tile^2 H) time, O(B N T H) memory; in kernels with biases, H and the tokens of a window in place of H.

    >>> x = jnp.ones((1, 6, 6, 1, 8))
    >>> neighborhood_attention(x, x, x, 3).shape
    (1, 6, 6, 1, 8)
    """
    if query.ndim < 4 or key.ndim != query.ndim or key.shape[:-2] != query.shape[:-2] or value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"key: expected [B, *grid, K, H] as query [B, *grid, N, H] and value [B, *grid, K, Hv], got query {query.shape}, key {key.shape}, "
                         f"value {value.shape}")
    if (extra_key is None) != (extra_value is None):
        raise ValueError("extra_value: expected one with extra_key, and none without")
    mask = _tiled(query.shape[1:-2], window, stride, dilation, is_causal, query_tile, key_tile)
    grid, dilation, query_tile = mask.query_order
    key_tile = mask.key_order.tile
    assert query_tile is not None and key_tile is not None
    options: dict[str, Any] = dict(implementation=implementation, scale=scale) | ({} if weights is None else {"weights": weights})
    residual, sizes = return_residual or extra_key is not None, (math.prod(query_tile), math.prod(key_tile))
    q, k, v = (token_permute(x, tile, dilation) for x, tile in ((query, query_tile), (key, key_tile), (value, key_tile)))
    if bias is not None and jnp.shape(bias) != (expected := (query.shape[-2], *(2 * w - 1 for w in mask.window))):
        raise ValueError(f"bias: expected shape {expected} for {expected[0]} heads and window {mask.window}, got {jnp.shape(bias)}")

    def kernels():
        more = {"implementation": implementation or "pallas"}
        if target()[1] == "tpu" and all(size >= 128 and size.bit_count() == 1 for size in sizes):
            more["block_sizes"] = sizes
        rows, columns = (q, k) if bias is None else _with_bias(q, k, jnp.asarray(bias), mask, scale)
        return attention(rows, columns, v, mask=mask, return_residual=residual, **options | more | ({} if bias is None else {"scale": 1.0}))

    def tiles():
        more = {"block_sizes": sizes} if implementation in (None, "blockwise") else {}
        if implementation is None and mesh_in_context() is None:
            more["implementation"] = "blockwise"
        scores = () if bias is None else (GridBias(jnp.asarray(bias), mask.query_order, mask.key_order, mask.window),)
        return attention(q, k, v, mask=mask, scores=scores, return_residual=residual, **options | more)

    found = prefer(picked(implementation), kernels, tiles)
    if extra_key is not None and extra_value is not None:
        found = merge(found, attention(q, extra_key, extra_value, return_residual=True, **options))
    back = [token_unpermute(x, grid, query_tile, dilation) for x in (found if isinstance(found, tuple) else (found,))]
    return tuple(back) if return_residual else back[0]


def _with_bias(query, key, table, mask, scale):
    """Queries and keys whose dot products are the scores with biases: ``scale q_i . k_j + b_ij``.

    The keys of a neighbourhood have places of their own modulo the window, so that b_ij is entry j' mod w of all that i adds to its keys.
    """
    residues = math.prod(mask.window)
    if residues > 256:
        raise NotImplementedError(f"bias: kernels take windows of at most 256 tokens, got {residues} of {mask.window}; use 'blockwise' or None")

    def places(order):
        position = jnp.arange(math.prod(order.radices))
        return [(own.low, place.low) for own, place in order.boxes(position, position)]

    entries, own = jnp.zeros((1, 1), jnp.int32), 0
    for (residue, place), (_, other), (n, d, w, s, causal) in zip(places(mask.query_order), places(mask.key_order), mask._dimensions()):
        first, _ = _reach(place, _class_size(n, d, residue), w, s, causal)
        seen = first[:, None] + (jnp.arange(w) - first[:, None]) % w
        entry = jnp.clip(seen - place[:, None] + w - 1, 0, 2 * w - 2)
        entries = (entries[:, :, None] * (2 * w - 1) + entry[:, None]).reshape(len(entry), -1)
        own = own * w + other % w
    added = table.reshape(len(table), -1)[:, entries].swapaxes(0, 1)  # [T, N, residues]
    chosen = jax.nn.one_hot(own, residues, dtype=key.dtype)[:, None]
    query = query * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, query.dtype)
    append = lambda x, y: jnp.concatenate([x, jnp.broadcast_to(y.astype(x.dtype), (*x.shape[:-1], residues))], -1)
    return append(query, added), append(key, chosen)


class TilePlan(NamedTuple):
    """What a mask makes of all pairs of tiles.

    Attributes:
      some: [query tiles, key tiles], which are visited.
      every: those of them that need no mask.
      dense: how many pairs all tokens have, over those of the neighbourhoods: the most that sparsity can save.
    """

    some: np.ndarray
    every: np.ndarray
    dense: float

    @property
    def visited(self) -> np.ndarray:
        """Key tiles of each query tile."""
        return self.some.sum(1)

    @property
    def speedup(self) -> float:
        """All pairs of tiles over the visited ones: what skipping saves."""
        return self.some.size / int(self.some.sum())

    @property
    def is_perfect(self) -> bool:
        """Whether no tile needs a mask: perfectly block-sparse."""
        return bool((self.some == self.every).all())


def neighborhood_plan(grid: Sequence[int], window: Sizes, *, stride: Sizes = 1, dilation: Sizes = 1, is_causal: Flags = False, query_tile: Sequence[int] | None = None,
                      key_tile: Sequence[int] | None = None) -> TilePlan:
    """Which tiles :func:`neighborhood_attention` visits, with the same arguments: a simulation, without a token.

    >>> plan = neighborhood_plan((64, 64), 16, stride=16, query_tile=(8, 8), key_tile=(8, 8))
    >>> plan.dense, plan.speedup, plan.is_perfect
    (16.0, 16.0, True)
    >>> round(neighborhood_plan((64, 64), 16, query_tile=(8, 8), key_tile=(8, 8)).speedup, 1)
    8.5
    """
    mask = _tiled(grid, window, stride, dilation, is_causal, query_tile, key_tile)

    def ranges(order):
        low = np.arange(0, math.prod(order.radices), math.prod(order.tile))
        return Range(low, low + math.prod(order.tile) - 1)

    query, key = ranges(mask.query_order), ranges(mask.key_order)
    with jax.ensure_compile_time_eval():
        cover = mask.block(Range(query.low[:, None], query.high[:, None]), Range(key.low[None], key.high[None]))
        counts = [_mean_keys(*dimension) for dimension in mask._dimensions()]
    return TilePlan(np.asarray(cover.some), np.asarray(cover.every), math.prod(mask.query_order.grid) / math.prod(counts))


def _mean_keys(n, d, w, s, causal):
    """Of the queries of a dimension, over all its classes."""
    places = np.arange(n) // d
    first, last = _reach(places, _class_size(n, d, np.arange(n) % d), w, s, causal)
    return float((last - np.maximum(first, 0) + 1).mean())
