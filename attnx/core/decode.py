"""Decoding: one or a few queries a sequence against a long cache, contiguous, rolling or in pages.

The work is reading the cache once. It is read where it lies, all heads at a time (:mod:`attnx.core.cached`), and cut into equal shares whatever the
lengths (:mod:`pallas_kernels.decode.schedule`), whose results merge under one normaliser. A prefix that all sequences share is read once for all of
them (:func:`cascade`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.core.attention import execute, execute_reference, no_tiles, sink_of, with_sink
from attnx.core.cache import computation_dtype
from attnx.core.cached import CachedData, canonical, merge_results
from attnx.core.cached_fused import choose_cached, choose_fused
from attnx.core.fused import prefer
from attnx.core.program import Program, bind, unbind_output
from attnx.core.tiling import map_operands
from pallas_kernels.parts import Exponential, Mask, Score, Softmax, Spec, Weights

IMPLEMENTATIONS = ("reference", "blockwise", "pallas")


def decode(query: Float[Array, "B t N H"], key_cache: Float[Array, "B L K H"], value_cache: Float[Array, "B L K Hv"], lengths: Int[Array, "*B"], *,
           key_positions: Int[Array, "*B L"] | None = None, page_table: Int[Array, "B M"] | None = None, scores: Score | tuple[Score, ...] = (),
           mask: Mask | None = None, weights: Weights = Softmax(), scale: float | None = None, splits: int | None = None,
           block_size: int | None = None, implementation: str | None = None, return_residual: bool = False):
    """Attention of the last tokens of each sequence to all of its cache.

    ::

        out_i = sum over j < lengths allowed by mask of  w_ij v_j,      i = lengths - t, ..., lengths - 1
        w_ij  = weights(s_ij, statistics of row i),     s_ij = scores(scale q_i . k_j)

    Args:
      query: [B, t, N, H], the last t tokens of each sequence, whose keys and values are in the cache already.
      key_cache: [B, L, K, H], N a multiple of K; with ``page_table`` the pages of all sequences, [P, p, K, H]. Of any floating-point dtype.
      value_cache: [B, L, K, Hv] or [P, p, K, Hv], likewise.
      lengths: integers [B] or [], traced or not: the number of tokens of each sequence so far. Slots beyond may hold any finite number.
      key_positions: int32 [L] or [B, L], the position of the token in each slot, -1 for none: of a rolling cache. 0, 1, 2, ... by default.
      page_table: integers [B, M]: token j of sequence b is in page ``page_table[b, j // p]`` at slot ``j % p``. Entries beyond the length are not looked at.
      scores, mask, weights, scale: as in :func:`attnx.attention`; their query axis has the t tokens, their key axis the L (or M p) slots.
      splits: into how many equal shares the reading is cut, to be done side by side and merged; by default what suits the backend. More than one
        need exponential weights.
      block_size: tokens of a tile, with pages a multiple of p; chosen by default.
      implementation: "reference" (materialised), "blockwise" (XLA, any backend), "pallas" (TPU and GPU kernels), or None for the best that serves the call.
      return_residual: also return r [B, t, N], as in :func:`attnx.attention`.

    Returns:
      [B, t, N, Hv] in the query's dtype; with return_residual the pair (out, r). Rows of tokens before the first (t > length), and rows with nothing to attend
      to, are zero.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.
      NotImplementedError: a named implementation cannot serve the call; says what it lacks.

    Cost: reads the blocks of the cache that hold allowed pairs once, O(t N H sum(lengths) K) arithmetic ("blockwise", "pallas"): for few tokens. Constant
    shapes: one compilation serves all lengths. Differentiable to any order in reverse mode, at the cost of transposing the cache.

    Splitting over keys: Dao, Haziza, Massa, Sizov: "Flash-Decoding for long-context inference" (2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
    Pages: Kwon et al.: "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023, arXiv 2309.06180). Equal shares: Sanovar et al.:
    "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers" (2024, arXiv 2405.10480).

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = (jax.random.normal(jax.random.key(n), (2, 16, heads, 8)) for n, heads in enumerate((4, 2, 2)))
    >>> lengths = jnp.array([16, 5])
    >>> last = jnp.stack([q[0, 15:16], q[1, 4:5]])
    >>> out = decode(last, k, v, lengths)
    >>> full = attnx.attention(q, k, v, mask=attnx.masks.causal())
    >>> bool(jnp.allclose(out[:, 0], jnp.stack([full[0, 15], full[1, 4]]), atol=1e-6))
    True
    """
    parts = dict(scores=scores, mask=mask, weights=weights, scale=scale)
    call = _prepare(query, key_cache, value_cache, lengths, key_positions, page_table, (splits, block_size), implementation, parts)
    if return_residual:
        checks.check_exponential("return_residual", weights)
    if call.materialised:
        return call.result(execute_reference(call.program, canonical(call.data), call.sink), return_residual)
    return call.result(with_sink(call.run(call.program, call.data), call.sink), return_residual)


def cascade(query: Float[Array, "B t N H"], prefix_key: Float[Array, "P K H"], prefix_value: Float[Array, "P K Hv"], key_cache: Float[Array, "B L K H"],
            value_cache: Float[Array, "B L K Hv"], lengths: Int[Array, "*B"], *, prefix_length=None, page_table: Int[Array, "B M"] | None = None,
            scores: Score | tuple[Score, ...] = (), mask: Mask | None = None, weights: Weights = Softmax(), scale: float | None = None,
            splits: int | None = None, block_size: int | None = None, implementation: str | None = None, return_residual: bool = False):
    """:func:`decode` for sequences that begin alike: the prefix is read once for the whole batch, then merged with each sequence's own cache.

    ::

        out = merge(all queries on the prefix, each query on its own cache)

    Args:
      query: [B, t, N, H], the last t tokens of each sequence, none of them in the prefix.
      prefix_key: [P, K, H], the keys of the first tokens of every sequence.
      prefix_value: [P, K, Hv].
      key_cache, value_cache, page_table: as in :func:`decode`, the tokens after the prefix.
      lengths: integers [B] or [], the number of tokens after the prefix, the query's included.
      prefix_length: how many tokens of the prefix there are, traced or not, at most P; P by default. The others' tokens are at positions from there on.
      scores, mask, splits, block_size, implementation, return_residual: as in :func:`decode`; the key axis of their arrays has P + L entries.
      weights, scale: as there; the weights must be exponential, or nothing merges.

    Returns:
      As :func:`decode` on the concatenated caches.

    Cost: as :func:`decode` on the suffixes, and one reading of the prefix with all B t N queries as rows.

    Ye et al.: "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch Decoding" (2024, https://flashinfer.ai/2024/02/02/cascade-inference.html); Juravsky et
    al.: "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (2024, arXiv 2402.05099).

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = (jax.random.normal(jax.random.key(n), (2, length, 2, 8)) for n, length in enumerate((1, 5, 5)))
    >>> prefix = jax.random.normal(jax.random.key(3), (9, 2, 8))
    >>> both = lambda own: jnp.concatenate([jnp.stack([prefix] * 2), own], 1)
    >>> out = cascade(q, prefix, prefix, k, v, jnp.array([5, 2]))
    >>> bool(jnp.allclose(out, decode(q, both(k), both(v), 9 + jnp.array([5, 2])), atol=1e-6))
    True
    """
    parts = dict(scores=scores, mask=mask, weights=weights, scale=scale)
    _check_arrays(query, key_cache, value_cache, page_table)
    checks.check_parts(scores, mask, weights)
    checks.check_exponential("weights", weights)
    for name, x, cache in (("prefix_key", prefix_key, key_cache), ("prefix_value", prefix_value, value_cache)):
        checks.check_array(name, x)
        if len(x.shape) != 3 or x.shape[1:] != cache.shape[2:] or x.shape[0] != prefix_key.shape[0] or x.dtype != cache.dtype:
            raise ValueError(f"{name}: expected shape [P, {', '.join(map(str, cache.shape[2:]))}] and dtype as the cache {checks.describe(cache)}, "
                             f"got {checks.describe(x)}")
    known = prefix_key.shape[0]
    start = checks.check_integers("prefix_length", known if prefix_length is None else prefix_length, ranks=(0,))
    call = _prepare(query, key_cache, value_cache, lengths, None, page_table, (splits, block_size), implementation, parts, prefix=(known, start))
    program, sizes, data = call.program, call.program.sizes, call.data
    shared_key, shared_value = jnp.asarray(prefix_key)[None], jnp.asarray(prefix_value)[None]
    if call.materialised:
        def both(shared, own):
            shared = jnp.broadcast_to(shared.swapaxes(1, 2), (*own.shape[:2], known, own.shape[3]))
            return jnp.concatenate([shared.astype(own.dtype), own], 2)

        whole = canonical(data)
        whole = whole._replace(key=both(shared_key, whole.key), value=both(shared_value, whole.value))
        return call.result(execute_reference(program, whole, call.sink), return_residual)

    def section(first, last):  # the call on some of the keys
        cut = map_operands(lambda x, spec: x[:, :, :, :, first:last] if spec.key else x, data.operands, program.specs)
        return (dataclasses.replace(program, sizes=sizes._replace(keys=last - first)),
                data._replace(operands=cut, key_positions=data.key_positions[:, first:last]))

    head, shared = section(0, known)
    shared = shared._replace(key=shared_key, value=shared_value, pages=None, key_positions=shared.key_positions[:1],
                             span=jnp.stack([jnp.zeros_like(start), jnp.minimum(start, known)])[None])
    once, gathered = _fold_batch(head, shared)
    folded = call.run(once, gathered, sizes.batch)
    own = call.run(*section(known, sizes.keys))
    folded = jax.tree.map(lambda x, like: jnp.moveaxis(x.reshape(*x.shape[1:3], *like.shape[:1], *like.shape[3:]), 2, 0), folded, own)
    return call.result(with_sink(merge_results(folded, own), call.sink), return_residual)


class _Call(NamedTuple):
    """A checked call."""

    program: Program
    data: CachedData
    sink: jax.Array | None
    dtype: jnp.dtype  # of the output
    implementation: str | None
    cut: tuple[int | None, int | None]  # splits and block size

    @property
    def materialised(self):
        return self.implementation == "reference"

    def run(self, program, data, folded=1):
        """Output and residual in the canonical layout, no sink yet."""
        if no_tiles(program):
            return execute_reference(program, canonical(data), None)
        run = lambda choose: execute(choose(program, data, *self.cut, folded), data, None)
        return prefer(self.implementation, lambda: run(choose_fused), lambda: run(choose_cached))

    def result(self, result, return_residual):
        out, r = result
        out = unbind_output(out, self.dtype)
        return (out, unbind_output(r, r.dtype)[..., 0]) if return_residual else out


def _prepare(query, key, value, lengths, key_positions, page_table, cut, implementation, parts, prefix=(0, 0)) -> _Call:
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    scores, mask, weights = parts["scores"], parts["mask"], parts["weights"]
    scores = checks.check_parts(scores, mask, weights)
    _check_arrays(query, key, value, page_table)
    (b, t, _, h), (_, size, k) = query.shape, key.shape[:3]
    if page_table is not None:
        page_table = checks.check_integers("page_table", page_table, ranks=(2,))
        if page_table.shape[0] != b:
            raise ValueError(f"page_table: expected shape [{b}, M] for the batch of query {checks.describe(query)}, got {checks.describe(page_table)}")
        size *= page_table.shape[1]
    lengths = checks.check_integers("lengths", lengths, ranks=(0, 1))
    if lengths.shape not in ((), (b,)):
        raise ValueError(f"lengths: expected shape [] or [{b}] for the batch of query {checks.describe(query)}, got {checks.describe(lengths)}")
    for name, n in zip(("splits", "block_size"), cut):
        if n is not None:
            checks.check_integer(name, n, least=1)
    splits, block_size = cut
    if block_size is not None and page_table is not None and block_size % key.shape[1]:
        raise ValueError(f"block_size: expected a multiple of the page size {key.shape[1]}, got {block_size}")
    if splits not in (None, 1) and not isinstance(weights, Exponential):
        raise NotImplementedError(f"splits: only results of exponential weights merge, expected 1 or None for {checks.describe(weights)}, got {splits}")
    known, start = prefix
    given = checks.check_positions("key_positions", key_positions, b, size)
    slots = jnp.arange(size, dtype=jnp.int32) if given is None else given
    end = start + lengths.reshape(-1, 1)
    slots = jnp.where((slots >= 0) & (start + slots < end), start + slots, -1)
    first = jnp.arange(known, dtype=jnp.int32)
    slots = jnp.concatenate([jnp.broadcast_to(jnp.where(first < start, first, -1), (slots.shape[0], known)), slots], 1)
    positions = end - t + jnp.arange(t, dtype=jnp.int32)
    dtype = computation_dtype(query, key, value)
    program, bound = bind(jnp.asarray(query, dtype), np.zeros((b, known + size, k, 0)), None, scores=scores, mask=mask, weights=weights,
                          scale=checks.check_scale(parts["scale"], h), query_positions=jnp.where(positions >= start, positions, -1), key_positions=slots)
    span = jnp.concatenate([jnp.full_like(end, start), jnp.minimum(end, start + size)], 1) if given is None else None
    data = CachedData(*bound, page_table, span)._replace(key=jnp.asarray(key), value=jnp.asarray(value))
    return _Call(program, data, sink_of(program, weights), query.dtype, implementation, cut)


def _check_arrays(query, key, value, page_table):
    cache = "[B, L, K, H]" if page_table is None else "[P, p, K, H]"
    for name, x, layout in (("query", query, "[B, t, N, H]"), ("key_cache", key, cache), ("value_cache", value, cache)):
        checks.check_array(name, x)
        if len(x.shape) != 4:
            raise ValueError(f"{name}: expected shape {layout}, got {checks.describe(x)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating-point array, got {checks.describe(x)}")
    if jnp.finfo(query.dtype).bits < 16:
        raise TypeError(f"query: expected a floating-point array of 16 bits or more, got {checks.describe(query)}")
    (b, _, n, h), (rows, _, k, size) = query.shape, key.shape
    if size != h:
        raise ValueError(f"key_cache: expected head size {h} as in query {checks.describe(query)}, got {checks.describe(key)}")
    if k == 0 or n % k:
        raise ValueError(f"key_cache: expected a number of heads that divides the query's {n}, got {checks.describe(key)}")
    if page_table is None and rows != b:
        raise ValueError(f"key_cache: expected batch size {b} as in query, got {checks.describe(key)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value_cache: expected shape [{', '.join(map(str, key.shape[:3]))}, Hv] as key_cache {checks.describe(key)}, got {checks.describe(value)}")


def _fold_batch(program: Program, data: CachedData):
    """The call with the queries of all batch elements as those of one."""
    b, t = program.sizes.batch, program.sizes.queries

    def fold(x, spec: Spec):
        if spec.offset and spec.batch:
            raise NotImplementedError("cascade: an 'offset' operand cannot vary over the batch; hand it over by 'query' and 'key', or use decode")
        if not (spec.batch or spec.query):
            return x
        x = jnp.moveaxis(jnp.broadcast_to(x, (b, *x.shape[1:3], t, *x.shape[4:])), 0, 2)
        return x.reshape(1, *x.shape[:2], b * t, *x.shape[4:])

    folded = lambda s: s._replace(batch=False, query=s.batch or s.query)
    specs = jax.tree.map(folded, program.specs, is_leaf=lambda x: isinstance(x, Spec))
    query = jnp.moveaxis(data.query, 0, 2)
    data = data._replace(query=query.reshape(1, *query.shape[:2], b * t, query.shape[-1]), operands=map_operands(fold, data.operands, program.specs),
                         query_positions=jnp.broadcast_to(data.query_positions, (b, t)).reshape(1, b * t))
    return dataclasses.replace(program, specs=specs, sizes=program.sizes._replace(batch=1, queries=b * t)), data
