"""Graph attention by additive scores: GAT, whose heads rank all neighbours alike, and GATv2, whose ranking depends on who asks.

Brody, Alon, Yahav: "How Attentive are Graph Attention Networks?" (ICLR 2022, arXiv 2105.14491). For an edge from node j to node i

    GATv2     s_ij = a . LeakyReLU(q_i + k_j)                     dynamic: a hidden layer of each pair
    GAT       s_ij = LeakyReLU(a_q . q_i + a_k . k_j)             static: q_i moves all scores of i alike, so every i prefers the same j
    DPGAT     s_ij = q_i . k_j / sqrt(H)

and out_i = sum over edges into i of softmax(s_ij) k_j: the projection of the sending node is key and value in one. GAT is Velickovic, Cucurull, Casanova,
Romero, Lio, Bengio: "Graph Attention Networks" (ICLR 2018, arXiv 1710.10903).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks, edges
from attnx.core.attention import attention
from attnx.masks.explicit import explicit
from attnx.nn.common import logical_axes
from pallas_kernels.parts import Operand, Similarity, part, static

KINDS = ("gatv2", "gat", "dpgat")

# Scores of edges ----------------------------------------------------------------------------------------------------


def gatv2_scores(query: Float[Array, "V N H"], key: Float[Array, "U N H"], senders: Int[Array, " E"], receivers: Int[Array, " E"],
                 vector: Float[Array, "N H"], *, edge_features: Float[Array, "E N H"] | None = None, slope: float = 0.2) -> Float[Array, "E N"]:
    """Dynamic scores of edges: ``s_e = a . LeakyReLU(q_i + k_j + f_e)``.

    Args:
      query: [V, N, H] of receiving nodes.
      key: [U, N, H] of sending nodes.
      senders, receivers: int [E], into key and query; an index out of range is padding, whose score means nothing.
      vector: a, [N, H].
      edge_features: f, [E, N, H].
      slope: of LeakyReLU below zero.

    Returns:
      [E, N] in at least float32.

    Raises:
      ValueError: shapes that do not fit.

    Cost: O(E N H) time and memory.

    >>> one = jnp.ones((1, 1, 1))
    >>> gatv2_scores(one, -3 * one, jnp.array([0]), jnp.array([0]), one[0])
    Array([[-0.4]], dtype=float32)
    """
    _check(query, key, vector, (query.shape[1:],), "[N, H]")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    pair = _ends(query, receivers).astype(wide) + _ends(key, senders)
    if edge_features is not None:
        _check_edges(edge_features, senders, query)
        pair = pair + edge_features
    return jnp.einsum("enh,nh->en", jax.nn.leaky_relu(pair, slope), vector, preferred_element_type=wide).astype(wide)


def gat_scores(query: Float[Array, "V N H"], key: Float[Array, "U N H"], senders: Int[Array, " E"], receivers: Int[Array, " E"],
               vector: Float[Array, "m N H"], *, edge_features: Float[Array, "E N H"] | None = None, slope: float = 0.2) -> Float[Array, "E N"]:
    """Static scores of edges: ``s_e = LeakyReLU(a_q . q_i + a_k . k_j + a_f . f_e)``.

    Args:
      vector: [2, N, H], a_q and a_k; [3, N, H], a_f too, with edge features.
      query, key, senders, receivers, edge_features, slope: as for :func:`gatv2_scores`.

    Returns:
      [E, N] in at least float32.

    Raises:
      ValueError: shapes that do not fit.

    Cost: O((V + U) N H + E N) time, O(E N) memory (and what edge features take).

    >>> one = jnp.ones((1, 1, 1))
    >>> gat_scores(one, -3 * one, jnp.array([0]), jnp.array([0]), jnp.ones((2, 1, 1)))
    Array([[-0.4]], dtype=float32)
    """
    count = 2 if edge_features is None else 3
    _check(query, key, vector, ((count, *query.shape[1:]),), f"[{count}, N, H]")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    dot = lambda x, a: jnp.einsum("xnh,nh->xn", x, a, preferred_element_type=wide).astype(wide)
    s = _ends(dot(query, vector[0]), receivers) + _ends(dot(key, vector[1]), senders)
    if edge_features is not None:
        _check_edges(edge_features, senders, query)
        s = s + dot(edge_features, vector[2])
    return jax.nn.leaky_relu(s, slope)


def _ends(x, ids):
    """``x[ids]``, zeros for padding."""
    return jnp.asarray(x).at[jnp.where(ids < 0, len(x), ids)].get(mode="fill", fill_value=0)


def _check(query, key, vector, shapes, words):
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 3 or x.shape[1:] != query.shape[1:]:
            raise ValueError(f"{name}: expected shape [nodes, N, H], the same heads in query and key, got {checks.describe(x)}")
    if vector.shape not in shapes:
        raise ValueError(f"vector: expected shape {words} with N, H = {query.shape[1:]} as in query, got {checks.describe(vector)}")


def _check_edges(edge_features, senders, query):
    if edge_features.shape != (len(senders), *query.shape[1:]):
        raise ValueError(f"edge_features: expected shape {[len(senders), *query.shape[1:]]} ([E, N, H]), got {checks.describe(edge_features)}")


# Attention ----------------------------------------------------------------------------------------------------------


def graph_attention(query: Float[Array, "V N H"], key: Float[Array, "U N H"], senders: Int[Array, " E"], receivers: Int[Array, " E"],
                    vector: Float[Array, "... N H"] | None = None, *, kind: str = "gatv2", edge_features: Float[Array, "E N H"] | None = None,
                    edge_mask: Bool[Array, " E"] | None = None, slope: float = 0.2, self_loops: bool = False, dropout_rate: float = 0.0,
                    dropout_key: Array | None = None, return_weights: bool = False):
    """Attention over the edges into each node: ``out_i = sum over e: j -> i of softmax_e(s_e) k_j``, softmax over the edges into i.

    Args:
      query: [V, N, H] of receiving nodes.
      key: [U, N, H] of sending nodes, which is the value too.
      senders, receivers: int [E], into key and query. An edge out of range is padding; equal edges count each.
      vector: [N, H] for 'gatv2', [2, N, H] or with edge features [3, N, H] for 'gat' (see :func:`gat_scores`), None for 'dpgat'.
      kind: 'gatv2', 'gat' or 'dpgat', which takes no edge features.
      edge_features: [E, N, H], what is known of edges.
      edge_mask: bool [E], False marks padding.
      slope: of LeakyReLU below zero.
      self_loops: let every node receive from itself once; loops already there are dropped, and the features of a loop are the mean of those of the
        edges into its node.
      dropout_rate, dropout_key: dropout of weights.
      return_weights: return the weights too.

    Returns:
      [V, N, H] in the query's dtype, zeros for a node that receives nothing; with ``return_weights`` a pair with the weights [E, N] ([E + V, N] with
      ``self_loops``, those of the loops last).

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(E N H) time and, but for 'gat' without edge features and dropout, memory.

    >>> x = jnp.array([1.0, 2.0, 4.0]).reshape(3, 1, 1)
    >>> graph_attention(x, x, jnp.array([0, 1, -1]), jnp.array([2, 2, 0]), jnp.zeros((1, 1)))[:, 0, 0]
    Array([0. , 0. , 1.5], dtype=float32)
    """
    checks.check_choice("kind", kind, KINDS)
    if kind == "dpgat":
        if vector is not None or edge_features is not None:
            raise ValueError("kind: 'dpgat' scores by dot products and takes neither vector nor edge_features")
        return edges.edge_attention(query, key, key, senders, receivers, edge_mask=edge_mask, self_loops=self_loops, dropout_rate=dropout_rate,
                                    dropout_key=dropout_key, return_weights=return_weights)
    if vector is None:
        raise ValueError(f"vector: expected an array with kind={kind!r}, got None")
    if self_loops:
        if key.shape[0] != query.shape[0]:
            raise ValueError(f"self_loops: expected as many keys as queries, {query.shape[0]}, got {checks.describe(key)}")
        if edge_features is not None:
            _check_edges(edge_features, senders, query)
        senders, receivers, edge_mask, edge_features = edges.add_self_loops(senders, receivers, query.shape[0], edge_mask=edge_mask, features=edge_features,
                                                                            fill="mean")
    senders, receivers = (checks.check_integers(name, ids, ranks=(1,)) for name, ids in (("senders", senders), ("receivers", receivers)))
    if edge_mask is not None:  # what padding holds must not reach the gradient of the vector either
        senders, receivers = jnp.where(edge_mask, senders, -1), jnp.where(edge_mask, receivers, -1)
    if edge_features is not None:
        _check_edges(edge_features, senders, query)
        edge_features = jnp.where(((senders >= 0) & (receivers >= 0))[:, None, None], edge_features, 0)
    score = gatv2_scores if kind == "gatv2" else gat_scores
    s = score(query, key, senders, receivers, vector, edge_features=edge_features, slope=slope)
    return edges.attend_edges(s, key, senders, receivers, query.shape[0], dropout_rate=dropout_rate, dropout_key=dropout_key, return_weights=return_weights)


@part
class GATv2(Similarity):
    """``a . LeakyReLU(q_i + k_j)`` in place of dot products, for the engine of all pairs; a: [N, H]."""

    vector: Any
    slope: float = static(default=0.2)

    def operands(self, sizes):
        return (Operand(self.vector, ("head", None)),)

    def pair(self, q, k, at, vector):
        return jnp.sum(jax.nn.leaky_relu(q[:, None] + k[None], self.slope) * vector.astype(q.dtype), axis=-1)


@part
class GAT(Similarity):
    """``LeakyReLU(a_q . q_i + a_k . k_j)`` in place of dot products; a: [2, N, H]."""

    vector: Any
    slope: float = static(default=0.2)

    def operands(self, sizes):
        return tuple(Operand(a, ("head", None)) for a in self.vector)

    @property
    def arity(self):
        return 2

    def pair(self, q, k, at, query_vector, key_vector):
        dot = lambda x, a: jnp.sum(x * a[0].astype(x.dtype), axis=-1)
        return jax.nn.leaky_relu(dot(q, query_vector)[:, None] + dot(k, key_vector)[None], self.slope)


def dense_graph_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S N H"], adjacency: Bool[Array, "B T S"] | None,
                          vector: Float[Array, "... N H"] | None = None, *, kind: str = "gatv2", slope: float = 0.2, **options):
    """:func:`graph_attention` of small or dense graphs, by the engine of all pairs: node i receives from j where ``adjacency[b, i, j]``.

    Args:
      query: [B, T, N, H] of receiving nodes.
      key: [B, S, N, H] of sending nodes, which is the value too.
      adjacency: bool [B, T, S] or [T, S]; None for complete graphs.
      vector, kind, slope: as there, without edge features.
      **options: implementation, key_positions (-1 for nodes that are padding), dropout_rate, dropout_key, ... as in :func:`attnx.attention`.

    Returns:
      [B, T, N, H] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(T S N H) time, O(T + S) memory beyond the adjacency.

    >>> x = jnp.array([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    >>> path = jnp.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
    >>> dense_graph_attention(x, x, path, jnp.ones((1, 1)))[0, :, 0, 0]
    Array([0., 1., 2.], dtype=float32)
    """
    checks.check_choice("kind", kind, KINDS)
    query, key, value = checks.check_query_key_value(query, key, key)
    shape = {"gatv2": query.shape[2:], "gat": (2, *query.shape[2:]), "dpgat": None}[kind]
    if (None if vector is None else vector.shape) != shape:
        raise ValueError(f"vector: expected {'None' if shape is None else list(shape)} for kind={kind!r}, got {checks.describe(vector)}")
    score = () if vector is None else ((GATv2 if kind == "gatv2" else GAT)(vector, slope),)
    mask = None if adjacency is None else explicit(adjacency[:, None] if jnp.ndim(adjacency) == 3 else adjacency)
    return attention(query, key, value, scores=score, mask=mask, **options)


def ranking_is_static(scores: Float[Array, "*N V U"], adjacency: Bool[Array, "V U"] | None = None) -> Bool[Array, "*N"]:
    """Whether all nodes rank their neighbours alike: no two nodes that share neighbours j and k disagree which of them scores higher.

    Args:
      scores: [..., V, U], scores or weights of receiving by sending nodes.
      adjacency: bool [V, U]; None where all pairs are edges.

    Returns:
      bool [...], one for each head. Costs O(V U^2).

    >>> ranking_is_static(jnp.array([[[1.0, 2.0], [3.0, 5.0]], [[1.0, 2.0], [5.0, 3.0]]]))
    Array([ True, False], dtype=bool)
    """
    known = jnp.ones(scores.shape[-2:], bool) if adjacency is None else adjacency
    higher = (scores[..., :, None] > scores[..., None, :]) & known[:, :, None] & known[:, None, :]
    higher = jnp.any(higher, axis=-3)
    return ~jnp.any(higher & jnp.swapaxes(higher, -1, -2), axis=(-2, -1))


class GraphAttention(nnx.Module):
    """A layer of :func:`graph_attention` with its projections.

    ::

        y_i = concat (or mean) over heads of  sum over e: j -> i of  softmax_e(score(W_q x_i, W_k c_j, W_f f_e)) W_k c_j  +  b

    Args:
      features: size of the nodes' features.
      num_heads: N.
      head_size: H; by default ``features // num_heads``.
      kind: 'gatv2', 'gat' or 'dpgat'.
      concat: concatenate the heads to N H features, or average them to H.
      self_loops: as in :func:`graph_attention`.
      share_weights: use one projection as W_q and W_k; by default for 'gat', as in its paper.
      context_features: size of the features of sending nodes where these are others.
      edge_size: size of edge features, or None for none.
      slope: of LeakyReLU below zero.
      use_bias: of the output and, but for 'gat', of W_q and W_k. A node that receives nothing gets the bias.
      dropout_rate: of weights.
      rngs: the generator of initial values (Glorot).

    Raises:
      ValueError: an option of a wrong kind.

    >>> layer = GraphAttention(16, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((5, 16)), jnp.array([0, 1, 2]), jnp.array([1, 2, 3])).shape
    (5, 16)
    """

    def __init__(self, features: int, num_heads: int = 1, *, head_size: int | None = None, kind: str = "gatv2", concat: bool = True, self_loops: bool = True,
                 share_weights: bool | None = None, context_features: int | None = None, edge_size: int | None = None, slope: float = 0.2,
                 use_bias: bool = True, dropout_rate: float = 0.0, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        checks.check_choice("kind", kind, KINDS)
        if head_size is None and features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}; or state head_size")
        if kind == "dpgat" and edge_size is not None:
            raise ValueError("edge_size: expected None with kind='dpgat', which takes no edge features")
        shared = kind == "gat" and context_features is None if share_weights is None else share_weights
        if shared and context_features not in (None, features):
            raise ValueError(f"share_weights: expected False where context_features differ from features, got {context_features} and {features}")
        heads = (num_heads, head_size or features // num_heads)
        glorot = nnx.initializers.glorot_uniform()
        self.kind, self.concat, self.self_loops, self.slope = kind, concat, self_loops, slope
        self.dropout_rate = checks.check_dropout_rate(dropout_rate)

        def project(inputs, bias=use_bias and kind != "gat"):
            return nnx.LinearGeneral(inputs, heads, use_bias=bias, kernel_init=glorot, dtype=dtype, param_dtype=param_dtype,
                                     kernel_metadata=logical_axes("embed", "heads", "head_size"), bias_metadata=logical_axes("heads", "head_size"), rngs=rngs)

        self.key = project(context_features or features)
        self.query = nnx.data(None) if shared else project(features)
        self.edge = nnx.data(None) if edge_size is None else project(edge_size, bias=False)
        shape = {"gatv2": heads, "gat": (2 if edge_size is None else 3, *heads), "dpgat": None}[kind]
        each = nnx.initializers.glorot_uniform(batch_axis=0) if kind == "gat" else glorot
        self.vector = nnx.data(None) if shape is None else nnx.Param(each(rngs.params(), shape, param_dtype))
        outputs = heads[0] * heads[1] if concat else heads[1]
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype)) if use_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "V D"], senders: Int[Array, " E"], receivers: Int[Array, " E"], *, context: Float[Array, "U C"] | None = None,
                 edge_features: Float[Array, "E F"] | None = None, edge_mask: Bool[Array, " E"] | None = None, dropout_key: Array | None = None,
                 return_weights: bool = False):
        """Features [V, N H] (or [V, H]) of the nodes.

        Args:
          x: [V, D].
          senders, receivers, edge_mask, return_weights: as in :func:`graph_attention`.
          context: [U, C] of the sending nodes; x by default.
          edge_features: [E, edge_size].
          dropout_key: the key of dropout; None for none.
        """
        if (edge_features is None) != (self.edge is None):
            raise ValueError(f"edge_features: expected {'None, for edge_size is None' if self.edge is None else 'an array [E, edge_size]'}, "
                             f"got {checks.describe(edge_features)}")
        sending = self.key(x if context is None else context)
        receiving = sending if self.query is None and context is None else (self.query or self.key)(x)
        out = graph_attention(receiving, sending, senders, receivers, None if self.vector is None else self.vector[...], kind=self.kind,
                              edge_features=None if self.edge is None else self.edge(edge_features), edge_mask=edge_mask, slope=self.slope,
                              self_loops=self.self_loops, dropout_rate=self.dropout_rate if dropout_key is not None else 0.0, dropout_key=dropout_key,
                              return_weights=return_weights)
        out, weights = out if return_weights else (out, None)
        out = out.reshape(len(out), -1) if self.concat else out.mean(axis=1)
        if self.bias is not None:
            out = out + self.bias[...].astype(out.dtype)
        return (out, weights) if return_weights else out
