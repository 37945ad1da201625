"""FAST."""

from functools import partial

from attnx import linear, weights
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.positions import Rotary


def factored(case, query, key, value, seen, is_causal=None, **options):
    """Linear attention of Taylor features; keys not seen are left out."""
    if case.execution == "step":
        state = linear.fastmax_init(query.shape[0], *key.shape[2:], value.shape[3], order=options["order"], dtype=query.dtype)
        return stream(lambda state, *token: linear.fastmax_step(state, *token, **options), state, query, key, value)
    is_causal = case.causal if is_causal is None else is_causal
    return linear.fastmax_attention(query, key, value, is_causal=is_causal, key_mask=seen, form="factored", implementation=case.implementation,
                                    chunk_size=4 if case.execution == "chunked" else None, **options)


def over_largest(case, query, key, value, seen):
    """Divided by the largest norms of what is seen."""
    return factored(case, query, key, value, seen, order=2, normalize="maxnorm", query_mask=None if case.cross else seen)


def quadratic(case, query, key, value, seen, **options):
    """The same weights of all pairs."""
    return linear.fastmax_attention(query, key, value, is_causal=case.causal, key_mask=seen, form="quadratic", implementation=case.implementation,
                                    block_sizes=case.block_sizes, **options)


ARRAYS = {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}
UNORDERED = ("noncausal cross", "noncausal self")

entry = Entry(
    id="fastmax",
    objects=(linear.fastmax_attention, linear.fastmax_step, linear.fastmax_init, linear.FastmaxAttention, linear.Taylor, linear.symmetric_monomials, weights.taylor),
    equation="""out_i = sum over j of f(s_ij) v_j / sum over j of f(s_ij),      f(s) = 1 + s + s^2 / 2,      s = scale norm(q) . norm(k)""",
    claim="At a cost linear in the length it models as well as softmax attention does, better in order 2 than in order 1.",
    examples=(
        Example(partial(factored, order=2), ARRAYS, "btnv", patterns=("causal self", *UNORDERED),
                executions=("parallel", "chunked", "recurrent", "pallas", "step"), mask="seen", linear="t"),
        Example(partial(factored, order=1, is_causal=True), ARRAYS, "btnv", patterns=("causal self",), executions=("parallel", "chunked", "step"), mask="seen",
                linear="t", name="first order"),
        Example(over_largest, ARRAYS, "btnv", patterns=UNORDERED, executions=("parallel", "chunked"), mask="seen", linear="t",
                name="maxnorm"),
        Example(partial(quadratic, order=2), ARRAYS, "btnv", patterns=("causal self", *UNORDERED), executions=("reference", "blockwise", "pallas", "ring"),
                mask="seen", name="quadratic"),
    ),
    notes="Which normalisation the paper means is not certain; all three that it and its code suggest are offered, none of which sees the future where it is causal.",
    causal_layer=lambda features, num_heads, *, length, rngs: linear.FastmaxAttention(features, num_heads, position=Rotary(), rngs=rngs),
)
