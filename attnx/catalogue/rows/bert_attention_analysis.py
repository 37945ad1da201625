"""What does BERT look at?"""

import jax
import jax.numpy as jnp

from attnx import analysis
from attnx.catalogue.entry import Entry, Example, Input

MAPS = Input("bntt", lambda normal: jax.nn.softmax(2 * normal))


def words(case, weights):
    """Words of two pieces each."""
    size = weights.shape[-1]
    return analysis.token_to_word(weights, jnp.arange(size) // 2, size)


def probe(case, weights, coefficients):
    """Logits of the probe: the sentence's ends are its first and last word."""
    ends = jnp.zeros(weights.shape[0], int), jnp.full(weights.shape[0], weights.shape[-1] - 1)
    return (analysis.probe_maps(weights, *ends, 0.5, 1.5) @ coefficients).astype(weights.dtype)


entry = Entry(
    id="bert-attention-analysis",
    objects=(analysis.head_as_parser, analysis.surface_statistics, analysis.head_entropy, analysis.head_distances, analysis.embed_heads,
             analysis.token_to_word, analysis.offset_baseline, analysis.uas_by_relation, analysis.coreference_antecedent, analysis.separator_gradient,
             analysis.probe_maps, analysis.AttentionProbe, analysis.AttentionWordProbe, analysis.WordDistanceProbe, analysis.distance_features),
    equation="""head of word j = argmax over words i != j of a_ji (or a_ij),      words' attention: summed to pieces, averaged from pieces
p(i is the head of j) = softmax_i( sum_k w_k a^k_ji + u_k a^k_ij ),      one weight a map and direction""",
    claim="Single heads find syntactic relations far better than fixed offsets do, heads of one layer behave alike, and all maps together hold much of the tree.",
    examples=(Example(words, {"weights": MAPS}, "bntt", name="between words"),
              Example(probe, {"weights": MAPS, "coefficients": "m"}, "bti", sizes=dict(m=8), name="probe")),
    notes="In the released word probe the vector of the root is one column off; here it is the root's. Attention from a split word is averaged, to it summed.",
)
