"""Attention in eight bits."""

import jax.numpy as jnp

from attnx import masks, products
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example, Input
from pallas_kernels.quantised import formats

INTEGERS = Input("btnh", lambda normal: jnp.int32(40 * normal))


def _attend(case, query, key, value, seen, **options):
    return products.sage_attention(query, key, value, mask=masks.explicit(seen[:, None, None, :]), tile_sizes=case.block_sizes,
                                   implementation=case.implementation, **options)


def smoothed(case, query, key, value, seen):
    """Nothing is rounded: keys without their mean."""
    return _attend(case, query, key, value, seen, is_causal=case.causal, scores=None)


def codes(case, query, key, value, seen):
    """Causal, queries and keys at a scale a token, from integers: what is rounded has no slope to be held against differences."""
    query, key = (jnp.sin(x.astype(value.dtype)) for x in (query, key))
    return _attend(case, query, key, value, seen, is_causal=True, scores="token", smooth_k=False)


entry = Entry(
    id="sage-attention",
    objects=(products.sage_attention, products.choose_kernel_per_layer, formats.quant_int8, formats.smooth_k, formats.error_metrics),
    equation="""out = softmax(scale_q scale_k (codes of q . codes of k') / sqrt(H)) v,    k' = k - mean over tokens of k
codes = round(x / scale),    scale = max |x| / 127: one scale for 128 queries and for 64 keys, or one a token""",
    claim="Int8 products of queries and keys leave the outputs of trained models nearly as they were once keys have lost their mean, and are more accurate than 8-bit "
          "floating point, at twice the rate of 16 bits.",
    examples=(
        Example(smoothed, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}, "btnv", patterns=PATTERNS,
                executions=("reference", "blockwise"), mask="seen", name="smoothed keys"),
        Example(codes, {"query": INTEGERS, "key": INTEGERS._replace(axes="btkh"), "value": "btkv", "seen": SEEN._replace(axes="bt")}, "btnv", patterns=("causal self",),
                executions=("reference", "blockwise", "pallas"), mask="seen", name="int8 by token"),
    ),
    notes="Means and scales are those of a whole sequence or block, so a causal mask keeps the future out of the weights but not out of their rounding; scales a token "
          "and keys as they are ('token', smooth_k=False) keep it out altogether. Weights in int8 are rounded relative to the largest score of the tiles so far.",
)
