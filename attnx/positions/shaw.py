"""Relative position representations: learned vectors of the offset between query and key, added to the key and to the value.

Shaw, Uszkoreit, Vaswani: "Self-Attention with Relative Position Representations" (NAACL 2018, arXiv 1803.02155):

    s_ij = q_i . (k_j + a^K_r) / sqrt(H),       out_i = sum_j softmax_j(s_ij) (v_j + a^V_r),       r = clip(j - i, -c, c) + c

Attention then knows how far apart tokens are, up to c, and not where they are; no other positions are needed. With any integer labels r_ij, such as
the kinds of edges of a graph, the same is relation-aware attention. A table of values is out of reach of the engine of pairs, which adds up values of keys, so
this file brings its own forms: instead of vectors for all pairs, [T, S, H], the products q_i . a^K_r and the weights that fall upon each r,
[T, 2c + 1], for a block of queries at a time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import cache, checks
from attnx.nn.attention import Attention
from pallas_kernels import tile
from pallas_kernels.parts import At, Softmax
from pallas_kernels.static import Parts

IMPLEMENTATIONS = ("reference", "bucketed", "skew")
TABLES = ("both", "keys", "values")
_TOGETHER = 2**20  # scores held at a time


def skew(x: Float[Array, "*any T L"]) -> Float[Array, "*any T S"]:
    """From offsets to keys: ``y_tj = x_t,(j - t + T - 1)`` for L = S + T - 1 offsets, by a reshape rather than a gather.

    >>> import jax.numpy as jnp
    >>> skew(jnp.array([[-2, -1, 0, 1, 2]] * 3))
    Array([[ 0,  1,  2],
           [-1,  0,  1],
           [-2, -1,  0]], dtype=int32)
    """
    *batch, rows, offsets = x.shape
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*batch, -1)
    return x[..., rows - 1:rows - 1 + rows * offsets].reshape(*batch, rows, offsets)[..., :offsets - rows + 1]


def unskew(x: Float[Array, "*any T S"]) -> Float[Array, "*any T L"]:
    """From keys to offsets: the transpose of :func:`skew`, zero where an offset has no key.

    >>> import jax.numpy as jnp
    >>> unskew(jnp.ones((2, 2)))
    Array([[0., 1., 1.],
           [1., 1., 0.]], dtype=float32)
    """
    *batch, rows, keys = x.shape
    still = [(0, 0)] * len(batch)
    x = jnp.pad(x, [*still, (0, 0), (0, rows - 1)]).reshape(*batch, -1)
    return jnp.pad(x, [*still, (rows - 1, 1)]).reshape(*batch, rows, keys + rows)[..., :-1]


class _Block(NamedTuple):
    """Queries that are evaluated together; what belongs to them goes along."""

    query: Any  # [B, t, N, H]
    positions: Any  # [B or 1, t]
    segments: Any  # [B, t] or None
    labels: Any  # [B or 1, t, S], or None for those of the offset
    mask: Any  # [B or 1, N or 1, t, S] or None
    first: Any  # storage index of the first query


def relative_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"],
                       key_table: Float[Array, "... R H"] | None = None, value_table: Float[Array, "... R Hv"] | None = None, *, is_causal: bool = False,
                       mask: Bool[Array, "#B #N #T #S"] | None = None, query_positions: Int[Array, "*B T"] | None = None,
                       key_positions: Int[Array, "*B S"] | None = None, segment_ids: Int[Array, "B T"] | None = None, scale: float | None = None,
                       dropout_rate: float = 0.0, dropout_key: Array | None = None, implementation: str | None = None,
                       block_size: int | None = None) -> Float[Array, "B T N Hv"]:
    """Softmax attention with a vector for each clipped offset j - i, key minus query.

    ::

        out_i = sum_j softmax_j(scale q_i . (k_j + a^K_r)) (v_j + a^V_r),        r = clip(j - i, -c, c) + c

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      key_table: a^K, [2c + 1, H] for all heads or [N, 2c + 1, H] for each, c at least 1; None for none.
      value_table: a^V, [2c + 1, Hv] or [N, 2c + 1, Hv], of its own; None for none.
      is_causal: whether queries see no key of a later position.
      mask: boolean, broadcasting to [B, N, T, S]: what may be seen; all by default.
      query_positions, key_positions: int32 [T] or [B, T] ([S] or [B, S]); -1 is padding. 0, 1, 2, ... by default.
      segment_ids: int32 [B, T], documents that do not see each other (T = S).
      scale: of the products; 1 / sqrt(H) by default.
      dropout_rate, dropout_key: as in :func:`attnx.attention`.
      implementation: "reference" (the definition, [T, S, H] vectors), "bucketed" (gathers, any positions), "skew" (reshapes in place of gathers, default
        positions); None takes "skew" if it can.
      block_size: how many queries the last two evaluate at a time; chosen by default.

    Returns:
      [B, T, N, Hv] in the query's dtype; zero for queries that see nothing.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.
      NotImplementedError: "skew" with positions.

    Cost: O(T S H + T c H) time; memory O(T (H + c)) and the scores of a block of queries, forward and backward.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> tables = jax.random.normal(jax.random.key(1), (2, 5, 8))  # c = 2
    >>> out = relative_attention(q, k, v, *tables, is_causal=True)
    >>> bool(jnp.allclose(out, relative_attention(q, k, v, *tables, is_causal=True, implementation="reference"), atol=1e-5))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    batch, length = query.shape[:2]
    tables = _check_tables(key_table, value_table, query, value)
    rows = next(table for table in tables if table is not None).shape[-2]
    if rows % 2 == 0 or rows < 3:
        raise ValueError(f"{'value_table' if key_table is None else 'key_table'}: expected an odd number of rows 2c + 1, at least 3, got {rows}")
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    given = query_positions is not None or key_positions is not None
    if implementation == "skew" and given:
        raise NotImplementedError("implementation='skew': offsets are those of storage, not of given positions; use 'bucketed' or None")
    if segment_ids is not None and (length != key.shape[1] or jnp.shape(segment_ids) != (batch, length)):
        raise ValueError(f"segment_ids: expected shape [B, T] = {[batch, length]} with T = S, got {checks.describe(segment_ids)}")
    return _attend(query, key, value, tables, None, mask, query_positions, key_positions, segment_ids, is_causal, scale, (dropout_rate, dropout_key),
                   implementation or ("bucketed" if given else "skew"), block_size)


