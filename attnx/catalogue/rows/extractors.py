"""Extractors."""

import functools

import jax.numpy as jnp

from attnx import mixers
from attnx.catalogue.entry import Entry, Example, Input, stream

SEEN = Input("bt", lambda normal: normal > -1)
EXTRACT = {"SHE": mixers.extractor_she, "HE": mixers.extractor_he, "WE": mixers.extractor_we, "ME": mixers.extractor_me}


def call(case, x, seen, kind, index, **params):
    """An extractor; tokens not seen are padding."""
    params = mixers.ExtractorParams(**params)
    options = dict(index=index, scale="rsqrt_count")
    if case.execution == "step":
        step = lambda state, x: mixers.extractor_step(state, x, params, **options)
        return stream(step, mixers.extractor_init(params, x.shape[0], index=index, dtype=x.dtype), x)
    positions = jnp.where(seen, jnp.arange(x.shape[1], dtype=jnp.int32), -1)
    return EXTRACT[kind](x, params, positions=positions, implementation=case.execution if index == "relative" else None, **options)


def example(kind, weights, index="relative", mixing=False):
    """Of 16 lags or places."""
    inputs = {"x": "btd", "seen": SEEN, "weights": weights, "adjustment": "dd"} | ({"mixing": "dd"} if mixing else {})
    return Example(functools.partial(call, kind=kind, index=index), inputs, "btd", ("causal self",),
                   ("direct", "fft", "step") if index == "relative" else ("reference", "step"), "seen", linear="t", sizes={"d": 6, "l": 16}, name=f"{kind}, {index}")


entry = Entry(
    id="extractors",
    objects=(mixers.Extractor, mixers.extractor_she, mixers.extractor_he, mixers.extractor_we, mixers.extractor_me, mixers.ExtractorParams,
             mixers.extractor_init, mixers.extractor_step),
    equation="""y_t = e_t * (x_t A),      e_t = sum over i <= t of   x_i W_r (SHE),   (x_i W_0) * w_r (HE),   w_r (x_i W_0) (WE),   w_r x_i (ME)
r   = t - i, the lag, or i, the place""",
    claim="With weights that do not depend on content, the largest of them models text better than self-attention, and the smaller ones about as well for less.",
    examples=(example("SHE", "ldd"), example("HE", "ld", mixing=True), example("HE", "ld", "absolute", mixing=True)),
    notes="How the four divide is reconstructed from the abstract; by lag is this library's default, by place that of a public port. Beyond L lags nothing is seen. A "
          "layer of L matrices has L D^2 parameters, so the decoder's sublayer given here is HE, which has a vector a lag.",
    causal_layer=lambda features, num_heads, *, length, rngs: mixers.Extractor(features, length, kind="HE", rngs=rngs),
)
