"""Infini-attention."""

from functools import partial

import jax.numpy as jnp

from attnx import memory
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.positions import Rotary


def call(case, query, key, value, beta, seen, rule="linear"):
    """Segments of four; tokens not seen are padding."""
    if case.execution == "step":
        state = memory.infini_init(query.shape[0], *key.shape[2:], value.shape[3], segment_length=4, dtype=query.dtype)
        return stream(lambda state, *token: memory.infini_step(state, *token, beta, rule=rule, position=Rotary()), state, query, key, value)
    return memory.infini_attention(query, key, value, beta, segment_length=4, rule=rule, position=Rotary(), segment_ids=jnp.where(seen, 0, -1),
                                   implementation=case.implementation, block_sizes=(2, 2) if case.block_sizes else None)


def layer(features, num_heads, *, length, rngs):
    """Segments of a quarter of the training length, and the delta rule."""
    return memory.InfiniAttention(features, num_heads, segment_length=max(length // 4, 1), rule="delta", position=Rotary(), rngs=rngs)


ARRAYS = {"query": "btnh", "key": "bskh", "value": "bskv", "beta": "n", "seen": SEEN}

entry = Entry(
    id="infini-attention",
    objects=(memory.infini_attention, memory.infini_segment, memory.infini_step, memory.infini_init, memory.memory_retrieve, memory.memory_update,
             memory.InfiniAttention),
    equation="""out = g sigma(Q) M / (sigma(Q) z) + (1 - g) softmax(Q K^T / sqrt(H)) V within the segment,      g = sigmoid(beta), sigma = elu + 1
M  += sigma(K)^T V   or, by the delta rule,   sigma(K)^T (V - what the memory answers to K),      z += sum sigma(K),      after each segment""",
    claim="With a memory of fixed size it recalls what attention within segments has lost, however long ago it was.",
    examples=(
        Example(call, ARRAYS, "btnv", patterns=("causal self",), executions=("reference", "blockwise", "pallas", "step"), mask="seen", linear="t"),
        Example(partial(call, rule="delta"), ARRAYS, "btnv", patterns=("causal self",), executions=("reference", "blockwise", "step"), mask="seen", linear="t",
                name="delta rule"),
    ),
    notes="The gate weighs the memory, as in the paper; a much used port has it the other way round, leaves the first segment without it and starts it at 10.",
    causal_layer=layer,
)
