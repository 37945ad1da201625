"""Global and local attention of recurrent decoders."""

import jax.numpy as jnp

from attnx import alignment
from attnx.catalogue.entry import SEEN, Entry, Example, Input
from attnx.catalogue.modules import parameters, rebuild

VOCABULARY, FEATURES = 7, 6


def look(case, query, source, kernel, vector, seen):
    """Global attention with concat scores."""
    if case.causal:
        raise NotImplementedError("the source is read whole")
    return alignment.luong_global_attention(query, source, kind="concat", kernel=kernel, vector=vector, mask=seen)


def look_nearby(case, query, source, kernel, vector, seen):
    """Local-p attention with dot scores."""
    centre = alignment.predicted_centre(query, kernel, vector, seen.sum(1))
    return alignment.luong_local_attention(query, source, centre, reach=2, sigma=1.0, mask=seen, implementation=case.implementation)


def make(rngs):
    """A small decoder without input feeding."""
    return alignment.LuongDecoder(VOCABULARY, FEATURES, num_layers=2, input_feeding=False, mode="local-m", reach=3, source_features=4, rngs=rngs)


def decode(case, params, tokens, source, seen):
    """The decoder's attentional hidden states."""
    decoder = rebuild(make, params)
    return decoder.hidden(tokens, source, mask=seen, implementation=case.implementation)


SOURCE = {"source": "bse", "seen": SEEN}
entry = Entry(
    id="luong-global-local-attention",
    objects=(alignment.LuongDecoder, alignment.LuongAttention, alignment.luong_global_attention, alignment.luong_local_attention, alignment.luong_scores,
             alignment.predicted_centre, alignment.attentional_hidden),
    equation="""a_t(s) = softmax_s(score(h_t, h_s))  [times exp(-(s - p_t)^2 / (2 sigma^2)) in a window around p_t],    c_t = sum_s a_t(s) h_s
h~_t   = tanh(W_c [c_t; h_t]),    p_t = t  or  S sigmoid(v . tanh(W h_t))""",
    claim="Attention beats none in sequence transduction, and local attention with a predicted centre is at least as good as with a fixed one, at a cost "
          "per step that does not depend on the length of the source.",
    examples=(
        Example(look, {"query": "btd", "kernel": "zx", "vector": "x", **SOURCE}, "bte", patterns=("noncausal cross", "noncausal self"), mask="seen",
                sizes={"d": 6, "e": 4, "z": 10, "x": 5}, name="global, concat"),
        Example(look_nearby, {"query": "bte", "kernel": "ex", "vector": "x", **SOURCE}, "bte", executions=("reference", "gathered"), mask="seen",
                sizes={"e": 4, "x": 5}, linear="t", name="local-p, dot"),
        Example(decode, {"params": parameters(make), "tokens": Input("bt", lambda normal: jnp.int32(jnp.abs(normal) * 3) % VOCABULARY), **SOURCE}, "btf",
                executions=("recurrent", "parallel"), mask="seen", empty="finite", sizes={"e": 4}, name="decoder, local-m"),
    ),
    notes="The number of source words S of local-p is that of the words that are there, not the padded length. Where a window holds none, nothing is found.",
)
