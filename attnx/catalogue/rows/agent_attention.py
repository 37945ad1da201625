"""Agent attention."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import linear
from attnx.catalogue.entry import SEEN, Entry, Example
from attnx.catalogue.modules import rebuild


def call(case, query, key, value, agents, bias_in, bias_out, seen):
    """Three agents with biases; keys not seen are padding."""
    if case.causal:
        raise NotImplementedError("agents see all keys")
    return linear.agent_attention(query, key, value, agents, bias_in=bias_in, bias_out=bias_out,
                                  key_positions=jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1), implementation=case.implementation,
                                  block_sizes=case.block_sizes)


def patch(case, query, key, value, seen):
    """In place of softmax attention, with a quarter as many agents as tokens."""
    if case.causal:
        raise NotImplementedError("agents see all keys")
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return linear.agent_patch(0.25, implementation=case.implementation)(query, key, value, query_positions=positions, key_positions=positions)


@functools.cache
def maker(implementation=None):
    """Of small layers for images of 3 by 4 tokens and a class token."""
    return lambda rngs: linear.AgentAttention(16, 4, grid=(3, 4), agents=4, cls_token=True, implementation=implementation, rngs=rngs)


def parameters(key):
    """Larger than at the start of a training, so that biases matter."""
    leaves, structure = jax.tree.flatten(nnx.state(maker()(nnx.Rngs(0))))
    return jax.tree.unflatten(structure, [0.3 * jax.random.normal(key, x.shape) for key, x in zip(jax.random.split(key, len(leaves)), leaves)])


entry = Entry(
    id="agent-attention",
    objects=(linear.agent_attention, linear.AgentAttention, linear.agent_patch, linear.pool_agents),
    equation="""U   = softmax(A K^T / sqrt(H) + b_in) V,           A: queries pooled to M agents
out = softmax(Q A^T / sqrt(H) + b_out) U + DWC(V)""",
    claim="It classifies images better than softmax attention at a fraction of its cost, and speeds up trained models without training.",
    examples=(
        Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "agents": "bmnh", "bias_in": "nms", "bias_out": "ntm", "seen": SEEN}, "btnv",
                ("noncausal self", "noncausal cross"), ("reference", "blockwise", "pallas"), "seen", linear="t", sizes={"m": 3}),
        Example(patch, {"query": "btnh", "key": "bsnh", "value": "bsnh", "seen": SEEN}, "btnh", ("noncausal self",), ("reference", "blockwise", "pallas"), "seen",
                "finite", name="training-free", lengths=(1, 3)),
        Example(lambda case, params, x: rebuild(maker(case.implementation), params)(x), {"params": parameters, "x": "bpd"}, "bpd",
                executions=("reference", "blockwise"), sizes={"p": 13}, name="layer")),
    notes="Agents without training are means of contiguous queries, where the released diffusion code merges similar tokens.",
)
