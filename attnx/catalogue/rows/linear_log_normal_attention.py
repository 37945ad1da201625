"""Linear log-normal attention."""

import jax.numpy as jnp

from attnx import analysis, linear
from attnx.catalogue.entry import SEEN, Entry, Example, Input, stream
from attnx.positions import Rotary


def call(case, query, key, value, alpha, beta, seen):
    """Exponential features; keys not seen are left out."""
    if case.execution == "step":
        state = linear.lln_init(query.shape[0], *key.shape[2:], value.shape[3], dtype=query.dtype)
        return stream(lambda state, *token: linear.lln_step(state, *token, alpha, beta), state, query, key, value)
    return linear.lln_attention(query, key, value, alpha, beta, is_causal=case.causal, key_mask=seen, implementation=case.implementation,
                                chunk_size=4 if case.execution == "chunked" else None)


def mixed(case, query, key, value, alpha, beta, r, p, seen):
    """With softmax attention in blocks of five."""
    return linear.lln_diag(query, key, value, alpha, beta, mode="learnable_scale", mix=(r, p), block=5, is_causal=case.causal, key_mask=seen,
                           implementation=case.implementation)


def layer(features, num_heads, *, length, rngs):
    """LLN + Diag with normalised queries and keys, whose deviations are known to be 1."""
    return linear.LLNAttention(features, num_heads, qk_norm="rms", position=Rotary(), rngs=rngs)


temperature = lambda normal: 1 + jnp.abs(normal)
ARRAYS = {"query": "btnh", "key": "bskh", "value": "bskv", "alpha": Input("n", temperature), "beta": Input("k", temperature), "seen": SEEN}

entry = Entry(
    id="linear-log-normal-attention",
    objects=(linear.lln_attention, linear.lln_step, linear.lln_init, linear.moment_match, linear.fit_moment_constants, linear.block_diag_attention, linear.lln_diag,
             linear.LLNAttention, analysis.log_variance, analysis.row_entropy, analysis.spectral_gap),
    equation="""w_ij = e^(alpha q_i) . e^(beta k_j) / sum over j,      alpha sigma_q = beta sigma_k = sqrt((sigma_q^2 sigma_k^2 - b) / (2 a)),      with a, b
so that the weights have the log-variance sigma_q^2 sigma_k^2 that softmax gives them""",
    claim="Of linear attentions it is nearest to softmax in the entropy of its weights, and it models better than they do, best with softmax in blocks beside it.",
    examples=(
        Example(call, ARRAYS, "btnv", patterns=("causal self", "noncausal self", "noncausal cross"),
                executions=("parallel", "chunked", "recurrent", "pallas", "step"), mask="seen", linear="t"),
        Example(mixed, {**ARRAYS, "r": "nv", "p": "nv"}, "btnv", patterns=("causal self", "noncausal self"), executions=("parallel", "chunked"), mask="seen", linear="t",
                name="with blocks"),
    ),
    notes="Deviations are kept unless statistics='batch' or 'head', which see all of the batch. The published constants fit heads of 64: see fit_moment_constants.",
    causal_layer=layer,
)
