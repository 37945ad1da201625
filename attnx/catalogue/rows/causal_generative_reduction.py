"""Causal reduction."""

import functools

import jax.numpy as jnp

from attnx import mixers
from attnx.catalogue.entry import Entry, Example, Input, stream

SEEN = Input("bt", lambda normal: normal > -1)


def call(case, x, seen, mode):
    """A reduction; tokens not seen are padding."""
    if case.execution == "step":
        return stream(lambda state, x: mixers.causal_reduce_step(state, x, mode), mixers.causal_reduce_init(x.shape[0], x.shape[2], mode, dtype=x.dtype), x)
    return mixers.causal_reduce(x, mode, positions=jnp.where(seen, jnp.arange(x.shape[1], dtype=jnp.int32), -1))


def example(mode):
    """In one mode; without a context a token sees the one before it alone."""
    return Example(functools.partial(call, mode=mode), {"x": "btd", "seen": SEEN}, "btd", ("causal self",), ("parallel", "step"), "seen", local="+" not in mode,
                   linear="t", name=mode)


entry = Entry(
    id="causal-generative-reduction",
    objects=(mixers.CausalReductionMixer, mixers.causal_reduce, mixers.context_vector, mixers.causal_reduce_init, mixers.causal_reduce_step),
    equation="""g_t = min(x_t, x_(t-1)),  or max,  or the mean
y_t = g_t,   or  (g_t + mean of x_1 .. x_t) / 2,   or  min(g_t, x_1, .., x_t)""",
    claim="In place of attention it gives a smaller loss with a smaller model, and the average context lowers it further.",
    examples=(example("min_prev"), example("min_prev+mean")),
    notes="Reconstructed from the abstract and a list of modes: halves for pair and context, and the linear maps around, are this library's choices. The mean over the "
          "whole window is refused where causality is asked for.",
    causal_layer=lambda features, num_heads, *, length, rngs: mixers.CausalReductionMixer(features, "min_prev+mean", rngs=rngs),
)
