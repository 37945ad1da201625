"""Localized filtering attention."""

import jax
import jax.numpy as jnp

from attnx import masks, scores
from attnx.catalogue.entry import Entry, Example, Input, stream
from attnx.catalogue.modules import parameters, rebuild
from attnx.mechanism import pairs


def layer(rngs):
    """Four heads of queries and two of keys, two groups of channels."""
    return scores.LocalizedFilteringAttention(16, 4, num_kv_heads=2, groups=2, rngs=rngs)


def filled(key):
    """Its parameters, with biases that are not zero."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x + 0.1 if "filter" in jax.tree_util.keystr(path) else x, parameters(layer)(key))


def call(case, x, seen, params):
    """The layer in the case's execution; tokens not seen are padding."""
    module = rebuild(layer, params)
    module.mechanism = pairs(mask=masks.causal(), implementation=case.implementation)
    if case.execution == "step":
        return stream(module.step, module.init_state(*x.shape[:2], dtype=x.dtype), x)
    return module(x, positions=jnp.where(seen, jnp.arange(x.shape[1], dtype=jnp.int32), -1))


entry = Entry(
    id="localized-filtering-attention",
    objects=(scores.LocalizedFilteringAttention, scores.localized_filter, scores.localized_filter_init, scores.yuan_heads, scores.YuanBlock),
    equation="""c_t = W1a x_(t-1) + W1b x_t + b1,      u_t = W2a c_(t-1) + W2b c_t + b2,      y = RMSNorm(u + x)
out = softmax(rotary(y W_Q) rotary(y W_K)^T / sqrt(H)) x W_V""",
    claim="It models text better than plain attention, also than one whose network is widened by as many parameters.",
    examples=(Example(call, {"x": "btd", "seen": Input("bt", lambda normal: normal > -1), "params": filled}, "btd", patterns=("causal self",),
                      executions=("reference", "blockwise", "pallas", "ring", "step"), mask="seen"),),
    notes="Streaming keeps the last token and what the first convolution made of it, which is right from the first token on.",
    causal_layer=lambda features, num_heads, *, length, rngs: scores.LocalizedFilteringAttention(features, num_heads, rngs=rngs))
