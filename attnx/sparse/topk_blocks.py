"""Attention to the blocks of keys whose means the query likes best.

Lu et al.: "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025, arXiv 2502.13189), with one choice for the query heads of a group as in
Yuan et al.: "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention" (2025, arXiv 2502.11089):

    chosen(i) = own block of i  and  the M - 1 earlier blocks c with the largest  q_i . mean of the keys in c
    out_i = attention of i to the keys up to its own in chosen(i)

No parameters: gradients flow through what is attended to, not through the choice. With M the number of blocks it is causal attention, so a model can be
switched between the two. A decoder of long texts whose reads and compute a token are constant but for one dot product a block.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnx.core import cache
from attnx.core.checks import check_choice, check_dropout_rate, check_integer, check_parts, check_query_key_value, check_scale, describe
from attnx.core.selected import IMPLEMENTATIONS, selected_attention
from attnx.core.tiling import widen
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from pallas_kernels.parts import Score, Softmax, Weights, part, static
from pallas_kernels.tile import accumulator_dtype


class SelectedState(NamedTuple):
    """The cache, the sum of the keys of each block [B, blocks, K, H], and the query that chose for the latest query block [B, K, H]."""

    cache: cache.KVCache
    sums: Float[Array, "B blocks K H"]
    router: Float[Array, "B K H"]


@part
class TopKBlocks:
    """See :func:`topk_blocks`. A pytree; its arrays are those of its parts."""

    scores: tuple[Score, ...] = ()
    weights: Weights = Softmax()
    block_size: int = static(default=64)
    num_blocks: int = static(default=16)
    query_block_size: int = static(default=1)
    scale: float | None = static(default=None)
    dropout_rate: float = static(default=0.0)
    implementation: str | None = static(default=None)

    def _routers(self, query, kv_heads):
        """What chooses: the mean of the queries of each group, [B, T, K, H]."""
        b, t, n, h = query.shape
        return query.reshape(b, t, kv_heads, n // kv_heads, h).astype(accumulator_dtype(query.dtype)).mean(3)

    def _choose(self, routers, means, own, allowed=True):
        """The table [B, K, R, M] of R query blocks: ``routers`` [B, R, K, H], ``means`` [B, C, K, H], ``own`` [R], ``allowed`` [B, 1, R, C]."""
        blocks = jnp.arange(means.shape[1], dtype=jnp.int32)
        liking = lax.stop_gradient(jnp.einsum("brkh,bckh->bkrc", routers, means))
        liking = jnp.where((blocks < own[:, None]) & allowed, liking, -jnp.inf)
        best, chosen = lax.top_k(jnp.where(blocks == own[:, None], jnp.inf, liking), min(self.num_blocks, len(blocks)))
        return jnp.where(best > -jnp.inf, chosen, -1)

    def _attend(self, query, key, value, table, query_block_size, mask=None, dropout_key=None, **positions):
        rate = self.dropout_rate if dropout_key is not None else 0.0
        return selected_attention(query, key, value, table, block_sizes=(query_block_size, self.block_size), scores=self.scores, mask=causal() & mask,
                                  weights=self.weights, scale=self.scale, dropout_rate=rate, dropout_key=dropout_key,
                                  implementation=self.implementation, **positions)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        check_query_key_value(query, key, value)
        b, t = query.shape[:2]
        if key.shape[1] != t:
            raise ValueError(f"key: expected the length {t} of query, of which these are the keys too, got {describe(key)}")
        bq, bk = self.query_block_size, self.block_size
        ids = jnp.zeros((1, t), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
        real = jnp.ones((1, t), bool) if key_positions is None else jnp.atleast_2d(key_positions) >= 0
        in_blocks = lambda x, mode: widen(x, 1, -t % bk, mode).reshape(x.shape[0], -1, bk, *x.shape[2:])
        # Of a block in which documents meet, the last one alone goes on, so its keys are what the block stands for.
        last = in_blocks(ids, "edge")[..., -1]
        counted = (in_blocks(ids, "edge") == last[..., None]) & in_blocks(real, "constant")
        count = counted.sum(-1)
        keys = in_blocks(key.astype(accumulator_dtype(key.dtype)), "constant")
        means = jnp.where(counted[..., None, None], keys, 0).sum(2) / jnp.maximum(count, 1)[..., None, None]
        allowed = (ids[:, ::bq, None] == last[:, None]) & (count > 0)[:, None]
        own = jnp.arange(0, t, bq, dtype=jnp.int32) // bk
        table = self._choose(self._routers(query[:, ::bq], key.shape[2]), means, own, allowed[:, None])
        return self._attend(query, key, value, table, bq, None if segment_ids is None else documents(segment_ids), dropout_key,
                            query_positions=query_positions, key_positions=key_positions)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        wide = accumulator_dtype(dtype)
        return SelectedState(cache.init(batch, max_length, kv_heads, key_size, value_size, dtype),
                             jnp.zeros((batch, -(-max_length // self.block_size), kv_heads, key_size), wide), jnp.zeros((batch, kv_heads, key_size), wide))

    def step(self, state, query, key, value):
        """Reads the chosen blocks of the cache. A query block that an earlier call began goes on with the choice of its first query."""
        (b, t, n, h), bq, bk = query.shape, self.query_block_size, self.block_size
        first, kept = state.cache.next, cache.append(state.cache, key, value)
        positions = first + jnp.arange(t, dtype=jnp.int32)
        sums = state.sums.at[:, positions // bk].add(key.astype(state.sums.dtype))
        behind = first % bq  # queries of the first block in earlier calls
        width = -(-(t - 1) // bq) * bq + bq  # in whole query blocks, wherever they begin
        aligned = lambda x, start: lax.dynamic_update_slice_in_dim(start, x.astype(start.dtype), behind, 1)
        routers = aligned(self._routers(query, key.shape[2]), jnp.zeros((b, width, *state.router.shape[1:]), sums.dtype).at[:, 0].set(state.router))
        own = (first - behind + jnp.arange(0, width, bq, dtype=jnp.int32)) // bk
        table = self._choose(routers[:, ::bq], sums / bk, own)
        attend = partial(self._attend, key=kept.key, value=kept.value, key_positions=kept.positions)
        if t == 1:
            out = attend(query, table=table, query_block_size=1, query_positions=positions)
        else:
            places = aligned(positions[None], jnp.full((1, width), -1, jnp.int32))
            out = attend(aligned(query, jnp.zeros((b, width, n, h), query.dtype)), table=table, query_block_size=bq, query_positions=places)
            out = lax.dynamic_slice_in_dim(out, behind, t, 1)
        router = lax.dynamic_index_in_dim(routers, (behind + t - 1) // bq * bq, 1, keepdims=False)
        return SelectedState(kept, sums, router), out


def topk_blocks(block_size: int = 64, num_blocks: int = 16, *, query_block_size: int = 1, scores=(), weights: Weights = Softmax(),
                scale: float | None = None, dropout_rate: float = 0.0, implementation: str | None = None) -> TopKBlocks:
    """A mechanism of the selected engine: causal self-attention to the own block of a query and the earlier ones that it likes best.

    ::

        chosen(i) = own block of i  and  the num_blocks - 1 earlier blocks c with the largest  q_i . mean of the keys in c

    Args:
      block_size: keys of a block.
      num_blocks: how many blocks a query attends to, its own among them.
      query_block_size: a divisor of block_size: as many queries in a row share a choice, made by the first of them (the one whose choice
        is causal for all). 1 lets each choose, as published; larger ones are several times faster, for blocks of keys are gathered once for all.
      scores, weights, scale, dropout_rate: as in :func:`attnx.attention`.
      implementation: as in :func:`attnx.core.selected.selected_attention`.

    Returns:
      A :class:`attnx.Mechanism`. The query heads that share a key-value head choose together, by their mean. Keys at positions of -1 count in no
      mean, and with ``segment_ids`` (of documents one after another) neither do keys of other documents. Its streaming state is a cache and the sum of
      the keys in each block.

    Cost: O(T num_blocks block_size) for attention, and O(T^2 / (query_block_size block_size)) time and memory for the choice; a decoded token
    reads num_blocks blocks and one mean a block.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
    >>> every = topk_blocks(block_size=4, num_blocks=4)
    >>> bool(jnp.allclose(every(q, k, v), attnx.attention(q, k, v, mask=attnx.masks.causal()), atol=1e-6))
    True
    >>> topk_blocks(block_size=4, num_blocks=2).init(1, 16, 2, 8, 8, jnp.float32).sums.shape
    (1, 4, 2, 8)
    """
    for name, x in (("block_size", block_size), ("num_blocks", num_blocks), ("query_block_size", query_block_size)):
        check_integer(name, x, least=1)
    if block_size % query_block_size:
        raise ValueError(f"query_block_size: expected a divisor of block_size = {block_size}, got {query_block_size}")
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    return TopKBlocks(check_parts(scores, None, weights), weights, block_size, num_blocks, query_block_size,
                      None if scale is None else check_scale(scale, 1), check_dropout_rate(dropout_rate), implementation)
