"""Lightning attention."""

import jax.numpy as jnp

from attnx import linear
from attnx.catalogue.entry import SEEN, Entry, Example, Input, stream
from attnx.core.linear import init


def call(case, query, key, value, slopes, seen):
    """Constant decays; keys not seen are padding, which is skipped."""
    if case.execution == "step":
        state = init(query.shape[0], slopes.shape[0], key.shape[3], value.shape[3], dtype=jnp.promote_types(query.dtype, jnp.float32))
        return stream(lambda state, *token: linear.lightning_step(state, *token, slopes), state, query, key, value)
    return linear.lightning_attention(query, key, value, slopes, segment_ids=jnp.where(seen, 0, -1), implementation=case.implementation,
                                      chunk_size=4 if case.execution == "chunked" else None)


entry = Entry(
    id="lightning-attention-2",
    objects=(linear.lightning_attention, linear.lightning_step, linear.lightning_slopes, linear.TNLAttention),
    equation="""out_t = sum over s <= t of e^(-slope (t - s)) (q_t . k_s) v_s,      by tiles: pairs within one, the state S = sum k v^T for all before""",
    claim="The time of a token does not grow with the length of the sequence, and long sequences are faster than with all pairs or token by token.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "slopes": Input("n", jnp.abs), "seen": SEEN}, "btnv",
                      patterns=("causal self",), executions=("parallel", "chunked", "recurrent", "pallas", "step"), mask="seen", linear="t"),),
    causal_layer=lambda features, num_heads, *, length, rngs: linear.TNLAttention(features, num_heads, rngs=rngs),
)
