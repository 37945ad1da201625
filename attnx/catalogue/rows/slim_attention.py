"""Slim attention."""

import jax
import jax.numpy as jnp

from attnx import masks, memory
from attnx.catalogue.entry import SEEN, Entry, Example
from attnx.positions import Rotary


def projections(key):
    """Of a layer of four heads of 8: from keys to values, with a bias."""
    kernel, bias = jax.random.split(key)
    return {"kernel": jax.random.normal(kernel, (32, 4, 6)) / 6, "bias": jax.random.normal(bias, (4, 6))}


def kernels(key):
    """Of keys and values, for two heads, of inputs of size 12."""
    return dict(zip(("key_kernel", "value_kernel"), jax.random.normal(key, (2, 12, 2, 8)) / 4))


def call(case, query, key, projections, seen):
    """Rotary positions, keys kept as they are before these; keys not seen are padding."""
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return memory.slim_attend(query, key, memory.SlimWeights(**projections), option=case.execution, position=Rotary(), key_positions=positions,
                              mask=masks.causal() if case.causal else None)


def call_inputs(case, query, context, kernels, seen):
    """Keys and values of the context's inputs, made or folded into the queries."""
    positions = jnp.where(seen, jnp.arange(context.shape[1], dtype=jnp.int32), -1)
    return memory.x_attend(query, context, **kernels, option=case.execution, key_positions=positions, mask=masks.causal() if case.causal else None)


PATTERNS = ("causal self", "noncausal self", "noncausal cross", "causal cross")

entry = Entry(
    id="slim-attention",
    objects=(memory.slim_attend, memory.slim_from_mha, memory.slim_convert, memory.SlimAttention, memory.x_attend, memory.memory_report),
    equation="""out_i = sum over j of w_ij (k_j W_KV + b),      W_KV = W_K^-1 W_V,      w: softmax attention's""",
    claim="A cache of keys alone is half the size of one of keys and values, with the same outputs and as quick to decode from.",
    examples=(
        Example(call, {"query": "btnh", "key": "bsnh", "projections": projections, "seen": SEEN}, "btnv", patterns=PATTERNS, executions=("early", "late"), mask="seen"),
        Example(call_inputs, {"query": "btnh", "context": "bsd", "kernels": kernels, "seen": SEEN}, "btnh", patterns=PATTERNS,
                executions=("recompute", "folded"), mask="seen", sizes={"d": 12}, name="inputs kept"),
    ),
    notes="Exact where W_K is square and well conditioned; not for grouped heads, where keeping the projections' inputs may help instead.",
)
