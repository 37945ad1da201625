"""Optimised, efficient and super attention."""

import jax
import jax.numpy as jnp

from attnx import scores
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example, Input, stream
from attnx.catalogue.modules import parameters, rebuild
from attnx.positions import Rotary

LONGEST = 300


def _options(case, context, seen):
    positions = jnp.where(seen, jnp.arange(context.shape[1], dtype=jnp.int32), -1)
    return dict(is_causal=case.causal, key_positions=positions, implementation=case.implementation, block_sizes=case.block_sizes)


def optimised(case, x, context, query_kernel, key_kernel, out_kernel, seen):
    """Keys not seen are padding."""
    return scores.optimised_attention(x, context, context, query_kernel, key_kernel, out_kernel, **_options(case, context, seen))


def efficient(case, x, context, query_kernel, out_kernel, seen):
    """Keys not seen are padding."""
    return scores.efficient_attention(x, context, context, query_kernel, out_kernel, **_options(case, context, seen))


def aligned(case, x, context, query_kernel, out_kernel, alignment, alignment_bias, seen):
    """With a map of the values for each head; keys not seen are padding."""
    return scores.super_attention(x, context, context, query_kernel, out_kernel, alignment, alignment_bias=alignment_bias, **_options(case, context, seen))


def layer(rngs):
    """Causal super attention."""
    made = scores.SuperAttention(16, 4, length=LONGEST, is_causal=True, alignment_bias=True, rngs=rngs)
    made.alignment[...] += 0.1 * jax.random.normal(rngs.params(), made.alignment.shape, made.alignment.dtype)
    return made


def streamed(case, x, params):
    """The layer, whole and token by token."""
    module = rebuild(layer, params)
    return module(x) if case.execution != "step" else stream(module.step, module.init_state(*x.shape[:2], dtype=x.dtype), x)


def fraction(axes):
    """An input of smaller numbers."""
    return Input(axes, lambda normal: normal / 3)


INPUTS = {"x": "btd", "context": "bsd", "query_kernel": fraction("dnh"), "out_kernel": fraction("nhe"), "seen": SEEN}
SIZES = {"h": 4, "e": 16, "l": LONGEST, "m": LONGEST}
ENGINE = ("reference", "blockwise", "pallas", "ring")  # the same for all three; tried in full with the first


def causal_layer(features, num_heads, *, length, rngs):
    """Super attention."""
    return scores.SuperAttention(features, num_heads, length=length, is_causal=True, position=Rotary(), rngs=rngs)


entry = Entry(
    id="optimised-efficient-super-attention",
    objects=(scores.optimised_attention, scores.efficient_attention, scores.super_attention, scores.align_values, scores.optimised_from_mha,
             scores.efficient_from_mha, scores.OptimisedAttention, scores.EfficientAttention, scores.SuperAttention, scores.attention_cost),
    equation="""optimised  out = sum over h of softmax(x_q W_Q,h (x_k W_K,h)^T / sqrt(H)) x_v,(h) W_O,h
efficient  out = sum over h of softmax(x_q W_Q,h x_k,(h)^T / sqrt(H)) x_v,(h) W_O,h
super      efficient, with W_A x_v,(h) in place of x_v,(h)""",
    claim="Three quarters of the weights do as well as all, half of them nearly so, and with a learned map of the values along the sequence better.",
    examples=(Example(optimised, INPUTS | {"key_kernel": fraction("dnh")}, "bte", PATTERNS, ENGINE, "seen",
                      sizes=SIZES, name="optimised"),
              Example(efficient, INPUTS, "bte", PATTERNS, ENGINE[:2], "seen", sizes=SIZES, name="efficient"),
              Example(streamed, {"x": "btd", "params": parameters(layer)}, "btd", ("causal self",), ("reference", "step"), name="super, causal"),
              Example(aligned, INPUTS | {"alignment": fraction("nlm"), "alignment_bias": "l"}, "bte", PATTERNS, ENGINE[:2], "seen",
                      sizes=SIZES, name="super")),
    notes="Exact for one head only, where a merged matrix can be what two were. Super attention is for sequences up to a length known beforehand; in causal use its map "
          "is lower triangular here, as a dense one would tell of the future.",
    causal_layer=causal_layer)
