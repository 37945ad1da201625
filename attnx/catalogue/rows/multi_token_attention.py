"""Multi-token attention."""

import jax.numpy as jnp
from flax import nnx

from attnx import scores
from attnx.catalogue.entry import SEEN, Entry, Example, Input, stream
from attnx.positions import Rotary


def call(case, query, key, value, seen, **kernels):
    """Convolutions of two queries and three keys before and after the softmax, heads mixed in pairs; keys not seen are padding."""
    mixing = scores.Mixing(**kernels)
    if case.execution == "step":
        mechanism = scores.MultiTokenMechanism(query.shape[2])
        for name, kernel in kernels.items():
            setattr(mechanism, name, nnx.data(nnx.Param(kernel)))
        state = mechanism.init(*query.shape[:2], *key.shape[2:], value.shape[3], query.dtype)
        return stream(mechanism.step, state, query, key, value)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return scores.multi_token_attention(query, key, value, mixing, positions=positions, implementation=case.implementation,
                                        block_size=case.block_sizes and case.block_sizes[0])


KERNELS = {"score_kernel": "nqc", "score_mix": Input("gio", lambda x: x / 2), "weight_kernel": "nqc", "weight_mix": "gio"}

entry = Entry(
    id="multi-token-attention",
    objects=(scores.multi_token_attention, scores.Mixing, scores.key_query_conv, scores.head_mix, scores.identity_kernel, scores.identity_mix,
             scores.MultiTokenAttention, scores.MultiTokenMechanism),
    equation="""S' = mix(conv(q k^T / sqrt(H), zero where not seen)),      A = softmax(S'),      out = mix(conv(A)) v
conv(S)_ij = sum over 0 <= a < c_q, |b| <= h of theta[c_q - 1 - a, h + b] S_(i-a, j+b)""",
    claim="It finds the block that holds all of several letters, where attention to one token at a time fails half the time.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN, **KERNELS}, "btnv", patterns=("causal self",),
                      executions=("reference", "blockwise", "step"), mask="seen", sizes={"q": 2, "c": 3, "g": 2, "i": 2, "o": 2}),),
    notes="The blockwise form makes whole rows of scores, a block of queries at a time with the few rows before it.",
    causal_layer=lambda features, num_heads, *, length, rngs: scores.MultiTokenAttention(features, num_heads, weight_mix=num_heads, position=Rotary(), rngs=rngs))
