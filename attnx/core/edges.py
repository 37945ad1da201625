"""The edges engine: attention over the edges of a graph, as lists of senders and receivers padded to a static size.

    out_i = sum over edges e: j -> i of  weights(s_e, statistics of the edges into i) * v_j

One definition of padding serves every function: an edge or element is padding where its mask is False or its index lies outside
0..size-1 (so -1 and one-past-the-end both mark it). Padding has weight exactly 0, and whatever it holds reaches
neither the output nor a gradient. A node or segment without anything gets zeros. Duplicate edges count as often as they occur. Cost is
O(V + E) in time and memory. Batches of graphs are disjoint unions, or go through ``jax.vmap``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from attnx.core.checks import check_dropout, check_integer, check_integers, check_scale, describe
from attnx.core.program import bind_operand
from pallas_kernels import tile
from pallas_kernels.parts import At, Exponential, Extent, Operand, Sizes, Softmax, Sum, Weights
from pallas_kernels.static import Parts

# Segments -----------------------------------------------------------------------------------------------------------


def _accumulated(x):
    x = jnp.asarray(x)
    return x.astype(tile.accumulator_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _indices(name: str, ids, size: int, length: int | None = None, mask=None):
    """Checked indices with every padded one moved to ``size``, where sums drop it and :func:`_rows` reads zeros."""
    check_integer("num_segments", size, least=0)
    ids = check_integers(name, ids, ranks=(1,))
    if length is not None and ids.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {describe(ids)}")
    valid = (ids >= 0) & (ids < size)
    if mask is not None:
        if jnp.shape(mask) != ids.shape or jnp.result_type(mask) != jnp.bool_:
            argument = "mask" if name == "segment_ids" else "edge_mask"
            raise ValueError(f"{argument}: expected bool{list(ids.shape)} as {name}, got {describe(mask)}")
        valid &= mask
    return jnp.where(valid, ids, size)


def _rows(x, ids):
    """``x[ids]``, with zeros for padding."""
    if not len(x):
        return jnp.zeros((len(ids), *x.shape[1:]), x.dtype)
    return jnp.asarray(x).at[ids].get(mode="fill", fill_value=0)


def segment_sum(data: Shaped[Array, "E ..."], segment_ids: Int[Array, " E"], num_segments: int, *, mask: Bool[Array, " E"] | None = None
                ) -> Shaped[Array, "S ..."]:
    """Sums of the elements of each segment, accumulated in at least float32; 0 for an empty one.

    Args:
      data: [E, ...].
      segment_ids: the segment of each element, in any order; outside 0..num_segments-1 is padding.
      num_segments: their number S, static.
      mask: False marks padding.

    >>> segment_sum(jnp.array([1.0, 2.0, 3.0, jnp.nan]), jnp.array([0, 2, 0, -1]), 3)
    Array([4., 0., 2.], dtype=float32)
    """
    ids = _indices("segment_ids", segment_ids, num_segments, len(data), mask)
    return jax.ops.segment_sum(_accumulated(data), ids, num_segments).astype(jnp.result_type(data))


def segment_mean(data: Float[Array, "E ..."], segment_ids: Int[Array, " E"], num_segments: int, *, mask: Bool[Array, " E"] | None = None
                 ) -> Float[Array, "S ..."]:
    """Means of the elements of each segment; 0 for an empty one. Arguments as for :func:`segment_sum`.

    >>> segment_mean(jnp.array([1.0, 2.0, 3.0]), jnp.array([0, 2, 0]), 3)
    Array([2., 0., 2.], dtype=float32)
    """
    ids = _indices("segment_ids", segment_ids, num_segments, len(data), mask)
    count = jnp.maximum(degree(ids, num_segments), 1).reshape(-1, *(1,) * (data.ndim - 1))
    return (jax.ops.segment_sum(_accumulated(data), ids, num_segments) / count).astype(jnp.result_type(data))


def segment_max(data: Float[Array, "E ..."], segment_ids: Int[Array, " E"], num_segments: int, *, mask: Bool[Array, " E"] | None = None
                ) -> Float[Array, "S ..."]:
    """The largest element of each segment; 0 (not -inf) for an empty one. Arguments as for :func:`segment_sum`; ties share the gradient.

    >>> segment_max(jnp.array([-1.0, -2.0, -3.0]), jnp.array([0, 2, 0]), 3)
    Array([-1.,  0., -2.], dtype=float32)
    """
    ids = _indices("segment_ids", segment_ids, num_segments, len(data), mask)
    some = (degree(ids, num_segments) > 0).reshape(-1, *(1,) * (data.ndim - 1))
    return jnp.where(some, jax.ops.segment_max(jnp.asarray(data), ids, num_segments), 0)


def degree(segment_ids: Int[Array, " E"], num_segments: int, *, mask: Bool[Array, " E"] | None = None) -> Int[Array, " S"]:
    """How many elements each segment has: the in-degree of receivers, the out-degree of senders.

    >>> degree(jnp.array([0, 2, 0, -1]), 3)
    Array([2, 0, 1], dtype=int32)
    """
    ids = _indices("segment_ids", segment_ids, num_segments, mask=mask)
    return jax.ops.segment_sum(jnp.ones_like(ids), ids, num_segments)


def _node_operand(operand: Operand, sizes: Sizes, owner: str):
    """An operand of weights as [V or 1, N or 1]."""
    if not set(operand.axes) <= {"batch", "query", "head"}:
        raise NotImplementedError(f"weights: over edges an array of {owner} may vary by 'query' and 'head', got axes {operand.axes}")
    array, _ = bind_operand(operand, sizes, owner)
    return array[0, :, 0, :, 0].T


def segment_weights(scores: Float[Array, "E N"], segment_ids: Int[Array, " E"], num_segments: int, weights: Weights, *,
                    mask: Bool[Array, " E"] | None = None) -> Float[Array, "E N"]:
    """The weight of each score, given the scores of its segment; each head by itself.

    Args:
      scores: real [E, N].
      segment_ids: the segment of each score, in any order; outside 0..num_segments-1 is padding.
      num_segments: their number S, static.
      weights: of :mod:`attnx.weights`; their 'query' axis counts segments.
      mask: False marks padding.

    Returns:
      [E, N] in the accumulator's dtype (at least float32); exactly 0, with zero gradient, for padding.

    Raises:
      NotImplementedError: weights with a statistic that is the root of an equation (entmax).

    >>> from attnx.weights import softmax
    >>> segment_weights(jnp.zeros((3, 1)), jnp.array([1, 1, 0]), 2, softmax(sink=0.0))[:, 0]
    Array([0.33333334, 0.33333334, 0.5       ], dtype=float32)
    """
    if not isinstance(weights, Weights):
        raise TypeError(f"weights: expected weights (see attnx.weights), got {describe(weights)}")
    if scores.ndim != 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores: expected real numbers of shape [E, N], got {describe(scores)}")
    ids = _indices("segment_ids", segment_ids, num_segments, len(scores), mask)
    owner, valid = type(weights).__name__, (ids < num_segments)[:, None]
    s = jnp.where(valid, _accumulated(scores), 0)
    if not num_segments:
        return s
    sizes = Sizes(1, s.shape[1], s.shape[1], num_segments, len(s), (0, 0), s.dtype)
    shared = tuple(_node_operand(operand, sizes, owner) for operand in weights.operands(sizes))
    operands = tuple(x if len(x) == 1 else x[ids] for x in shared)  # padding reads the last segment's: a value that occurs

    def spread(x):
        return jnp.where(valid, x[ids], 0)

    def total(x):
        return jax.ops.segment_sum(jnp.where(valid, x, 0), ids, num_segments)

    def residual(family, sink=None):  # numerators, and normalisers e^m norm
        shift, m = family.shift(s, *operands), jnp.zeros((num_segments, s.shape[1]), s.dtype)
        if shift is not None:
            m = jnp.maximum(jax.ops.segment_max(lax.stop_gradient(shift), ids, num_segments), tile.FLOOR)
        if sink is not None:
            m = jnp.maximum(m, lax.stop_gradient(sink))
        num, den = family.terms(s, spread(m), *operands)
        return num, total(den) if sink is None else total(den) + jnp.exp(sink - m), m

    if isinstance(weights, Exponential):
        sink = weights.sink(sizes)
        num, norm, _ = residual(weights, None if sink is None else _node_operand(sink, sizes, owner))
        return jnp.where(valid, num / jnp.where(valid, jnp.where(norm == 0, jnp.inf, norm)[ids], 1), 0)
    rows = ()
    for which in weights.statistics:
        given = tuple(map(spread, map(tile.given_rows, rows)))
        if isinstance(which, Exponential):
            _, norm, m = residual(which)
            r = jnp.where(norm > 0, m + jnp.log(jnp.where(norm > 0, norm, 1)), -jnp.inf)
        elif which is Extent.COUNT:
            r = total(jnp.ones_like(s))
        elif which is Extent.MAXIMUM:
            r = lax.stop_gradient(segment_max(s, ids, num_segments))
        elif isinstance(which, Sum):
            r = which.finish(total(which.phi(s, given, *operands)), rows, *shared)
        else:
            raise NotImplementedError(f"weights: {owner} solves an equation for each node, which edges cannot; weights of the exponential "
                                      "family, elementwise weights and those given by sums are served")
        rows = (*rows, r)
    w = jnp.where(valid, weights.weight(s, tuple(map(spread, map(tile.given_rows, rows))), *operands), 0)
    if weights.normalized:
        norm = total(w)
        w = jnp.where(valid, w / jnp.where(norm > 0, norm, 1)[ids], 0)
    return w


def segment_softmax(scores: Float[Array, "E ..."], segment_ids: Int[Array, " E"], num_segments: int, *,
                    mask: Bool[Array, " E"] | None = None) -> Float[Array, "E ..."]:
    """The softmax of each score among those of its segment: w_e = e^(s_e - m) / sum over the segment of e^(s - m), m its maximum.

    Args:
      scores: real [E] or [E, N], each head by itself.
      segment_ids, num_segments, mask: as for :func:`segment_sum`.

    Returns:
      Like ``scores``; exactly 0, with zero gradient, for padding.

    >>> segment_softmax(jnp.array([0.0, 0.0, 5.0, jnp.nan]), jnp.array([1, 1, 0, -1]), 2)
    Array([0.5, 0.5, 1. , 0. ], dtype=float32)
    """
    heads = scores[:, None] if scores.ndim == 1 else scores
    return segment_weights(heads, segment_ids, num_segments, Softmax(), mask=mask).reshape(scores.shape).astype(scores.dtype)


# Attention ----------------------------------------------------------------------------------------------------------


def attend_edges(scores: Float[Array, "E N"], value: Float[Array, "U K Hv"], senders: Int[Array, " E"], receivers: Int[Array, " E"],
                 num_nodes: int, *, edge_mask: Bool[Array, " E"] | None = None, weights: Weights = Softmax(), dropout_rate: float = 0.0,
                 dropout_key: Array | None = None, return_weights: bool = False):
    """Attention from given scores: out_i = sum over edges e: j -> i of w_e v_j, the weights normalised over the edges into i.

    Args:
      scores: [E, N], one for each edge and head (a GAT's LeakyReLU(a . [z_i, z_j]), for example).
      value: [U, K, Hv] of the sending nodes, N a multiple of K.
      senders, receivers: [E], from node of ``value`` to node of the result.
      num_nodes: how many nodes receive, V, static.
      edge_mask: False marks padding, as does an index out of range.
      weights: how scores become weights (see :mod:`attnx.weights`); softmax by default.
      dropout_rate, dropout_key: dropout of weights; the pattern is a function of (key, head, receiver, sender), as in the pairs engine.
      return_weights: return the weights too.

    Returns:
      [V, N, Hv] in the values' dtype; with ``return_weights`` a pair with the weights [E, N] before dropout.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit. NotImplementedError: see :func:`segment_weights`.

    >>> value = jnp.array([1.0, 3.0, 5.0]).reshape(3, 1, 1)
    >>> attend_edges(jnp.zeros((3, 1)), value, jnp.array([0, 1, -1]), jnp.array([2, 2, 2]), 3)[:, 0, 0]
    Array([0., 0., 2.], dtype=float32)
    """
    rate, seed = check_dropout(dropout_rate, dropout_key)
    check_integer("num_nodes", num_nodes, least=0)
    if value.ndim != 3:
        raise ValueError(f"value: expected shape [U, K, Hv], got {describe(value)}")
    if scores.ndim != 2 or not value.shape[1] or scores.shape[1] % value.shape[1]:
        raise ValueError(f"scores: expected shape [E, N] with N a multiple of the {value.shape[1]} heads of value, got {describe(scores)}")
    senders = _indices("senders", senders, value.shape[0], len(scores), edge_mask)
    receivers = _indices("receivers", receivers, num_nodes, len(scores), senders < value.shape[0])
    given, heads = segment_weights(scores, receivers, num_nodes, weights), scores.shape[1]
    w = given
    if rate:
        at = At(0, jnp.arange(heads)[None], receivers[:, None], senders[:, None])
        w = w * tile.dropout_multiplier(Parts((), None, weights, 1.0, rate), at, seed)
    w = w.reshape(len(w), value.shape[1], heads // value.shape[1], 1)
    messages = (w * _rows(value, senders)[:, :, None]).reshape(len(w), heads, value.shape[2])
    out = jax.ops.segment_sum(messages, receivers, num_nodes).astype(value.dtype)
    return (out, given) if return_weights else out


def edge_attention(query: Float[Array, "V N H"], key: Float[Array, "U K H"], value: Float[Array, "U K Hv"], senders: Int[Array, " E"],
                   receivers: Int[Array, " E"], *, edge_scores: Float[Array, "E N"] | None = None,
                   edge_mask: Bool[Array, " E"] | None = None, weights: Weights = Softmax(), scale: float | None = None,
                   self_loops: bool = False, dropout_rate: float = 0.0, dropout_key: Array | None = None, return_weights: bool = False):
    """Multi-head attention over the edges of a graph: s_e = scale * q_i . k_j + edge_scores_e for an edge e: j -> i.

    On a complete graph this is dense attention. Permuting nodes or edges permutes the output, to rounding.

    Args:
      query: [V, N, H] of the receiving nodes.
      key, value: [U, K, H] and [U, K, Hv] of the sending nodes (the same nodes, or the other side of a bipartite graph), N a multiple of K.
      senders, receivers: [E] indices into key and query.
      edge_scores: [E, N] or [E, 1], added to the scores: what edge features say.
      edge_mask: False marks padding, as does an index out of range.
      weights: how scores become weights (see :mod:`attnx.weights`); softmax by default.
      scale: of the dot products, 1 / sqrt(H) by default.
      self_loops: let every node attend to itself once, with edge score 0 (loops already there are dropped). For loops
        with features of their own, call :func:`add_self_loops` first.
      dropout_rate, dropout_key, return_weights: as for :func:`attend_edges`; weights of self loops follow those of the edges.

    Returns:
      [V, N, Hv] in the query's dtype, zeros for a node that receives nothing; with ``return_weights`` a pair with the weights [E (+ V), N].

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit. NotImplementedError: see :func:`segment_weights`.

    Source: Velickovic et al., Graph Attention Networks, 2017, arXiv 1710.10903 (with dot products in place of the additive score).

    >>> x = jnp.ones((4, 2, 8))
    >>> edge_attention(x, x, x, jnp.array([0, 1]), jnp.array([1, 2]))[:, 0, 0]
    Array([0., 1., 1., 0.], dtype=float32)
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != query.dtype:
            raise ValueError(f"{name}: expected {query.dtype} (the query's dtype, real) of shape [nodes, heads, size], got {describe(x)}")
    (nodes, heads, size), kv_heads = query.shape, key.shape[1]
    if key.shape[2] != size or not kv_heads or heads % kv_heads:
        raise ValueError(f"key: expected shape [U, K, H] with H = {size} and K a divisor of {heads} as in query, got {describe(key)}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(f"value: expected shape [{key.shape[0]}, {kv_heads}, Hv] as key, got {describe(value)}")
    if edge_scores is not None and edge_scores.shape not in ((len(senders), heads), (len(senders), 1)):
        raise ValueError(f"edge_scores: expected shape [{len(senders)}, {heads}] or [{len(senders)}, 1], got {describe(edge_scores)}")
    if self_loops:
        if key.shape[0] != nodes:
            raise ValueError(f"self_loops: expected as many keys as queries, {nodes}, got {describe(key)}")
        senders, receivers, edge_mask, edge_scores = add_self_loops(senders, receivers, nodes, edge_mask=edge_mask, features=edge_scores)
    senders = _indices("senders", senders, key.shape[0], mask=edge_mask)
    receivers = _indices("receivers", receivers, nodes, len(senders), edge_mask)
    q, k = _rows(query, receivers).reshape(-1, kv_heads, heads // kv_heads, size), _rows(key, senders)
    scores = jnp.einsum("ekgh,ekh->ekg", q, k, preferred_element_type=tile.accumulator_dtype(query.dtype)).reshape(len(senders), heads)
    scores = scores * check_scale(scale, size)
    if edge_scores is not None:
        scores = scores + edge_scores
    return attend_edges(scores, value, senders, receivers, nodes, weights=weights, dropout_rate=dropout_rate, dropout_key=dropout_key,
                        return_weights=return_weights)


# Edge lists ---------------------------------------------------------------------------------------------------------


class Edges(NamedTuple):
    """A padded edge list: E slots, of which ``mask`` says which are edges, and what is known of each edge."""

    senders: Int[Array, " E"]
    receivers: Int[Array, " E"]
    mask: Bool[Array, " E"]
    features: Shaped[Array, "E ..."] | None = None


def add_self_loops(senders: Int[Array, " E"], receivers: Int[Array, " E"], num_nodes: int, *, edge_mask: Bool[Array, " E"] | None = None,
                   features: Float[Array, "E ..."] | None = None, fill: float | str = 0.0) -> Edges:
    """Appends one edge i -> i for every node, and masks those that were there before: E + V slots.

    Args:
      senders, receivers, edge_mask: the edges; padding as everywhere.
      num_nodes: V, static.
      features: [E, ...] of the edges, if any.
      fill: the features of the new edges: a number, or 'mean' for the mean over the node's incoming edges.

    >>> add_self_loops(jnp.array([0, 1]), jnp.array([1, 1]), 2).mask
    Array([ True, False,  True,  True], dtype=bool)
    """
    senders = _indices("senders", senders, num_nodes, mask=edge_mask)
    receivers = _indices("receivers", receivers, num_nodes, len(senders), edge_mask)
    mask = (senders != receivers) & (senders < num_nodes) & (receivers < num_nodes)
    nodes = jnp.arange(num_nodes, dtype=jnp.int32)
    if features is not None:
        if isinstance(fill, str):
            if fill != "mean":
                raise ValueError(f"fill: expected a number or 'mean', got {fill!r}")
            loops = segment_mean(features, receivers, num_nodes, mask=mask)
        else:
            loops = jnp.full((num_nodes, *features.shape[1:]), fill, features.dtype)
        features = jnp.concatenate([features, loops])
    return Edges(jnp.concatenate([senders, nodes]), jnp.concatenate([receivers, nodes]),
                 jnp.concatenate([mask, jnp.ones(num_nodes, bool)]), features)


def dense_to_edges(adjacency: Shaped[Array, "V U"], size: int | None = None) -> Edges:
    """The edge list of an adjacency matrix: an edge j -> i for every nonzero ``adjacency[i, j]``, which becomes its feature.

    Args:
      adjacency: [V, U], receivers by senders, as a matrix of attention weights.
      size: number of slots, static; needed under jit. The default is the number of edges.

    Returns:
      Edges in raster order of the matrix, then padding with indices -1.

    Raises:
      ValueError: more edges than ``size`` (where that can be known: under jit the surplus is dropped).

    >>> senders, receivers, mask, weight = dense_to_edges(jnp.array([[0, 2], [3, 0]]), size=3)
    >>> senders, receivers, weight
    (Array([ 1,  0, -1], dtype=int32), Array([ 0,  1, -1], dtype=int32), Array([2, 3, 0], dtype=int32))
    """
    if adjacency.ndim != 2:
        raise ValueError(f"adjacency: expected shape [V, U], got {describe(adjacency)}")
    if size is not None and not isinstance(adjacency, Tracer) and (found := int(jnp.count_nonzero(adjacency))) > size:
        raise ValueError(f"size: expected at least the number of edges, {found}, got {size}")
    receivers, senders = (x.astype(jnp.int32) for x in jnp.nonzero(adjacency, size=size, fill_value=-1))
    mask = receivers >= 0
    return Edges(senders, receivers, mask, jnp.where(mask, adjacency[receivers, senders], 0))
