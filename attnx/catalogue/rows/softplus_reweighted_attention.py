"""Length-scaled softplus attention and its re-weighting."""

import math

from attnx import weights
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example
from attnx.catalogue.pairs import EXECUTIONS, attend


def call(case, query, key, value, seen):
    """Re-weighted with a power of 15."""
    query, key = weights.UnitLength()(query, key, None, None)
    return attend(case, query, key, value, seen, weights=weights.lssa(power=15), scale=math.log(query.shape[3]))


entry = Entry(
    id="softplus-reweighted-attention",
    objects=(weights.lssar_attention, weights.lssa, weights.reweight, weights.LengthScaledAttention, weights.UnitLength),
    equation="""a_ij = softplus(log H log n_i q_i . k_j) / sum over j of the same,      |q_i| = |k_j| = 1,  n_i the number of visible keys
w_ij = relu(n_i a_ij - 1)^p / sum over j of the same""",
    claim="Trained on short windows, a model with it loses far less on windows sixteen times longer than one with softmax does, and is as good on short ones.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}, "btnv", PATTERNS, EXECUTIONS, "seen"),),
    notes="Rows that see at most three keys keep all of them; a later row of equal weights keeps these, where the plain formula has 0 / 0.",
    causal_layer=lambda features, num_heads, *, length, rngs: weights.LengthScaledAttention(features, num_heads, rngs=rngs),
)