def edge_label_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], labels: Int[Array, "#B T S"],
                         key_table: Float[Array, "... R H"] | None = None, value_table: Float[Array, "... R Hv"] | None = None, *,
                         mask: Bool[Array, "#B #N #T #S"] | None = None, scale: float | None = None, dropout_rate: float = 0.0,
                         dropout_key: Array | None = None, implementation: str | None = None, block_size: int | None = None) -> Float[Array, "B T N Hv"]:
    """:func:`relative_attention` with any labels of pairs in place of clipped offsets: relation-aware attention.

    Args:
      query, key, value, mask, scale, dropout_rate, dropout_key, block_size: as there.
      labels: integers [B or 1, T, S], from 0 to R - 1; a pair of any other label, such as -1, is given no vectors (but is seen: that is for ``mask`` to say).
      key_table, value_table: [R, H] and [R, Hv], or [N, R, H] and [N, R, Hv]; either may be None.
      implementation: "reference", "bucketed" or None.

    Returns, Raises: as there.

    Cost: O(T S H + T R H) time, memory O(T (S + R)), the labels being T S integers.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    >>> near = jnp.abs(jnp.arange(4) - jnp.arange(4)[:, None])[None]  # how far apart two nodes of a path are
    >>> edge_label_attention(x, x, x, near, jnp.ones((4, 8)), mask=near[:, None] < 2).shape
    (1, 4, 2, 8)
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    tables = _check_tables(key_table, value_table, query, value)
    labels = checks.check_integers("labels", labels, ranks=(3,))
    if labels.shape[1:] != (query.shape[1], key.shape[1]) or labels.shape[0] not in (1, query.shape[0]):
        raise ValueError(f"labels: expected shape [B or 1, T, S] with B, T, S = {(*query.shape[:2], key.shape[1])}, got {checks.describe(labels)}")
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS[:2])
    return _attend(query, key, value, tables, labels, mask, None, None, None, False, scale, (dropout_rate, dropout_key), implementation or "bucketed",
                   block_size)


def _check_tables(key_table, value_table, query, value):
    """Both tables, or None, as [N or 1, R, H]."""
    if key_table is None and value_table is None:
        raise ValueError("key_table: expected at least one of key_table and value_table, got neither; without them use attnx.attention")
    tables = []
    for name, table, size in (("key_table", key_table, query.shape[3]), ("value_table", value_table, value.shape[3])):
        if table is not None:
            table = checks.check_real(name, table, ranks=(2, 3))
            table = table[None] if table.ndim == 2 else table
            if table.shape[0] not in (1, query.shape[2]) or table.shape[2] != size:
                raise ValueError(f"{name}: expected shape [R, {size}] or [N, R, {size}] with N = {query.shape[2]}, got {checks.describe(table)}")
        tables.append(table)
    if None not in (key_table, value_table) and tables[0].shape[1] != tables[1].shape[1]:
        raise ValueError(f"value_table: expected as many rows as in key_table ({tables[0].shape[1]}), got {tables[1].shape[1]}")
    return tables


def _attend(query, key, value, tables, labels, mask, query_positions, key_positions, segments, is_causal, scale, dropout, implementation, block_size):
    (batch, length, heads, size), total = query.shape, key.shape[1]
    scale, (rate, seed) = checks.check_scale(scale, size), checks.check_dropout(*dropout)
    if mask is not None:
        if jnp.ndim(mask) != 4 or any(n not in (1, m) for n, m in zip(mask.shape, (batch, heads, length, total))) or mask.dtype != bool:
            raise ValueError(f"mask: expected booleans that broadcast to {[batch, heads, length, total]}, got {checks.describe(mask)}")
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, mask.shape[3]))

    def places(name, positions, count):
        positions = checks.check_positions(name, positions, batch, count)
        return jnp.atleast_2d(jnp.arange(count, dtype=jnp.int32) if positions is None else positions)

    query_positions, key_positions = places("query_positions", query_positions, length), places("key_positions", key_positions, total)
    if 0 in (batch, length, total):
        return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    body = partial(_attend_block, key, value, tables, key_positions, segments, is_causal, scale, rate, seed, implementation, length)
    whole = _Block(query, query_positions, segments, labels, mask, jnp.int32(0))
    step = length if implementation == "reference" else block_size or max(16, _TOGETHER // (batch * heads * total))
    if step >= length:
        return body(whole)
    count = -(-length // step)

    def cut(x, axis):
        """[blocks, ...] of an array along its axis of queries."""
        if x is None:
            return None
        x = jnp.pad(x, [(0, count * step - length) if i == axis else (0, 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, step, *x.shape[axis + 1:]), axis, 0)

    blocks = _Block(*(cut(x, axis) for x, axis in zip(whole, (1, 1, 1, 1, 2))), first=step * jnp.arange(count, dtype=jnp.int32))
    out = jax.lax.map(jax.checkpoint(body), blocks)  # nothing of a block is kept for the gradient
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * step, heads, -1)[:, :length]


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=tile.accumulator_dtype(a.dtype))


def _attend_block(key, value, tables, key_positions, segments, is_causal, scale, rate, seed, implementation, length, block: _Block):
    """[B, t, N, Hv] of a block of queries."""
    (batch, t, heads, size), kv_heads = block.query.shape, key.shape[2]
    grouped = block.query.reshape(batch, t, kv_heads, -1, size)
    s = _dot("btkgh,bskh->bkgts", grouped, key).reshape(batch, heads, t, -1)
    keys, values = (None if table is None else table.astype(block.query.dtype) for table in tables)
    clip = next(table for table in tables if table is not None).shape[1] // 2
    make: Any = {"reference": _Gathered, "bucketed": _Bucketed, "skew": partial(_Skewed, block.first, length)}[implementation]
    query_at, key_at = block.positions[:, None, :, None], key_positions[:, None, None, :]
    labels = jnp.clip(key_at - query_at, -clip, clip)[:, 0] + clip if block.labels is None else block.labels
    places = make(labels)
    if keys is not None:
        s = s + places.scores(block.query, keys)
    ok = (query_at >= 0) & (key_at >= 0)
    if is_causal:
        ok &= key_at <= query_at
    if block.segments is not None:
        ok &= block.segments[:, None, :, None] == segments[:, None, None, :]
    if block.mask is not None:
        ok &= block.mask
    s = jnp.where(ok, scale * s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    w = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(w, axis=-1, keepdims=True)
    w = w / jnp.where(total > 0, total, 1)
    if rate:
        at = At(jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None, None], query_at, key_at)
        w = w * tile.dropout_multiplier(Parts((), None, Softmax(), scale, rate), at, seed)
    out = _dot("bkgts,bskv->btkgv", w.reshape(batch, kv_heads, -1, *w.shape[2:]).astype(value.dtype), value).reshape(batch, t, heads, -1)
    if values is not None:
        out = out + places.values(w, values)
    return out.astype(block.query.dtype)


class _Gathered:
    """The definition: a vector for each pair; labels [B or 1, t, S]."""

    def __init__(self, labels):
        self.labels = labels

    def _vectors(self, table):
        """[N or 1, B or 1, t, S, H]."""
        known = (self.labels >= 0) & (self.labels < table.shape[1])
        return jnp.where(known[..., None], table[:, jnp.where(known, self.labels, 0)], 0)

    def scores(self, query, table):
        """q_i . a_r, [B, N, t, S]."""
        return jnp.sum(query.swapaxes(1, 2)[:, :, :, None] * self._vectors(table).swapaxes(0, 1), axis=-1, dtype=tile.accumulator_dtype(query.dtype))

    def values(self, w, table):
        """Weighed vectors, [B, t, N, Hv]."""
        return jnp.sum(w[..., None] * self._vectors(table).swapaxes(0, 1), axis=3).swapaxes(1, 2)


def _per_label(query, table):
    """q_i . a_r for all labels, [B, N, t, R]."""
    return _dot("btnh,nrh->bntr", query, jnp.broadcast_to(table, (query.shape[2], *table.shape[1:])))


def _of_labels(buckets, table):
    """Vectors weighed by what each label weighs, [B, t, N, Hv]."""
    return jnp.einsum("bntr,nrv->btnv", buckets, jnp.broadcast_to(table, (buckets.shape[1], *table.shape[1:])).astype(buckets.dtype))


class _Bucketed(_Gathered):
    """Products with the table are read at the labels, weights summed by label."""

    def scores(self, query, table):
        products = jnp.pad(_per_label(query, table), [(0, 0)] * 3 + [(0, 1)])  # the last label has no vector
        return jnp.take_along_axis(products, self._index(products.shape[-1] - 1)[:, None], axis=-1)

    def values(self, w, table):
        rows = table.shape[1]
        places = [jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(w.shape[:3])]
        buckets = jnp.zeros((*w.shape[:3], rows + 1), w.dtype).at[*places, self._index(rows)[:, None]].add(w)
        return _of_labels(buckets[..., :rows], table)

    def _index(self, rows):
        return jnp.where((self.labels >= 0) & (self.labels < rows), self.labels, rows)


class _Skewed:
    """Clipped offsets of contiguous storage: those short of c are a band of diagonals, all others share the first or the last label."""

    def __init__(self, first, length, labels):
        self.first, self.length, self.labels = first, length, labels

    def _band(self, clip):
        """(padding, start): where the offsets -c + 1 .. c - 1 of the block begin among its own offsets, so padded that they are always there."""
        rows, keys = self.labels.shape[1:]
        return (clip, clip + max(self.length + rows - keys, 0)), self.first + rows

    def scores(self, query, table):
        products, rows = _per_label(query, table), table.shape[1]
        keys, t, clip = self.labels.shape[2], query.shape[1], rows // 2
        (before, after), start = self._band(clip)
        offsets = jnp.zeros((*products.shape[:3], before + keys + t - 1 + after), products.dtype)
        offsets = jax.lax.dynamic_update_slice_in_dim(offsets, products[..., 1:-1], start, axis=3)
        near = skew(offsets[..., before:before + keys + t - 1])
        labels = self.labels[:, None]
        return jnp.where(labels == 0, products[..., :1], jnp.where(labels == rows - 1, products[..., -1:], near))

    def values(self, w, table):
        rows, labels = table.shape[1], self.labels[:, None]
        padding, start = self._band(rows // 2)
        near = jax.lax.dynamic_slice_in_dim(jnp.pad(unskew(w), [(0, 0)] * 3 + [padding]), start, rows - 2, axis=3)
        ends = [jnp.sum(jnp.where(labels == r, w, 0), axis=-1, keepdims=True) for r in (0, rows - 1)]
        return _of_labels(jnp.concatenate([ends[0], near, ends[1]], axis=-1), table)


class RelativePositions(nnx.Module):
    """:func:`relative_attention` with its tables, as an :class:`attnx.Mechanism`; made by :class:`RelativeSelfAttention`.

    Args:
      num_heads, head_size, value_size: N, H and Hv.
      clip, is_causal, tables, per_head, scale, dropout_rate, implementation, param_dtype: as there.
      rngs: the generator of initial values.
    """

    def __init__(self, num_heads: int, head_size: int, value_size: int | None = None, *, clip: int = 16, is_causal: bool = False, tables: str = "both",
                 per_head: bool = False, scale: float | None = None, dropout_rate: float = 0.0, implementation: str | None = None, param_dtype=jnp.float32,
                 rngs: nnx.Rngs):
        checks.check_integer("clip", clip, least=1)
        checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
        if tables not in TABLES:
            raise ValueError(f"tables: expected one of {', '.join(map(repr, TABLES))}, got {tables!r}")
        heads = (num_heads,) if per_head else ()
        table = lambda size: nnx.Param(0.02 * jax.random.normal(rngs.params(), (*heads, 2 * clip + 1, size), param_dtype))
        self.key_table = table(head_size) if tables != "values" else nnx.data(None)
        self.value_table = table(value_size or head_size) if tables != "keys" else nnx.data(None)
        self.is_causal, self.scale, self.dropout_rate = is_causal, scale, checks.check_dropout_rate(dropout_rate)
        self.implementation = implementation

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        tables = (None if table is None else table[...] for table in (self.key_table, self.value_table))
        return relative_attention(query, key, value, *tables, is_causal=self.is_causal, query_positions=query_positions, key_positions=key_positions,
                                  segment_ids=segment_ids, scale=self.scale, dropout_rate=0.0 if dropout_key is None else self.dropout_rate,
                                  dropout_key=dropout_key, implementation=None if query_positions is not None else self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        return cache.init(batch, max_length, kv_heads, key_size, value_size, dtype)

    def step(self, state, query, key, value):
        """The next tokens see what is cached, themselves included; only their own rows are formed."""
        positions = state.next + jnp.arange(query.shape[1], dtype=jnp.int32)
        state = cache.append(state, key, value)
        dtype = cache.computation_dtype(query, state.key, state.value)
        out = self(*(x.astype(dtype) for x in (query, state.key, state.value)), query_positions=positions, key_positions=state.positions)
        return state, out.astype(query.dtype)


class RelativeSelfAttention(Attention):
    """Multi-head :func:`relative_attention` with tables of its own, learned.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism.
      clip: c, 16 in the paper's smaller model and 8 in its larger.
      is_causal: whether tokens see no later ones.
      tables: "both", "keys" or "values".
      per_head: whether each head has tables of its own rather than all one pair.
      scale, dropout_rate, implementation: as in :func:`relative_attention`.

    Tables start as N(0, 0.02), which the paper leaves open.

    >>> import jax.numpy as jnp
    >>> layer = RelativeSelfAttention(32, 4, clip=3, is_causal=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, clip: int = 16, is_causal: bool = False, tables: str = "both", per_head: bool = False,
                 scale: float | None = None, dropout_rate: float = 0.0, implementation: str | None = None, rngs: nnx.Rngs, **options):
        head_size = options.get("head_size") or features // num_heads
        mechanism = partial(RelativePositions, num_heads, head_size, options.get("value_size"), clip=clip, is_causal=is_causal, tables=tables,
                            per_head=per_head, scale=scale, dropout_rate=dropout_rate, implementation=implementation,
                            param_dtype=options.get("param_dtype", jnp.float32))
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
