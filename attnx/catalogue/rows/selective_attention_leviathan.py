"""Selective attention, of Leviathan and others."""

import jax.numpy as jnp

from attnx import scores
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.positions import Rotary


def call(case, query, key, value, seen):
    """Keys not seen are padding, which has no opinion."""
    if case.execution == "step":
        mechanism = scores.SelectiveMechanism()
        state = mechanism.init(*query.shape[:2], *key.shape[2:], value.shape[3], query.dtype)
        return stream(mechanism.step, state, query, key, value)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return scores.selective_attention(query, key, value, query_positions=positions, key_positions=positions, implementation=case.implementation,
                                      block_size=case.block_sizes and case.block_sizes[0])


entry = Entry(
    id="selective-attention-leviathan",
    objects=(scores.selective_attention, scores.selection_penalty, scores.SelectiveAttention, scores.SelectiveMechanism, scores.prune_cache, scores.memory_loss,
             scores.allocate_budgets),
    equation="""out_i = sum over j <= i of softmax_j(q_i . k_j / sqrt(H) - F_ij) v_j
F_ij  = sum over m < i of relu(q_m . k_j / sqrt(H), one head)  for 0 < j < m""",
    claim="At the same perplexity the context may be pruned to a small part: a cache of 24 keys out of 96 loses next to nothing.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}, "btnv", patterns=("causal self",),
                      executions=("reference", "blockwise", "step"), mask="seen"),),
    notes="The blockwise form makes whole rows of scores, a block of queries at a time; the backward pass keeps one penalty a block and key.",
    causal_layer=lambda features, num_heads, *, length, rngs: scores.SelectiveAttention(features, num_heads, position=Rotary(), rngs=rngs))
