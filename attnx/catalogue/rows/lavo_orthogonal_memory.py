"""LAVO."""

import jax
import jax.numpy as jnp

from attnx import linear
from attnx.catalogue.entry import SEEN, Entry, Example, stream

WINDOW = 4


def bases(key):
    """Five directions for each of four heads, not yet orthonormal."""
    return jax.random.normal(key, (4, 5, 8))


def call(case, query, context, bases, seen, rel_bias=None):
    """Windows of four; keys not seen are padding."""
    if case.execution == "step":
        state = linear.lavo_init(*query.shape[::2], 5, query.shape[3], window=WINDOW, dtype=query.dtype)
        return stream(lambda state, *token: linear.lavo_step(state, *token, linear.orthonormal(bases), rel_bias=rel_bias), state, query, context)
    positions = jnp.where(seen, jnp.arange(context.shape[1], dtype=jnp.int32), -1)
    return linear.lavo_attention(query, context, linear.orthonormal(bases), window=WINDOW, rel_bias=rel_bias, causal=case.causal, cross=case.cross,
                                 key_positions=positions, implementation=case.implementation)


ARRAYS = {"query": "btnh", "context": "bsnh", "bases": bases, "seen": SEEN}

def layer(features, num_heads, *, length, rngs):
    """Windows of a quarter of the training length."""
    return linear.LAVO(features, num_heads, num_bases=min(64, features // num_heads), window=max(length // 4, 1), rngs=rngs)


entry = Entry(
    id="lavo-orthogonal-memory",
    objects=(linear.lavo_attention, linear.lavo_step, linear.lavo_init, linear.orthogonal_memory, linear.orthonormal, linear.LAVO),
    equation="""out_t  = softmax over both of (q_t . c_s / sqrt(D) + rel_bias[t - s],  q_t . H[r] / sqrt(D)) of the context c_s and the slots H[r]
s: tokens of t's window of w up to t;      H[r] = b_r * mean over all windows before of <b_r, c>,      b_r orthonormal""",
    claim="It models text that is many times longer than what it was trained on, at a cost in proportion to the length.",
    examples=(
        Example(call, {**ARRAYS, "rel_bias": "nw"}, "btnh", patterns=("causal self",), executions=("reference", "blockwise", "pallas", "step"), mask="seen",
                linear="t", sizes={"w": 4}),
        Example(call, {**ARRAYS, "rel_bias": "nw"}, "btnh", patterns=("noncausal self",), executions=("reference", "blockwise"), mask="seen", linear="t",
                sizes={"w": 7}, name="not causal"),
        Example(call, ARRAYS, "btnh", patterns=("noncausal cross", "noncausal self", "causal self"), mask="seen", linear="t", name="without biases"),
    ),
    notes="Reconstructed from the abstract and public descriptions: windows are aligned, directions are learned and made orthonormal in each call.",
    causal_layer=layer,
)
