"""MoBA: every query and head attends to its own block of keys and to the few earlier ones whose mean it likes best.

Lu et al.: "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025, arXiv 2502.13189):

    chosen(i, n) = own block of i  and  the M - 1 earlier blocks c with the largest  q_in . mean of the keys in c
    out_in       = softmax attention of i to the keys up to its own in chosen(i, n)

No parameters; gradients flow through what is attended to, not through the choice. With M the number of blocks it is causal attention, so a model switches
between the two with the weights it has. The fast form is that of a mixture of experts, and is exact: queries are sorted by the blocks that they chose, so that a tile of
queries meets one block; what a query found in its own block and in each chosen one is merged under one normaliser.

Blocks begin with documents: packed sequences share none. Where documents end inside a block, it is only ever its own tokens' block, so those that can be chosen
number T / block at the most however many documents there are.
"""

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnx.core import cache, checks
from attnx.core.attention import attention
from attnx.core.halves import merge
from attnx.core.selected import IMPLEMENTATIONS, selected_attention
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.masks.explicit import explicit
from attnx.mechanism import Pairs, pairs
from pallas_kernels.parts import part, static
from pallas_kernels.tile import accumulator_dtype

TILE = 128  # queries that meet a block together, at the most
FEW = 4  # tokens, at the most, that read the cache one by one when decoding


class Layout(NamedTuple):
    """Where blocks lie in a row of documents. Complete blocks are numbered in storage order.

    Attributes:
      own: int32 [B or 1, T], a number for the block of each token, -1 for padding.
      low, high: int32 [B or 1, T], the complete blocks that a token may choose: from low to high - 1.
      member: int32 [B or 1, T], the complete block that holds a token, or -1.
      tokens: int32 [B, C block], the tokens of the complete blocks; or None where these lie one after another from the start.
    """

    own: Any
    low: Any
    high: Any
    member: Any
    tokens: Any = None


