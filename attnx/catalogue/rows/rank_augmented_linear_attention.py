"""Rank-augmented linear attention."""

from attnx import linear, models, positions
from attnx.catalogue.entry import Entry, Example, Input


def call(case, query, key, value, seen):
    """Tokens of images five wide; those not seen are not there."""
    return linear.rala(query, key, value, position=positions.AxialRotary(width=5), mask=seen, implementation=case.implementation)


def plain(case, query, key, value, seen):
    """Without weights of tokens or positions."""
    return linear.rala(query, key, value, augment_kv=False, mask=seen, implementation=case.implementation)


ARRAYS = {"query": "btnh", "key": "btkh", "value": "btkv", "seen": Input("bt", lambda normal: normal > -1)}

entry = Entry(
    id="rank-augmented-linear-attention",
    objects=(linear.rala, linear.token_weights, linear.RALA2d, linear.RavltBlock, linear.SoftmaxModulated2d, models.RAVLT, models.RAVLTConfig, linear.kv_rank,
             linear.output_rank, positions.axial_rotary, positions.AxialRotary),
    equation="""y_n = rope(phi(q_n)) . sum over m of e_m rope(phi(k_m)) v_m^T / (phi(q_n) . sum over m of e_m phi(k_m)),      phi = elu + 1
e   = N softmax over tokens of mean phi(q) . phi(k) / sqrt(H);      layer: W ((y + dwconv(v)) * o),      o linear in the input""",
    claim="Weighing the tokens and multiplying by the input raise the rank of linear attention's outputs, and with it the accuracy towards softmax attention's.",
    examples=(
        Example(call, ARRAYS, "btnv", patterns=("noncausal self",), executions=("parallel", "chunked"), mask="seen", linear="t"),
        Example(plain, ARRAYS, "btnv", patterns=("noncausal self",), executions=("parallel", "chunked"), mask="seen", linear="t", name="plain"),
    ),
    notes="Attention within an image; there is no causal form. With positions its weights may be negative, the denominator is not.",
)
