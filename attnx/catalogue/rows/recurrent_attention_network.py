"""Recurrent attention networks."""

import functools

import jax.numpy as jnp
from flax import nnx

from attnx import memory
from attnx.catalogue.entry import Entry, Example, Input, stream
from attnx.catalogue.modules import parameters, rebuild

FEATURES = 6


def _make(attn_mask, rngs):
    return memory.RAN(FEATURES, 2, head_size=4, window_size=4, min_window=0 if attn_mask == "causal" else 2, attn_mask=attn_mask,
                      cell_init=nnx.initializers.normal(1.0), rngs=rngs)


MAKE = {attn_mask: functools.partial(_make, attn_mask) for attn_mask in ("none", "causal")}


def call(case, params, x, seen, attn_mask):
    """Reviewed tokens of a text read in windows of four."""
    if case.causal != (attn_mask == "causal"):
        raise NotImplementedError("attn_mask says whether a layer is causal")
    layer = rebuild(MAKE[attn_mask], params)
    if case.execution == "step":
        return stream(layer.step, layer.init_state(x.shape[0], x.shape[1], dtype=x.dtype), x)
    layer.implementation = case.implementation
    return layer(x, positions=jnp.where(seen, jnp.arange(x.shape[1], dtype=jnp.int32), -1))


def example(attn_mask, pattern, executions):
    """A layer with this mask."""
    inputs = {"params": parameters(MAKE[attn_mask]), "x": "btd", "seen": Input("bt", lambda normal: normal > -1)}
    return Example(functools.partial(call, attn_mask=attn_mask), inputs, "btd", (pattern,), executions, "seen", "finite", sizes={"d": FEATURES},
                   name=f"attn_mask={attn_mask!r}")


def layer(features, num_heads, *, length, rngs):
    """A decoder's, with windows of an eighth of the length that is trained on, at least 16 tokens."""
    return memory.RAN(features, num_heads, head_size=max(features // num_heads, 1), window_size=max(length // 8, 16), min_window=0, attn_mask="causal",
                      dropout_rate=0.0, rngs=rngs)


entry = Entry(
    id="recurrent-attention-network",
    objects=(memory.RAN, memory.RanNet, memory.SwishAttention, memory.GatedUnit, memory.document_windows, memory.second_moment_norm),
    equation="""z = LN([c_(n-1); X_n]),    u = LN(MHA(z) + GLU(z)),    r_n = s(u_0),    tokens = s(u_1 ..),    c_n = LN(r_n + GLU(r_(n-1)))
tokens <- LN(attention of tokens to r_1 .. r_N + GLU(q)),      s(y) = (y - mean y) / sqrt(mean y^2 + 1e-7)""",
    claim="Windows that hand on a cell understand long texts about as well as attention over the whole text, where windows by themselves fail.",
    examples=(example("none", "noncausal self", ("reference", "blockwise")), example("causal", "causal self", ("reference", "blockwise", "step"))),
    notes="In its causal form the cell reads its whole window and the review ends with the window before; what is released under that name cuts the cell off from the "
          "window. Windows are those of the padded length: a window of padding alone is as if it were not there.",
    causal_layer=layer,
)