def _plain_layout(positions, length: int, block: int) -> Layout:
    """Of one document, for tokens at ``positions`` [1, t]."""
    own = positions // block
    return Layout(own, jnp.zeros_like(own), own, jnp.where(own < length // block, own, -1))


def _layout(segment_ids, real, block: int) -> Layout:
    """Of runs of equal ids [B, T] among the tokens that are ``real`` [B, T]."""
    exclusive = lambda x: jnp.cumsum(x, axis=1, dtype=jnp.int32) - x
    latest = lax.associative_scan(lambda a, b: (jnp.where(b[1], b[0], a[0]), a[1] | b[1]), (segment_ids, real), axis=1)
    id_before, any_before = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in latest)
    starts = real & ~(any_before & (id_before == segment_ids))
    since = lambda x: lax.cummax(jnp.where(starts, x, 0), axis=1)  # of counts that never fall: their value at the document's start
    rank = exclusive(real)
    within = (rank - since(rank)) % block
    ends = real & (within == block - 1)
    before = exclusive(ends)
    own = exclusive(real & (within == 0)) - ~(real & (within == 0))
    rows = jnp.arange(own.shape[0])[:, None]
    member = jnp.where(real & jnp.zeros_like(ends).at[rows, own].max(ends)[rows, own], before, -1)
    size = own.shape[1] // block * block
    place = jnp.where(member < 0, size, member * block + within)
    tokens = jnp.zeros((own.shape[0], size), jnp.int32).at[rows, place].set(jnp.arange(own.shape[1], dtype=jnp.int32), mode="drop")
    return Layout(jnp.where(real, own, -1), since(before), jnp.where(real, before, 0), member, tokens)


def _blocks(x, layout: Layout, block: int):
    """The tokens of the complete blocks, [B, C block, ...]."""
    if layout.tokens is None:
        return x[:, :x.shape[1] // block * block]
    tokens = jnp.broadcast_to(layout.tokens, (x.shape[0], layout.tokens.shape[1]))
    return jnp.take_along_axis(x, tokens.reshape(*tokens.shape, *(1,) * (x.ndim - 2)), axis=1)


def _means(keys, block: int):
    """Of the keys of each block: [B, C, K, H] from [B, C block, K, H]."""
    return keys.reshape(keys.shape[0], -1, block, *keys.shape[2:]).astype(accumulator_dtype(keys.dtype)).mean(2)


def _choose(query, means, low, high, most: int):
    """The table [B, N, T, J] of the blocks from ``low`` to ``high`` - 1 whose means [B, C, K, H] a query likes best, -1 where there are fewer."""
    (b, t, n, h), (c, k) = query.shape, means.shape[1:3]
    grouped = query.reshape(b, t, k, n // k, h).astype(means.dtype)
    liking = lax.stop_gradient(jnp.einsum("btkgh,bckh->bkgtc", grouped, means)).reshape(b, n, t, c)
    numbers = jnp.arange(c, dtype=jnp.int32)
    allowed = (low[..., None] <= numbers) & (numbers < high[..., None])
    best, chosen = lax.top_k(jnp.where(allowed[:, None], liking, -jnp.inf), min(most, c))
    return jnp.where(best > -jnp.inf, chosen, -1)


def moba_gate(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], *, block_size: int = 512, num_blocks: int = 3,
              segment_ids: Int[Array, "B T"] | None = None, key_positions: Int[Array, "*B T"] | None = None) -> Int[Array, "B N T J"]:
    """The earlier blocks that each query and head chooses.

    ::

        the num_blocks - 1 complete blocks c before that of i, of its document, with the largest  q_in . mean of the keys in c

    Args:
      query, key, block_size, num_blocks, segment_ids, key_positions: as in :func:`moba_attention`.

    Returns:
      int32 [B, N, T, min(num_blocks - 1, T // block_size)], the best first, -1 where there are fewer. Complete blocks are numbered as they are stored: without
      documents and padding block c holds the tokens c block_size to (c + 1) block_size - 1. The own block goes without saying. Scores are float32 or wider.

    Cost: O(T^2 / block_size) time and memory.

    >>> import jax, jax.numpy as jnp
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 8, 1, 4))
    >>> moba_gate(q, k, block_size=2, num_blocks=3)[0, 0, ::2].tolist()
    [[-1, -1], [0, -1], [1, 0], [2, 0]]
    """
    query, key, _, layout = _check(query, key, None, block_size, num_blocks, segment_ids, key_positions)
    return _choose(query, _means(_blocks(key, layout, block_size), block_size), layout.low, layout.high, num_blocks - 1)


class Dispatch(NamedTuple):
    """Pairs of a query and a block that it chose, sorted by block; each block's are padded to whole tiles, so the capacity P is static.

    Attributes:
      query: int32 [B, N, P], the query of each pair, -1 for padding.
      block: int32 [B, N, P / tile], the block that the queries of a tile chose, -1 for none.
      place: int32 [B, N, T, J], where the pair of an entry of the table is; P for none.
    """

    query: Int[Array, "B N P"]
    block: Int[Array, "B N tiles"]
    place: Int[Array, "B N T J"]


def moba_dispatch(chosen: Int[Array, "B N T J"], blocks: int, tile: int = TILE) -> Dispatch:
    """Sorts queries by the blocks that they chose.

    Args:
      chosen: int [B, N, T, J] in [0, blocks), or -1; see :func:`moba_gate`.
      blocks: how many blocks there are.
      tile: queries of a tile.

    Returns:
      A :class:`Dispatch` of capacity P = T J + blocks (tile - 1), rounded up to whole tiles.

    Cost: O(T J log(T J)) a head.

    >>> import jax.numpy as jnp
    >>> pairs = moba_dispatch(jnp.array([[[[-1], [0], [1], [0]]]]), blocks=2, tile=2)
    >>> pairs.query.tolist(), pairs.block.tolist()
    ([[[1, 3, 2, -1, -1, -1]]], [[[0, 1, -1]]])
    """
    chosen = checks.check_integers("chosen", chosen, ranks=(4,))
    blocks, tile = checks.check_integer("blocks", blocks, least=1), checks.check_integer("tile", tile, least=1)
    t, j = chosen.shape[2:]
    tiles = -(-(t * j + blocks * (tile - 1)) // tile)

    def one(table):  # of a head
        flat = jnp.where(table < 0, blocks, table).reshape(-1).astype(jnp.int32)
        order = jnp.argsort(flat, stable=True)
        bounds = jnp.searchsorted(flat[order], jnp.arange(blocks + 1, dtype=jnp.int32)).astype(jnp.int32)
        ends = jnp.cumsum(-(-jnp.diff(bounds) // tile) * tile, dtype=jnp.int32)
        starts = jnp.pad(ends, (1, 0))
        block = flat[order]
        sorted_place = jnp.where(block < blocks, starts[block] + jnp.arange(t * j, dtype=jnp.int32) - bounds[block], tiles * tile)
        query = jnp.full(tiles * tile, -1, jnp.int32).at[sorted_place].set((order // j).astype(jnp.int32), mode="drop")
        place = jnp.zeros(t * j, jnp.int32).at[order].set(sorted_place, unique_indices=True)
        of_tile = jnp.searchsorted(ends, jnp.arange(tiles, dtype=jnp.int32) * tile, side="right").astype(jnp.int32)
        return Dispatch(query, jnp.where(of_tile < blocks, of_tile, -1), place.reshape(t, j))

    return jax.vmap(jax.vmap(one))(chosen)


def moba_attention(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], *, block_size: int = 512, num_blocks: int = 3,
                   scale: float | None = None, segment_ids: Int[Array, "B T"] | None = None, key_positions: Int[Array, "*B T"] | None = None,
                   implementation: str | None = None, return_residual: bool = False):
    """Causal attention of every query and head to its own block of keys and the earlier ones that it likes best.

    ::

        chosen(i, n) = own block of i  and  the num_blocks - 1 earlier blocks c with the largest  q_in . mean of the keys in c
        out_in       = sum over j <= i in chosen(i, n) of  softmax_j(scale q_in . k_j) v_j

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H], N a multiple of K; positions such as rotary ones are in it already.
      value: [B, T, K, Hv].
      block_size: tokens of a block. Published: 512 up to 32 thousand tokens, 4096 at a million.
      num_blocks: how many blocks a query attends to, its own among them. Published: 3, and 12 at a million tokens.
      scale: 1 / sqrt(H) by default.
      segment_ids: int32 [B, T], documents one after another that do not see each other and share no block.
      key_positions: int32 [T] or [B, T], of which -1 marks padding, which is in no block and finds nothing.
      implementation: "reference" (masked, O(T^2) memory), "gathered" (XLA), "pallas" (TPU kernels; block_size a power of two from 8) or None for the best.
      return_residual: also return the log [B, T, N] of each row's normaliser.

    Returns:
      [B, T, N, Hv] in the query's dtype, or as there with return_residual. Differentiable in query, key and value, but not through the choice.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T num_blocks block_size) time for attention, O(T^2 / block_size) for the choice; O(T (num_blocks + T / block_size)) memory.

    Source: Enzhe Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, arXiv 2502.13189.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
    >>> every = moba_attention(q, k, v, block_size=4, num_blocks=4)
    >>> bool(jnp.allclose(every, attnx.attention(q, k, v, mask=attnx.masks.causal()), atol=1e-6))
    True
    """
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    query, key, value, layout = _check(query, key, value, block_size, num_blocks, segment_ids, key_positions)
    blocks_key, blocks_value = (_blocks(x, layout, block_size) for x in (key, value))
    chosen = _choose(query, _means(blocks_key, block_size), layout.low, layout.high, num_blocks - 1)
    if implementation == "reference":
        return attention(query, key, value, mask=explicit(_allowed(chosen, layout)), scale=scale, implementation=implementation, return_residual=return_residual)
    out, r = _attend(query, key, value, blocks_key, blocks_value, chosen, layout.own, jnp.where(layout.own < 0, -2, layout.own), block_size, scale, implementation)
    return (out, r) if return_residual else out


def _check(query, key, value, block_size, num_blocks, segment_ids, key_positions):
    """The checked arguments and the layout of their blocks."""
    query, key, value = checks.check_query_key_value(query, key, value)
    b, t = query.shape[:2]
    if key.shape[1] != t:
        raise ValueError(f"key: expected the length {t} of query, of which these are the keys too, got {checks.describe(key)}")
    checks.check_integer("block_size", block_size, least=1)
    checks.check_integer("num_blocks", num_blocks, least=1)
    if segment_ids is None and key_positions is None:
        return query, key, value, _plain_layout(jnp.arange(t, dtype=jnp.int32)[None], t, block_size)
    ids, real = jnp.zeros((1, t), jnp.int32), jnp.ones((1, t), bool)
    if segment_ids is not None:
        ids = checks.check_integers("segment_ids", segment_ids, ranks=(2,))
        if ids.shape != (b, t):
            raise ValueError(f"segment_ids: expected shape {[b, t]}, got {checks.describe(ids)}")
    if key_positions is not None:
        real = jnp.atleast_2d(checks.check_positions("key_positions", key_positions, b, t)) >= 0
    return query, key, value, _layout(*jnp.broadcast_arrays(ids, real), block_size)


def _allowed(chosen, layout: Layout) -> Bool[Array, "B N T T"]:
    """The choice as a mask."""
    t, own = chosen.shape[2], layout.own
    near = (own[:, :, None] == own[:, None]) & (own >= 0)[:, None] & jnp.tri(t, dtype=bool)
    member = layout.member[:, None, None, :, None]
    return near[:, None] | ((chosen[..., None, :] == member) & (member >= 0)).any(-1)


def _attend(query, key, value, blocks_key, blocks_value, chosen, own_query, own_key, block, scale, implementation, **positions):
    """``(out, r)``: what is found in the own block, merged with what is found in each chosen one."""
    own = attention(query, key, value, mask=causal() & documents(own_query, own_key), scale=scale, return_residual=True,
                    implementation="pallas" if implementation == "pallas" else "blockwise",
                    block_sizes=None if implementation == "pallas" else (min(block, 512),) * 2, **positions)
    if not chosen.size:
        return own
    tile = min(TILE, max(16, 1 << (block.bit_length() - 1)))
    dispatch = moba_dispatch(chosen, blocks_key.shape[1] // block, tile)
    by_head = jnp.moveaxis(query, 2, 1)
    routed = jnp.moveaxis(jnp.take_along_axis(by_head, jnp.maximum(dispatch.query, 0)[..., None], axis=2), 1, 2)
    out, r = selected_attention(routed, blocks_key, blocks_value, dispatch.block[..., None], block_sizes=(tile, block), scale=scale,
                                implementation=implementation, return_residual=True)
    out, r = jnp.moveaxis(out, 2, 1), jnp.moveaxis(r, 2, 1)

    def found(place):  # [B, N, T]
        at = jnp.minimum(place, r.shape[2] - 1)
        some = jnp.take_along_axis(out, at[..., None], axis=2), jnp.where(place < r.shape[2], jnp.take_along_axis(r, at, axis=2), -jnp.inf)
        return tuple(jnp.moveaxis(x, 1, 2) for x in some)

    return reduce(merge, [found(dispatch.place[..., j]) for j in range(chosen.shape[3])], own)


class MoBAState(NamedTuple):
    """The cache, and the sum of the keys of each block [B, blocks, K, H]."""

    cache: cache.KVCache
    sums: Float[Array, "B blocks K H"]


@part
class MoBA:
    """See :func:`moba`."""

    block_size: int = static(default=512)
    num_blocks: int = static(default=3)
    scale: float | None = static(default=None)
    implementation: str | None = static(default=None)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        return moba_attention(query, key, value, block_size=self.block_size, num_blocks=self.num_blocks, scale=self.scale, segment_ids=segment_ids,
                              key_positions=key_positions, implementation=self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        return MoBAState(cache.init(batch, max_length, kv_heads, key_size, value_size, dtype),
                         jnp.zeros((batch, -(-max_length // self.block_size), kv_heads, key_size), accumulator_dtype(dtype)))

    def step(self, state, query, key, value):
        """Reads the chosen blocks of the cache."""
        t, block = query.shape[1], self.block_size
        kept = cache.append(state.cache, key, value)
        positions = state.cache.next + jnp.arange(t, dtype=jnp.int32)
        sums = state.sums.at[:, positions // block].add(key.astype(state.sums.dtype))
        slots, own = kept.key.shape[1], positions[None] // block
        complete = slots // block
        chosen = _choose(query, sums[:, :complete] / block, jnp.zeros_like(own), own, self.num_blocks - 1)
        places = dict(query_positions=positions, key_positions=kept.positions)
        dtype = cache.computation_dtype(query, kept.key, kept.value)
        wide, keys, values = (x.astype(dtype) for x in (query, kept.key, kept.value))
        if t <= FEW:
            table = jnp.concatenate([jnp.broadcast_to(own[:, None, :, None], (*chosen.shape[:3], 1)), chosen], axis=3)
            out = selected_attention(wide, keys, values, table, block_sizes=(1, block), mask=causal(), scale=self.scale, **places)
        else:
            whole = [x[:, :complete * block] for x in (keys, values)]
            out, _ = _attend(wide, keys, values, *whole, chosen, own, jnp.arange(slots, dtype=jnp.int32)[None] // block, block, self.scale,
                             self.implementation, **places)
        return MoBAState(kept, sums), out.astype(query.dtype)


def moba(block_size: int = 512, num_blocks: int = 3, *, scale: float | None = None, implementation: str | None = None) -> MoBA:
    """:func:`moba_attention` as an :class:`attnx.Mechanism`, whose decoded tokens read ``num_blocks`` blocks of the cache and one mean a block.

    Args:
      block_size, num_blocks, scale, implementation: as there.

    >>> import jax.numpy as jnp
    >>> moba(4, 2).init(1, 16, 2, 8, 8, jnp.float32).sums.shape
    (1, 4, 2, 8)
    """
    checks.check_integer("block_size", block_size, least=1)
    checks.check_integer("num_blocks", num_blocks, least=1)
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    return MoBA(block_size, num_blocks, None if scale is None else checks.check_scale(scale, 1), implementation)


def moba_layers(num_layers: int, *, full_last: int = 3, **options) -> tuple[MoBA | Pairs, ...]:
    """The mechanisms of a hybrid, layer by layer: MoBA, and causal attention in the last few, as is published for fine-tuning, where few tokens have a loss.

    Args:
      num_layers: how many.
      full_last: of them, how many have causal attention; ``num_layers`` for a model without MoBA. Weights serve either, see
        :func:`attnx.nn.set_mechanism`.
      **options: as for :func:`moba`.

    >>> [type(mechanism).__name__ for mechanism in moba_layers(4, full_last=1)]
    ['MoBA', 'MoBA', 'MoBA', 'Pairs']
    """
    checks.check_integer("num_layers", num_layers, least=0)
    checks.check_integer("full_last", full_last, least=0)
    sparse = max(num_layers - full_last, 0)
    full = pairs(mask=causal(), scale=options.get("scale"))
    return (moba(**options),) * sparse + (full,) * (num_layers - sparse)
