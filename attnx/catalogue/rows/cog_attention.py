"""Cog attention."""

from attnx import analysis, masks, weights
from attnx.catalogue.entry import Entry
from attnx.catalogue.pairs import pairs_example
from attnx.mechanism import pairs
from attnx.nn import Attention
from attnx.positions import Rotary


def causal_layer(features, num_heads, *, length, rngs):
    """With rotary positions."""
    del length
    return Attention(features, num_heads, mechanism=pairs(mask=masks.causal(), weights=weights.cog()), position=Rotary(), rngs=rngs)


entry = Entry(
    id="cog-attention",
    objects=(weights.cog, weights.cogformer_mechanisms, analysis.negative_mass, analysis.layer_cosine_collapse),
    equation="""w_ij = sgn(s_ij) e^|s_ij| / sum_j e^|s_ij|""",
    claim="Weights of either sign let one head do what takes softmax two, and a language model with it is better and keeps its tokens more different.",
    examples=(pairs_example(lambda: dict(weights=weights.cog())),),
    notes="The first and the last layer of a Cogformer keep softmax. A score of exactly 0 has no sign and its key is left out; zero='keep' takes it for positive.",
    causal_layer=causal_layer,
)
