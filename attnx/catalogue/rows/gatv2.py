"""Graph attention with static and dynamic scores."""

from functools import partial

import jax
import jax.numpy as jnp

from attnx import graph
from attnx.catalogue.entry import SEEN, Entry, Example, Input

NODES, EDGES = 7, 24
NODE = Input("e", lambda normal: jnp.floor(jax.scipy.stats.norm.cdf(normal) * NODES).astype(jnp.int32))


def over_edges(case, query, key, senders, receivers, edge_mask, kind, **arrays):
    """The edges of a random graph."""
    return graph.graph_attention(query, key, senders, receivers, kind=kind, edge_mask=edge_mask, **arrays)


def over_pairs(case, query, key, seen, vector):
    """A complete graph."""
    if case.causal:
        raise NotImplementedError("graph attention knows no order of nodes")
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return graph.dense_graph_attention(query, key, None, vector, key_positions=positions, implementation=case.implementation, block_sizes=case.block_sizes)


def example(kind, **inputs):
    """Attention over edges."""
    inputs = {"query": "vnh", "key": "vnh", "senders": NODE, "receivers": NODE, "edge_mask": Input("e", lambda normal: normal > -1), **inputs}
    return Example(partial(over_edges, kind=kind), inputs, "vnh", mask="edge_mask", linear="e", sizes={"v": NODES, "e": EDGES, "c": 3}, name=kind)


entry = Entry(
    id="gatv2",
    objects=(graph.graph_attention, graph.gatv2_scores, graph.gat_scores, graph.dense_graph_attention, graph.ranking_is_static, graph.GraphAttention),
    equation="""GATv2: s_ij = a . LeakyReLU(q_i + k_j + f_ij)          GAT: s_ij = LeakyReLU(a_q . q_i + a_k . k_j + a_f . f_ij)
out_i = sum over edges j -> i of softmax_j(s_ij) k_j""",
    claim="GAT cannot fit a look-up in which every node asks for another key, however many heads it has; GATv2 does with one.",
    examples=(example("gatv2", vector="nh", edge_features="enh"), example("gat", vector="cnh", edge_features="enh"), example("dpgat"),
              Example(over_pairs, {"query": "btnh", "key": "bsnh", "seen": SEEN, "vector": "nh"}, "btnh", ("noncausal self", "noncausal cross"),
                      ("reference", "blockwise", "ring"), "seen", name="gatv2 over all pairs")),
    notes="The released code gives isolated nodes the output bias; the functions give zeros, and the layer adds its bias to them.",
)
