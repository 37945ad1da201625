"""The selected engine: attention to key blocks that the data choose.

    out_i = sum over blocks c in indices[i // bq] of  sum over j in block c allowed by mask of  weights(s_ij, statistics of row i) * v_j

The table of chosen blocks is traced: what a mechanism of dynamic sparsity computes from queries and keys. Executed by gathering: a few
query blocks and some of their key blocks make one tile, whose mathematics is the pairs engine's (:mod:`attnx.core.operations`), so scores, masks,
weights and their gradients are the same. Gradients of keys are scattered back.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attnx.core import checks, operations
from attnx.core.attention import attention, prepare, sink_of, with_sink
from attnx.core.compat import vary, varying_axes
from attnx.core.program import Data, Program, partition, unbind_output
from attnx.core.tiling import Tiling, widen
from pallas_kernels import tile
from pallas_kernels.parts import At, Blocks, Mask, Operand, Score, Softmax, Spec, Weights, part, static

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
      implementation: "reference" (the pairs engine's, under the equivalent mask: O(T S) memory, forward mode), "gathered" (XLA, any backend), or None
        for the best. "pallas" has no kernel yet.
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

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
    >>> last_two = jnp.array([[-1, 0], [0, 1], [1, 2], [2, 3]])[None, None]
    >>> out = attnx.selected_attention(q, k, v, last_two, block_sizes=(2, 2), mask=attnx.masks.causal())
    >>> near = attnx.attention(q, k, v, mask=attnx.masks.causal() & attnx.masks.within_blocks(2))
    >>> bool(jnp.allclose(out[:, :2], near[:, :2])), out.shape
    (True, (1, 8, 2, 4))
    """
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "pallas":
        raise NotImplementedError("implementation='pallas': no kernel is plugged in here; use 'gathered' or None")
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_array(name, x)
    checks.check_query_key_value(query, key, value)
    scores = checks.check_parts(scores, mask, weights)
    if return_residual:
        checks.check_exponential("return_residual", weights)
    bq, bk = checks.check_block_sizes(block_sizes)
    indices, block_scores = _check_table(indices, block_scores, query, key, bq)
    materialise = implementation == "reference" or 0 in (*query.shape[:3], key.shape[1])
    chosen, extra = _table((bq, bk), query.shape[1], key.shape[1], materialise, indices, block_scores)
    parts = dict(scores=scores if extra is None else (*scores, _Extra(extra, materialise)), mask=_Chosen(chosen, materialise) & mask, weights=weights,
                 scale=scale, dropout_rate=dropout_rate, dropout_key=dropout_key, query_positions=query_positions, key_positions=key_positions)
    if materialise:
        return attention(query, key, value, implementation="reference", return_residual=return_residual, **parts)
    _, program, data = prepare(query, key, value, **parts)
    out, r = _execute(choose(program, bq, bk), data, sink_of(program, weights))
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


# The selection as parts, so that a tile reads one number a key. Materialised they are arrays like any; the gathered execution reads them by table entry.


def _axes(array, sizes, materialised):
    return ("batch", "head" if array.shape[1] in (1, sizes.heads) else "kv_head", *(("query", "key") if materialised else (None, None)))


@part
class _Chosen(Mask):
    """Pairs in chosen blocks. Always the first of the masks."""

    table: Any
    materialised: bool = static(default=False)

    def operands(self, sizes):
        return (Operand(self.table, _axes(self.table, sizes, self.materialised)),)

    def tile(self, at, chosen):
        return chosen >= 0


@part
class _Extra(Score):
    """The scores of blocks. Always the last of the scores."""

    scores: Any
    materialised: bool = static(default=False)

    def operands(self, sizes):
        return (Operand(self.scores, _axes(self.scores, sizes, self.materialised)),)

    def tile(self, s, at, extra):
        return s + extra.astype(s.dtype)


# The gathered execution ---------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How an operand in blocks varies; an ``entry`` operand has a column for each entry of the table rather than for each key."""

    spec: Spec
    entry: bool = False


_QUERY = _Layout(Spec(True, True, True, True, False, False))
_KEY = _Layout(Spec(True, True, False, False, True, False))


