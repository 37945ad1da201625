"""Weighted grouped heads."""

import jax.numpy as jnp

from attnx import mechanism, memory
from attnx.catalogue import pairs
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example, Input
from attnx.masks.causal import causal
from attnx.nn import Attention
from attnx.positions import Rotary


def call(case, query, context, key_kernel, value_kernel, key_weight, value_weight, seen):
    """Two key-value heads combined of four by channel; keys not seen are padding."""
    kernels = memory.weighted_group_kv(key_kernel, value_kernel, key_weight, value_weight, 2, variant="column")
    key, value = (jnp.einsum("bsd,dkh->bskh", context, kernel) for kernel in kernels)
    return pairs.attend(case, query, key, value, seen)


def fraction(axes):
    """An input of smaller numbers."""
    return Input(axes, lambda normal: normal / 3)


def causal_layer(features, num_heads, *, length, rngs):
    """Half as many key-value heads, each combined of two."""
    layer = Attention(features, num_heads, mechanism=mechanism.pairs(mask=causal()), position=Rotary(), rngs=rngs)
    return memory.convert_mha_to_gqa(layer, max(num_heads // 2, 1), variant="column")


entry = Entry(
    id="weighted-gqa",
    objects=(memory.weighted_group_kv, memory.convert_mha_to_gqa, memory.fold_gqa, memory.WeightedGQA),
    equation="""W_K,g = sum over heads h in group g of w_h * W_K,h,      W_V,g likewise;      then grouped attention""",
    claim="Tuned from a multi-head model, it ends better than grouped attention by plain means, and costs the same to decode from.",
    examples=(Example(call, {"query": "btnh", "context": "bsd", "key_kernel": fraction("dnh"), "value_kernel": fraction("dnv"), "key_weight": "nh",
                             "value_weight": "nv", "seen": SEEN}, "btnv", patterns=PATTERNS, executions=pairs.EXECUTIONS, mask="seen"),),
    notes="The released code starts weights at 0.5, the mean for groups of two only, which doubles keys and values for groups of four; here they start at the mean.",
    causal_layer=causal_layer)
