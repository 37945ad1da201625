"""Softpick."""

from attnx import analysis, weights
from attnx.catalogue.entry import Entry
from attnx.catalogue.modules import rotary_layer
from attnx.catalogue.pairs import pairs_example
from attnx.masks.causal import causal
from attnx.mechanism import pairs

entry = Entry(
    id="softpick",
    objects=(weights.softpick, analysis.sink_rate, analysis.activation_kurtosis, analysis.sparsity),
    equation="""w_ij = relu(e^s_ij - 1) / sum_j |e^s_ij - 1|""",
    claim="A language model with it has no attention sinks and far fewer massive activations than with softmax, many exact zeros, and as low a loss.",
    examples=(pairs_example(lambda: dict(weights=weights.softpick())),),
    notes="A row whose scores are all zero weighs nothing and has zero gradients; the released code adds 1e-8 to the denominator instead.",
    causal_layer=rotary_layer(lambda length, num_heads: pairs(mask=causal(), weights=weights.softpick())),
)