class _Place(NamedTuple):
    """C query blocks, and a slab of m key blocks of each: indices [C, 1] and [C, m]."""

    batch: Any
    kv_head: Any
    lane: Any  # the query head of the group where each chooses for itself, else 0
    block: Any
    entry: Any  # of the table
    chosen: Any  # the key block there


@dataclasses.dataclass(frozen=True)
class Selected:
    """Executes a program whose first mask is the table, gathering the chosen blocks; static and hashable.

    Arrays are kept in blocks, [batch, kv_head, lane, query block, key block, group, rows, columns, *None axes], so that a tile is one gather on the
    leading axes and its gradient one scatter. Where the query heads of a group choose for themselves they are lanes, else they share a tile.
    """

    program: Program
    tiling: Tiling
    blocks: int  # query blocks in a tile
    entries: int  # key blocks of each in a tile

    def maximum(self, x):
        """The largest entry."""
        return jnp.max(x, initial=0)

    def stored(self, x):
        """A result as it is kept: in the accumulator's dtype."""
        return x

    @property
    def lanes(self) -> int:
        """How many query heads of a group choose for themselves."""
        sizes = self.program.sizes
        return sizes.heads // sizes.kv_heads if self.program.specs.mask[0].group else 1

    def _layouts(self) -> Blocks:
        """The layouts of the operands."""
        specs = self.program.specs
        layouts = jax.tree.map(_Layout, specs, is_leaf=lambda x: isinstance(x, Spec))
        entry = lambda layout: _Layout(layout.spec._replace(query=True, key=True), True)
        scores, mask = layouts.scores, (entry(layouts.mask[0]), *layouts.mask[1:])
        if self.program.parts.scores and isinstance(self.program.parts.scores[-1], _Extra):
            scores = (*scores[:-1], (entry(scores[-1][0]),))
        return layouts._replace(scores=scores, mask=mask)

    def _grouped(self, layout):
        return layout.spec.group and self.lanes == 1

    def _cut(self, x, layout: _Layout):
        """A canonical operand in blocks; an offset table as [batch, kv_head, lane, offset, group]. Linear, so its transpose puts gradients together."""
        spec, (bq, bk, _) = layout.spec, self.tiling
        lanes = (x.shape[2], 1) if self.lanes > 1 else (1, x.shape[2])
        if spec.offset:
            return jnp.moveaxis(x.reshape(*x.shape[:2], *lanes, -1), 3, 4)
        if layout.entry:
            x = widen(x, 6, -x.shape[6] % self.entries, constant_values=-1)
            return x.reshape(*x.shape[:2], *lanes[:1], *x.shape[5:], 1, 1, 1)
        x = widen(x, 3, -x.shape[3] % bq, "edge") if spec.query else x
        x = widen(x, 4, -x.shape[4] % bk, "edge") if spec.key else x
        rows, columns = bq if spec.query else 1, bk if spec.key else 1
        x = x.reshape(*x.shape[:2], *lanes, x.shape[3] // rows, rows, x.shape[4] // columns, columns, *x.shape[5:])
        return x.transpose(0, 1, 2, 4, 6, 3, 5, 7, *range(8, x.ndim))

    def _index(self, layout: _Layout, place: _Place, at: At):
        """Where the blocks of a place lie in a cut operand: arrays that broadcast to [C, 1 or m], or [C, rows, keys] for an offset table."""
        spec, zero = layout.spec, jnp.zeros_like(place.batch)
        lead = [x if varies else zero for x, varies in zip(place, (spec.batch, spec.kv, spec.group and self.lanes > 1))]
        if spec.offset:
            low, high = self.program.sizes.offsets
            return *(x[:, :, None] for x in lead), jnp.clip(at.key - at.query, low, high) - low
        column = (place.entry if layout.entry else place.chosen) if spec.key else zero
        return *lead, place.block if spec.query else zero, column

    def _read(self, x, layout: _Layout, place: _Place, at: At | None = None):
        """The blocks of a cut operand at a place: [C, group, rows, keys, *None axes]."""
        block = x.at[self._index(layout, place, at)].get(mode="promise_in_bounds")
        if layout.spec.offset:
            return jnp.moveaxis(block, -1, 1)
        if not layout.spec.key:
            return block[:, 0]
        block = jnp.moveaxis(jnp.broadcast_to(block, (*block.shape[:4], self.tiling.bk, *block.shape[5:])), 1, 3)
        return block.reshape(*block.shape[:3], -1, *block.shape[5:])

    def _add(self, total, block, layout: _Layout, place: _Place, at: At | None = None):
        """Adds the gradient of what :meth:`_read` returned, but for every head of the tile, to that of the cut operand."""
        block = block if self._grouped(layout) else block.sum(1, keepdims=True)
        if layout.spec.offset:
            block = jnp.moveaxis(block, 1, -1)
        elif layout.spec.key:
            block = jnp.moveaxis(block.reshape(*block.shape[:3], -1, self.tiling.bk, *block.shape[4:]), 3, 1)
            block = block.sum(4, keepdims=True) if layout.entry else block
        else:
            block = block[:, None]
        return total.at[self._index(layout, place, at)].add(block, mode="promise_in_bounds")

    def _over_heads(self, function):
        """Vectorises ``function(q, k, v, rows, at, blocks)`` of one head over the query blocks of a tile and over the heads that share it."""
        layouts = self._layouts()
        is_layout = lambda x: isinstance(x, _Layout)
        axes = jax.tree.map(lambda layout: 0 if self._grouped(layout) else None, layouts, is_leaf=is_layout)
        heads = jax.vmap(jax.vmap(function, in_axes=(0, None, None, 0, At(None, 0, None, None), axes)))

        def run(q, k, v, rows, at, blocks):
            blocks = jax.tree.map(lambda layout, x: x if self._grouped(layout) else x[:, 0], layouts, blocks, is_leaf=is_layout)
            return heads(q, k, v, rows, at, blocks)

        return run

    def _sweep(self, data: Data, rows, total, init, visit, finish, *, differentiable: bool = False):
        """Visits the tiles of every query block, some query blocks at a time.

        Args:
          data, rows: as in the folds.
          total: a pytree that every visit updates.
          init: ``init(rows of the tile) -> carry``, for query blocks: pytrees of [C, group, bq, X].
          visit: ``visit(total, carry, tile arguments, place) -> (total, carry)``.
          finish: ``finish(carry) -> results``.

        Returns the total and the results as [B, K, G, T, X].
        """
        (bq, bk, _), m, lanes = self.tiling, self.entries, self.lanes
        b, k, g, t, _ = data.query.shape
        nq = -(-t // bq)
        layouts = self._layouts()
        cut_rows = lambda tree: jax.tree.map(lambda x: self._cut(x[..., None, :], _QUERY), tree)
        query, key, value, operands, rows = cut_rows(data.query), *self._cut_keys(data), self._cut_operands(data), cut_rows(rows)
        positions = lambda x, axes, block: widen(x, 1, -x.shape[1] % block, constant_values=-1).reshape(x.shape[0], *axes)
        at_query = _Layout(Spec(data.query_positions.shape[0] > 1, False, False, True, False, False))
        at_key = _Layout(Spec(data.key_positions.shape[0] > 1, False, False, False, True, False))
        query_positions = self._cut(positions(data.query_positions, (1, 1, -1, 1), bq), at_query)
        key_positions = self._cut(positions(data.key_positions, (1, 1, 1, -1), bk), at_key)
        count = b * k * lanes * nq

        def chunk(total, n):
            place = _Place(*(x[:, None] for x in jnp.unravel_index(jnp.minimum(n, count - 1), (b, k, lanes, nq))), None, None)
            row = lambda x: self._read(x, _QUERY, place)[:, :, :, 0]
            q, mine = row(query), jax.tree.map(row, rows)
            at = At(data.origin[0] + place.batch[:, 0], (data.origin[1] + place.kv_head) * g + (place.lane if lanes > 1 else jnp.arange(g, dtype=jnp.int32)),
                    jnp.where((n < count)[:, None, None], self._read(query_positions, at_query, place)[:, 0], -1), None)
            table = operands.mask[0].at[self._index(layouts.mask[0]._replace(spec=...), place, at)]
