"""Attention to the blocks of keys whose means the query likes best.

Lu et al.: "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025, arXiv 2502.13189), with one choice for the queries of a group as in Yuan et al.: "Native
Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention" (2025, arXiv 2502.11089):

    chosen(i) = own block of i  and  the M - 1 earlier blocks c with the largest  q_i . mean of the keys in c
    out_i = attention of i to the keys up to its own in chosen(i)

No parameters: gradients flow through what is attended to, not through the choice. With M the number of blocks it is causal attention, so a model can be
switched between the two. A decoder of long texts whose reads and compute a token are constant but for one dot product a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnx.core import cache
from attnx.core.checks import check_choice, check_dropout_rate, check_integer, check_parts, check_scale, describe
from attnx.core.selected import IMPLEMENTATIONS, selected_attention
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

    def _choose(self, routers, means, own, allowed=True):
        """The table [B, K, R, M] of the blocks for each of R query blocks, whose own block is ``own`` [R].

        ``routers`` [B, R, K, H], ``means`` [B, blocks, K, H], ``allowed`` [B, R, blocks].
        """
        block = jnp.arange(means.shape[1], dtype=jnp.int32)
        liking = lax.stop_gradient(jnp.einsum("brkh,bckh->bkrc", routers, means))
        earlier = (block < own[:, None]) & allowed
        liking = jnp.where(block == own[:, None], jnp.inf, jnp.where(earlier[..., None, :, :] if earlier.ndim == 3 else earlier, liking, -jnp.inf))
        best, chosen = lax.top_k(liking, min(self.num_blocks, len(block)))
        return jnp.where(best > -jnp.inf, chosen, -1)

    def _attend(self, query, key, value, table, mask, query_block_size, dropout_key=None, **positions):
        rate = self.dropout_rate if dropout_key is not None else 0.0
        return selected_attention(query, key, value, table, block_sizes=(query_block_size, self.block_size), scores=self.scores, mask=mask,
                                  weights=self.weights, scale=self.scale, dropout_rate=rate, dropout_key=dropout_key,
                                  implementation=self.implementation, **positions)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        ...
