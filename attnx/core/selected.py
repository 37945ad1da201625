"""The selected engine: attention to key blocks that the data choose.

    out_i = sum over blocks c in indices[i // bq] of  sum over j in block c allowed by mask of  weights(s_ij, statistics of row i) * v_j

The table of chosen blocks is traced: what a mechanism of dynamic sparsity computes from queries and keys. Executed by gathering: a few
query blocks and some of their key blocks make one tile, whose mathematics is the pairs engine's (:mod:`attnx.core.operations`), so scores, masks,
weights and their gradients are the same. Gradients of keys are scattered back. On TPU and GPU the fused kernels of the pairs engine do it without gathering
(:mod:`attnx.core.selected_fused`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.core.attention import attention, execute, prepare, sink_of
from attnx.core.fused import prefer
from attnx.core.program import Data, Program, unbind_output
from attnx.core.selected_fused import choose_fused
from attnx.core.selected_gathered import Chosen, Extra, Selected
from attnx.core.tiling import Tiling, widen
from pallas_kernels.parts import Mask, Score, Softmax, Weights

IMPLEMENTATIONS = ("reference", "gathered", "pallas")


def selected_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"],
                       indices: Int[Array, "..."], *, block_sizes: tuple[int, int], block_scores: Float[Array, "..."] | None = None,
                       scores: Score | tuple[Score, ...] = (), mask: Mask | None = None, weights: Weights = Softmax(), scale: float | None = None,
                       dropout_rate: float = 0.0, dropout_key: Array | None = None, query_positions: Int[Array, "*B T"] | None = None,
                       key_positions: Int[Array, "*B S"] | None = None, implementation: str | None = None, return_residual: bool = False):
    """Attention of each block of queries to its own choice of key blocks.

    ::

        out_i = sum of w_ij v_j over the keys j allowed by mask in the blocks indices[b, n, i // bq, :]
        w_ij = weights(s_ij, statistics of row i),     s_ij = scores(scale q_i . k_j) + block_scores of the block of j

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K: query head n reads key-value head n // (N / K).
      value: [B, S, K, Hv].
      indices: integers [B or 1, N or K or 1, ceil(T / bq), M], traced or not: the key blocks that each query block attends to; block c holds the
        keys bk c to bk (c + 1) - 1 by storage index. Any order; duplicates count once; -1, or any other number that is no block, is padding.
        A choice that the query heads of a group share costs a fraction of the memory traffic of one for each.
      block_sizes: (bq, bk), the queries and keys of a block, each at least 1; neither need divide a length.
      block_scores: a real number for each entry of ``indices``, added to the scores of its keys after all others; of duplicates, the first counts.
        None adds nothing.
      scores, mask, weights, scale, dropout_rate, dropout_key: as in :func:`attnx.attention`. Masks and scores see logical positions.
      query_positions, key_positions: as there; -1 is padding.
      implementation: "reference" (the pairs engine's, under the equivalent mask: O(T S) memory, forward mode), "gathered" (XLA, any backend), "pallas"
        (fused kernels; block sizes powers of two, from 8 on a TPU and from 16 on a GPU, at their best from 128), or None for the best that serves the call.
      return_residual: also return r [B, T, N], the log of each row's normaliser, -inf for rows that attend to nothing. Exponential weights only.

    Returns:
      [B, T, N, Hv] in the query's dtype; with return_residual the pair (out, r), r in float32 (float64 for float64).
      Rows with nothing to attend to are zero, and so are their gradients. Differentiable in query, key, value, block_scores and the arrays of the
      parts, to any order in reverse mode.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.
      NotImplementedError: a named implementation cannot serve the call; says what it lacks.

    Cost: O(T M bk) time forward and backward, whatever S; memory O(T + S) and that of the table.

    Blocks chosen from data, with their gradient: Yuan et al.: "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention" (2025, arXiv
    2502.11089); Lu et al.: "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025, arXiv 2502.13189).

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
    >>> all_blocks = jnp.arange(4)[None, None, None]
    >>> bool(jnp.allclose(selected_attention(q, k, v, all_blocks, block_sizes=(8, 2)), attention(q, k, v), atol=1e-6))
    True
    >>> first_and_own = jnp.array([[-1, 0], [0, 1], [0, 2], [0, 3]])[None, None]
    >>> selected_attention(q, k, v, first_and_own, block_sizes=(2, 2)).shape
    (1, 8, 2, 4)
    """
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_array(name, x)
    checks.check_query_key_value(query, key, value)
    before = checks.check_parts(scores, mask, weights)
    if return_residual:
        checks.check_exponential("return_residual", weights)
    bq, bk = checks.check_block_sizes(block_sizes)
    indices, block_scores = _check_table(indices, block_scores, query, key, bq)
    materialise = implementation == "reference" or 0 in (*query.shape[:3], key.shape[1])
    chosen, extra = _table((bq, bk), query.shape[1], key.shape[1], materialise, indices, block_scores)
    parts = dict(scores=before if extra is None else (*before, Extra(extra, materialise)), mask=Chosen(chosen, materialise) & mask, weights=weights,
                 scale=scale, dropout_rate=dropout_rate, dropout_key=dropout_key, query_positions=query_positions, key_positions=key_positions)
    if materialise:
        return attention(query, key, value, implementation="reference", return_residual=return_residual, **parts)
    _, program, data = prepare(query, key, value, **parts)
    gathered = choose(program, data, bq, bk)
    run = lambda executor: execute(executor, data, sink_of(program, weights))
    out, r = prefer(implementation, lambda: run(choose_fused(program, data, gathered)), lambda: run(gathered))
    out = unbind_output(out, query.dtype)
    return (out, unbind_output(r, r.dtype)[..., 0]) if return_residual else out


def _check_table(indices, block_scores, query, key, bq):
    """The table as int32 and its scores, of the right shapes."""
    indices = checks.check_integers("indices", indices)
    b, t, n, _ = query.shape
    heads, blocks = sorted({1, key.shape[2], n}), -(-t // bq)
    if indices.ndim != 4 or indices.shape[0] not in (1, b) or indices.shape[1] not in heads or indices.shape[2] != blocks:
        raise ValueError(f"indices: expected shape [{b}, {' or '.join(map(str, heads))}, {blocks}, M] ([B, heads, ceil(T / bq), M]), "
                         f"got {checks.describe(indices)}")
    if block_scores is not None:
        block_scores = checks.check_real("block_scores", block_scores)
        if block_scores.shape != indices.shape:
            raise ValueError(f"block_scores: expected shape {list(indices.shape)} as indices, got {checks.describe(block_scores)}")
    return indices, block_scores


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _table(block_sizes, queries, keys, materialise, indices, block_scores):
    """Each row's distinct blocks in ascending order, then -1, and their scores; or both for each pair [.., T, S]."""
    (bq, bk), blocks = block_sizes, -(-keys // block_sizes[1])
    if not indices.shape[3]:
        indices, block_scores = widen(indices, 3, 1, constant_values=-1), None
    slot = lax.broadcasted_iota(jnp.int32, indices.shape, 3)
    indices, slot = lax.sort((jnp.where((indices >= 0) & (indices < blocks), indices, blocks), slot), num_keys=2)
    again = jnp.pad(indices[..., 1:] == indices[..., :-1], [(0, 0)] * 3 + [(1, 0)])[..., :indices.shape[3]]
    indices, slot = lax.sort((jnp.where(again, blocks, indices), slot), num_keys=1)
    extra = None if block_scores is None else jnp.take_along_axis(block_scores, slot, axis=3)
    if not materialise:
        return jnp.where(indices < blocks, indices, -1), extra

    def dense(x, fill):
        lead = jnp.indices(indices.shape[:3], sparse=True)
        x = jnp.full((*indices.shape[:3], blocks), fill, x.dtype).at[*(i[..., None] for i in lead), indices].set(x, mode="drop")
        return jnp.repeat(jnp.repeat(x, bq, axis=2), bk, axis=3)[:, :, :queries, :keys]

    return dense(indices, -1), None if extra is None else dense(extra, 0)


def choose(program: Program, data: Data, bq: int, bk: int) -> Selected:
    """The execution of a call, its tiles sized by what was fastest at its shape class."""
    sizes, table = program.sizes, data.operands.mask[0]
    heads = 1 if program.specs.mask[0].group else sizes.heads // sizes.kv_heads  # in a tile
    entries = max(1, min(table.shape[-1], min(2048, max(64, 32 * bq)) // bk))
    room = 1 if jax.default_backend() == "cpu" else 64  # what caches hold, or what keeps an accelerator busy
    blocks = room * min(2**19 // (heads * bq * entries * bk), 2**13 // (heads * entries * bk))
    return Selected(program, Tiling(bq, bk, 1), max(1, min(blocks, sizes.batch * sizes.heads // heads * table.shape[-2])), entries)
