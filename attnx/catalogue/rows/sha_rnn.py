"""SHA-RNN."""

import jax.numpy as jnp

from attnx import models
from attnx.catalogue.entry import SEEN, Entry, Example, Input, stream
from attnx.catalogue.modules import parameters, rebuild

FEATURES = 6


def attend(case, query, memory, kernel, bias, norm_scale, norm_bias, query_gate, key_gate, value, seen):
    """The head alone; memory not seen is padding."""
    params = models.SingleHeadParams(kernel, bias, norm_scale, norm_bias, query_gate, key_gate, value)
    positions = jnp.where(seen, jnp.arange(memory.shape[1], dtype=jnp.int32), -1)
    return models.single_head_attention(query, memory, params, query_positions=jnp.arange(query.shape[1], dtype=jnp.int32), key_positions=positions,
                                        is_causal=case.causal, implementation=case.implementation, block_sizes=case.block_sizes)


def make(rngs):
    """A small block."""
    return models.ShaRnnBlock(FEATURES, memory_size=300, rngs=rngs)


def block(case, params, x, seen):
    """The whole block."""
    module = rebuild(make, params)
    if case.execution == "step":
        return stream(module.step, module.init_state(x.shape[0], x.shape[1], dtype=x.dtype), x)
    module.implementation = case.implementation
    return module(x, positions=jnp.where(seen, jnp.arange(x.shape[1], dtype=jnp.int32), -1))


VECTORS = ("bias", "norm_scale", "norm_bias", "query_gate", "key_gate", "value")
entry = Entry(
    id="sha-rnn",
    objects=(models.ShaRnn, models.ShaRnnBlock, models.SingleHead, models.single_head_attention, models.boom, models.value_gate, models.SingleHeadParams),
    equation="""out_i = softmax_j(q_i . k_j / sqrt(D)) v_j,      q = LN(h W_q + b_q) sigmoid(a_q),   k = m sigmoid(a_k),   v = m o,   m = LN(h) of all tokens remembered
h <- LSTM(LN(h)),   h <- LN(h) + out,   h <- LN(h) + boom(LN(h)),      boom(x) = sum of the chunks of gelu(x W + b)""",
    claim="An LSTM with one head of attention in one layer models text nearly as well as with one in every layer, and better than with none.",
    examples=(Example(attend, {"query": "btd", "memory": "bsd", "kernel": "dd", **dict.fromkeys(VECTORS, "d"), "seen": SEEN}, "btd",
                      ("causal self", "noncausal self", "noncausal cross", "causal cross"), ("reference", "blockwise", "pallas", "ring"), "seen",
                      sizes={"d": FEATURES}, name="head"),
              Example(block, {"params": parameters(make), "x": "btd", "seen": Input("bt", lambda normal: normal > -1)}, "btd", ("causal self",),
                      ("reference", "blockwise", "step"), "seen", "finite", sizes={"d": FEATURES}, name="block")),
    notes="What is remembered gets no gradient. A stream finds what one long segment does as long as no more than M tokens went before: later, a segment's last tokens "
          "see up to T tokens more than M. The LSTM has one bias where some libraries have two.",
    causal_layer=lambda features, num_heads, *, length, rngs: models.ShaRnnBlock(features, boom_features=0, rngs=rngs),
)
