"""Cottention."""

from attnx import linear
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.positions import Rotary


def attend(case, query, key, value, m, seen, is_causal=None, **options):
    """Sums of cosines; keys not seen are not counted."""
    if case.execution == "step":
        state = linear.cosine_attention_init(query.shape[0], *key.shape[2:], value.shape[3], dtype=query.dtype)
        return stream(lambda state, *token: linear.cosine_attention_step(state, *token, m, **options), state, query, key, value)
    is_causal = case.causal if is_causal is None else is_causal
    return linear.cosine_linear_attention(query, key, value, m, is_causal=is_causal, key_mask=seen, implementation=case.implementation,
                                          chunk_size=4 if case.execution == "chunked" else None, **options)


def by_query(case, **arrays):
    """As written: each sum divided by a power of its number of tokens."""
    return attend(case, **arrays, is_causal=True, norm_by="query")


ARRAYS = {"query": "btnh", "key": "bskh", "value": "bskv", "m": "k", "seen": SEEN}

entry = Entry(
    id="cottention",
    objects=(linear.cosine_linear_attention, linear.cosine_attention_step, linear.cosine_attention_init, linear.CottentionAttention),
    equation="""o_t = sum over s <= t of cos(q_t, k_s) v_s / s^g,      g = sigmoid(m), one number a head;      not causal: over all n tokens, / n^g""",
    claim="A language model with it is nearly as good as with softmax, in memory that grows with the length rather than its square.",
    examples=(
        Example(attend, ARRAYS, "btnv", patterns=("causal self", "noncausal self", "noncausal cross"),
                executions=("parallel", "chunked", "recurrent", "pallas", "step"), mask="seen", linear="t"),
        Example(by_query, ARRAYS, "btnv", patterns=("causal self",), executions=("parallel", "chunked", "step"), mask="seen", linear="t", name="by query"),
    ),
    notes="Values are divided as the released decoder does unless norm_by='query', which is the formula as usually written; padding is never counted.",
    causal_layer=lambda features, num_heads, *, length, rngs: linear.CottentionAttention(features, num_heads, position=Rotary(), rngs=rngs),
)
