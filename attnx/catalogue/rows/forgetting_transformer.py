"""Forgetting attention."""

import jax
import jax.numpy as jnp

from attnx import scores
from attnx.catalogue.entry import SEEN, Entry, Example, Input, stream
from attnx.scores.forgetting_transformer import ForgettingMechanism


def call(case, query, key, value, log_forget, seen):
    """Forget gates between tokens; keys not seen are padding, which forgets nothing."""
    if case.execution == "step":
        mechanism = ForgettingMechanism(query.shape[2])
        state = mechanism.init(query.shape[0], query.shape[1], key.shape[2], key.shape[3], value.shape[3], query.dtype)
        step = lambda state, query, key, value, log_forget: mechanism.step(state, query, key, value, log_forget=log_forget)
        return stream(step, state, query, key, value, log_forget)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return scores.forgetting_attention(query, key, value, log_forget, key_positions=positions, implementation=case.implementation,
                                       block_sizes=case.block_sizes)


entry = Entry(
    id="forgetting-transformer",
    objects=(scores.forgetting_attention, scores.forgetting, scores.ForgettingAttention),
    equation="""out_i = sum over j <= i of softmax_j(q_i . k_j / sqrt(H) + c_i - c_j) v_j
c_t   = sum over l <= t of log f_l,      f = sigmoid(w x + b), one a token and head""",
    claim="Without positions it models text at least as well as a transformer with rotary positions, and loses far less beyond the training length.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "log_forget": Input("bsn", jax.nn.log_sigmoid), "seen": SEEN}, "btnv",
                      patterns=("causal self",), executions=("reference", "blockwise", "pallas", "ring", "step"), mask="seen"),),
    causal_layer=lambda features, num_heads, *, length, rngs: scores.ForgettingAttention(features, num_heads, rngs=rngs),
)
