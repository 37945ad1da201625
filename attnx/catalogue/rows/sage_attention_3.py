"""SageAttention3 and SageBwd."""

from attnx import masks, products
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example

EXECUTIONS = ("reference", "blockwise", "pallas", "ring")


def smoothed(case, query, key, value, seen):
    """What is exact of SageAttention3: means of queries and keys taken out, and put back into scores."""
    return products.sage3_attention(query, key, value, is_causal=case.causal, mask=masks.explicit(seen[:, None, None]), fmt=None, implementation=case.implementation)


def trained(case, query, key, value, seen):
    """SageBwd with products that are not rounded."""
    return products.sagebwd_attention(query, key, value, is_causal=case.causal, mask=masks.explicit(seen[:, None, None]), products=products.Products(),
                                      implementation=case.implementation, tile_sizes=case.block_sizes)


INPUTS = {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}

entry = Entry(
    id="sage-attention-3",
    objects=(products.sage3_attention, products.sagebwd_attention, products.nvfp4, products.mxfp4, products.FP4, products.sagebwd_products, products.smooth_q,
             products.delta_scores, products.quant_nvfp4, products.dequant_nvfp4, products.quant_mxfp4, products.dequant_mxfp4, products.pack_fp4,
             products.unpack_fp4, products.swizzle_scales, products.unswizzle_scales),
    equation="""s_ij  = (~(q_i - qbar_i) . ~(k_j - kbar) + qbar_i . (k_j - kbar)) / sqrt(H),      p_ij = e^(s_ij - m_i)
out_i = sum_j ~(2688 p_ij) ~v_j / (2688 sum_j p_ij)
~ x:    16 codes of 4 bits that share a scale of 8 bits;   qbar: of 128 queries, kbar: of all keys""",
    claim="Attention with 4-bit operands is as good as unrounded once queries and keys are smoothed and weights scaled in two levels; 8-bit products both ways are "
          "lossless in fine-tuning, slower to learn from scratch.",
    examples=(Example(smoothed, INPUTS, "btnv", patterns=PATTERNS, executions=EXECUTIONS[:3], mask="seen", name="smoothed"),
              Example(trained, INPUTS, "btnv", patterns=PATTERNS, executions=EXECUTIONS, mask="seen", name="trained")),
    notes="Examples leave rounding out, which has no slope and looks at neighbours: later and hidden tokens change results by about the rounding error. Emulated bit by "
          "bit on any backend; no kernel has 4-bit matrix units. SageBwd's blocks backward are reconstructed.",
)
