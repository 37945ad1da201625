"""Attention whose heads can do nothing: clipped softmax, and gates."""

from functools import partial

from attnx import analysis, weights
from attnx.catalogue.entry import Entry, Example, Input
from attnx.catalogue.modules import rotary_layer
from attnx.catalogue.pairs import pairs_example
from attnx.masks.causal import causal
from attnx.mechanism import pairs


def gated(case, found, x, gate, seen=None, **options):
    """The gates of what heads found, a head's mean being over the tokens that are ``seen``."""
    return weights.gated_attention(found, x, gate, where=seen, **options)


def _gate(name, **options):
    inputs = {"found": "btnv", "x": "btd", "gate": lambda key: weights.init_gate(key, 16, 4, initial=0.25, **options)}
    return inputs, partial(gated, **options), f"gated, {name}"


entry = Entry(
    id="quantizable-attention",
    objects=(weights.gated_attention, weights.clipped_softmax, weights.init_gate, weights.HeadGate, weights.GatedAttention,
             analysis.fake_quantize, analysis.quantize_weights, analysis.calibrate, analysis.quantized, analysis.max_inf_norm),
    equation="""clipped: w_ij  = clip((zeta - gamma) softmax(s)_ij + gamma, 0, 1),      gamma <= 0, zeta >= 1
gated:   out_tn = sigmoid(G_n(x_t)) sum_j softmax(s)_tj v_j""",
    claim="Either keeps activations free of outliers, so that a model quantised to 8 bits is as good as before, which one with plain softmax is not.",
    examples=(
        pairs_example(lambda: dict(weights=weights.clipped_softmax(gamma=-0.08, zeta=1.1)), name="clipped"),
        *(Example(call, inputs, "btnv", linear="t", name=name) for inputs, call, name in (_gate("linear"), _gate("mlp", predictor="mlp"))),
        *(Example(call, inputs | {"seen": Input("bt", lambda normal: normal > -1)}, "btnv", mask="seen", empty="finite", linear="t", name=name)
          for inputs, call, name in (_gate("by head", kind="per_head"),))),
    notes="Gates by head average over tokens that are no padding, where the released code counts padding; all predictors can start at a given gate.",
    causal_layer=rotary_layer(lambda length, num_heads: pairs(mask=causal()), weights.GatedAttention),
)
