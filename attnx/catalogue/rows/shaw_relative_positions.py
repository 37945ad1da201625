"""Relative position representations."""

import jax.numpy as jnp

from attnx import positions
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example, Input, stream
from attnx.core import cache
from attnx.positions.shaw import IMPLEMENTATIONS


def call(case, query, key, value, seen, key_table, value_table):
    """Offsets clipped at 2; keys not seen are masked."""
    if case.execution == "step":
        def step(state, query, key, value):
            start, state = state.next, cache.append(state, key, value)
            return state, positions.relative_attention(query, state.key, state.value, key_table, value_table, is_causal=True,
                                                       query_positions=start[None], key_positions=state.positions)

        return stream(step, cache.init(*query.shape[:2], key.shape[2], key.shape[3], value.shape[3], query.dtype), query, key, value)
    return positions.relative_attention(query, key, value, key_table, value_table, is_causal=case.causal, mask=seen[:, None, None],
                                        implementation=case.execution, block_size=None if case.execution == "reference" else 4)


def by_label(case, query, key, value, seen, kinds, key_table, value_table):
    """Labels of pairs, from -1 (none) to 4."""
    labels = jnp.clip(jnp.round(2 * kinds), -1, 4).astype(jnp.int32)
    mask = seen[:, None, None]
    if case.causal:
        mask &= jnp.arange(key.shape[1]) <= jnp.arange(query.shape[1])[:, None]
    return positions.edge_label_attention(query, key, value, labels, key_table, value_table, mask=mask, implementation=case.execution)


INPUTS = {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN, "key_table": Input("rh"), "value_table": Input("rv")}
entry = Entry(
    id="shaw-relative-positions",
    objects=(positions.relative_attention, positions.edge_label_attention, positions.skew, positions.unskew, positions.RelativePositions,
             positions.RelativeSelfAttention),
    equation="""s_ij  = q_i . (k_j + a^K_r) / sqrt(H),      r = clip(j - i, -c, c) + c
out_i = sum_j softmax_j(s_ij) (v_j + a^V_r)""",
    claim="It does better than absolute positions, which add nothing to it.",
    examples=(Example(call, INPUTS, "btnv", PATTERNS, (*IMPLEMENTATIONS, "step"), "seen", sizes={"r": 5}, name="offsets"),
              Example(by_label, INPUTS | {"kinds": Input("bts", lambda normal: normal)}, "btnv", PATTERNS, IMPLEMENTATIONS[:2], "seen",
                      sizes={"r": 5}, name="labels")),
    notes="Key and value have a table each, which some implementations tie.",
    causal_layer=lambda features, num_heads, *, length, rngs: positions.RelativeSelfAttention(features, num_heads, is_causal=True, rngs=rngs),
)
