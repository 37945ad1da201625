"""Selective self-attention."""

import jax.numpy as jnp

from attnx import masks, weights
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example, Input, stream
from attnx.catalogue.pairs import EXECUTIONS
from attnx.core.halves import visible_counts
from attnx.positions import Rotary
from attnx.weights.selective_self_attention import SelectivePairs


def call(case, query, key, value, beta, token, value_temperature, seen):
    """Temperatures of tokens and of the number of keys they see; keys not seen are padding."""
    mask = masks.causal() if case.causal else None
    if case.execution == "step":
        mechanism = SelectivePairs(mask=mask)
        state = mechanism.init(query.shape[0], query.shape[1], key.shape[2], key.shape[3], value.shape[3], query.dtype)
        step = lambda state, query, key, value, token: mechanism.step(state, query, key, value, beta=beta, token=token)
        return stream(step, state, query, key, value * value_temperature[..., None], token)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    counts = visible_counts(mask, *query.shape[:2], key.shape[1], key_positions=positions)
    temperature = weights.position_temperature(beta, counts) + token
    return weights.temperature_scaled_attention(query, key, value, temperature, value_temperature, mask=mask, key_positions=positions,
                                                implementation=case.implementation, block_sizes=case.block_sizes)


entry = Entry(
    id="selective-self-attention",
    objects=(weights.SelectiveSelfAttention, weights.temperature_scaled_attention, weights.position_temperature, weights.token_temperature, weights.TokenTemperature),
    equation="""out_i = sum over j of softmax_j(tau_i q_i . k_j / sqrt(H)) tau'_j v_j
tau_i = 1 + c log n_i + tanh f(q_i),      tau'_j = 1 + tanh f'(v_j),      n_i the number of visible keys""",
    claim="Temperatures of positions and tokens improve language models for under half a percent of new parameters, and keep attention from diluting.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "beta": "n", "token": Input("btn", jnp.tanh), "value_temperature": "bsk", "seen": SEEN},
                      "btnv", PATTERNS, EXECUTIONS, "seen"),),
    notes="Hidden size, input and start of the perceptrons, which the paper leaves open: a quarter of the head, the head's own vector, zero.",
    causal_layer=lambda features, num_heads, *, length, rngs: weights.SelectiveSelfAttention(features, num_heads, position=Rotary(), rngs=rngs),
)
