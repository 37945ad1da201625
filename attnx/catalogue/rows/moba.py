"""MoBA."""

import jax.numpy as jnp

from attnx import nn, sparse
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.catalogue.modules import rotary_layer

BLOCK, CHOSEN = 8, 3


def call(case, query, key, value, seen):
    """Three blocks of eight, the own among them; keys not seen are padding."""
    if case.execution == "step":
        mechanism = sparse.moba(BLOCK, CHOSEN)
        state = mechanism.init(query.shape[0], query.shape[1], key.shape[2], key.shape[3], value.shape[3], query.dtype)
        return stream(mechanism.step, state, query, key, value)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return sparse.moba_attention(query, key, value, block_size=BLOCK, num_blocks=CHOSEN, key_positions=positions, implementation=case.implementation)


entry = Entry(
    id="moba",
    objects=(sparse.moba_attention, sparse.moba, sparse.moba_gate, sparse.moba_dispatch, sparse.moba_layers, nn.set_mechanism),
    equation="""chosen(i, n) = own block of i  and  the M - 1 earlier blocks c with the largest  q_in . mean of the keys in c
out_in       = sum over j <= i in chosen(i, n) of  softmax_j(q_in . k_j / sqrt(H)) v_j""",
    claim="It models text as well as full attention at a fraction of the pairs, and switches to full attention and back with the same weights.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}, "btnv", patterns=("causal self",),
                      executions=("reference", "gathered", "pallas", "step"), mask="seen", sizes={"t": 37}, lengths=(1, 6, 24)),),
    notes="Gradients do not flow through the choice. Released code returns full attention where a query attends to its own block alone; here that is local "
          "attention, as published.",
    causal_layer=rotary_layer(lambda length, num_heads: sparse.moba(max(length // 16, 1), 3)),
)
