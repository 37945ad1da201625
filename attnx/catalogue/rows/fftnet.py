"""FFTNet."""

from functools import partial

import jax.numpy as jnp

from attnx import mixers
from attnx.catalogue.entry import SIZES, Entry, Example, Input

LENGTH = SIZES["t"]  # that the example's filter is made for


def call(case, x, real, base, delta, bias, activation):
    """A filter of a given sequence, resized for those of other lengths; 'full' mirrors it for the full transform."""
    if case.causal:
        raise NotImplementedError("FFTNet has no causal form")
    length = x.shape[1]
    parts = [mixers.resize_filter(part, LENGTH, length) for part in (base, delta, bias)]
    fft = "full" if case.execution == "full" else "real"
    if fft == "full":
        parts = [jnp.concatenate([part, part[..., 1:(length + 1) // 2][..., ::-1]], axis=-1) for part in parts]
    x = jnp.where(real[..., None], x, 0)
    return jnp.where(real[..., None], mixers.spectral_mix(x, *parts, activation=activation, fft=fft), 0)


def example(activation):
    """In both transforms."""
    inputs = {"x": "btd", "real": Input("bt", lambda normal: normal > -1), "base": "nf", "delta": "bnf", "bias": "nf"}
    return Example(partial(call, activation=activation), inputs, "btd", ("noncausal self",), ("reference", "full"), "real", linear="t",
                   sizes={"f": LENGTH // 2 + 1}, name=activation)


entry = Entry(
    id="fftnet",
    objects=(mixers.spectral_mix, mixers.FFTNetMixer, mixers.FFTNetBlock, mixers.FFTNetClassifier, mixers.modrelu, mixers.resize_filter),
    equation="""out = Re IFFT(modReLU(FFT(x) base (1 + delta(c)), b + b(c))),      c the mean of the tokens
modReLU(z, b) = max(|z| + b, 0) z / |z|""",
    claim="Tells sequences apart better than fixed Fourier mixing and at least as well as softmax attention, in time O(T log T).",
    examples=(example("modrelu"), example("gelu_mag")),
    notes="By default the paper's modReLU, the multiplicative filter and the real transform; what was released at times is there by options.",
)
