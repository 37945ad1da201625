"""Efficient attention."""

import jax.numpy as jnp

from attnx import linear
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.catalogue.modules import parameters, rebuild
from attnx.nn.attention import Attention


def call(case, query, key, value, seen, norm="softmax"):
    """Whole sequences; keys not seen are padding."""
    if case.causal:
        raise NotImplementedError("efficient_attention is not causal; efficient_attention_causal is")
    return linear.efficient_attention(query, key, value, norm=norm, key_positions=jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1),
                                      implementation=case.implementation)


def scaled(case, **inputs):
    """With norm='scale'."""
    return call(case, norm="scale", **inputs)


def causal(case, query, key, value, seen):
    """Each token's past."""
    if case.execution == "step":
        state = linear.efficient_init(query.shape[0], *key.shape[2:], value.shape[3], dtype=jnp.promote_types(query.dtype, jnp.float32))
        return stream(linear.efficient_step, state, query, key, value)
    if not case.causal:
        raise NotImplementedError("efficient_attention_causal is causal; efficient_attention is not")
    return linear.efficient_attention_causal(query, key, value, key_positions=jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1),
                                             implementation=case.implementation, chunk_size=4 if case.execution == "chunked" else None)


def make(rngs):
    """A module for maps of six channels."""
    return linear.EfficientAttention2d(6, key_channels=8, value_channels=4, num_heads=2, rngs=rngs)


def layer(features, num_heads, *, length, rngs):
    """Causal, without positions."""
    return Attention(features, num_heads, mechanism=linear.position_softmax(), rngs=rngs)


ARRAYS = {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}
WHOLE = ("noncausal self", "noncausal cross")

entry = Entry(
    id="efficient-attention-linear",
    objects=(linear.efficient_attention, linear.efficient_attention_causal, linear.efficient_step, linear.EfficientAttention2d, linear.position_softmax_attention),
    equation="""out = rho_q(Q) (rho_k(K)^T V),      rho_q: softmax over channels, rho_k: softmax over positions;  or both divide by sqrt(n)""",
    claim="In place of attention between all pixels it restores images as well, with memory linear in the pixels.",
    examples=(
        Example(call, ARRAYS, "btnv", WHOLE, ("parallel", "chunked"), "seen", linear="t"),
        Example(causal, ARRAYS, "btnv", ("causal self",), ("parallel", "chunked", "step"), "seen", linear="t", name="causal"),
        Example(scaled, ARRAYS, "btnv", WHOLE, ("parallel", "chunked"), "seen", linear="t", name="scaled"),
        Example(lambda case, params, x: rebuild(make, params)(x), {"params": parameters(make), "x": "bhwc"}, "bhwc", linear="h", sizes={"h": 3, "w": 4, "c": 6},
                name="of maps")),
    causal_layer=layer,
    notes="The causal form is an extension, the same operator as causal Latte with as many latents as channels.",
)
