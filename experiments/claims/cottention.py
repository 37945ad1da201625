"""The paper: BERT and GPT with cosine attention are about as good as with softmax attention, in memory linear in the length (the abstract gives no number).

Here: a two-layer decoder of bytes (width 64, four heads, rotary positions) is trained 300 steps on 8 windows of 128 bytes of Python source with cosine attention,
with softmax attention, and with sums of cosines that nothing divides. Bits per byte are measured on held-out files. Besides, what the compiler sets aside for a
forward pass of one layer, arguments and output included (one sequence, four heads of 64), in chunks and with the matrix of all pairs written out, at 512 to 8192
tokens: the exponent is the slope of its logarithm against that of the length. The claim holds if cosine attention is within 8% of softmax's bits, beats the
undivided sums, and its memory has an exponent within 0.15 of 1; that of all pairs must exceed 1.7.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx import linear, masks
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.tiny import Tiny

FEATURES, HEADS, LAYERS, LENGTH = 64, 4, 2, 128
LENGTHS, SIZE = (512, 1024, 2048, 4096, 8192), 64
ARMS = {
    "cosine": lambda rngs: linear.CottentionAttention(FEATURES, HEADS, position=Rotary(), rngs=rngs),
    "softmax": lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=masks.causal()), position=Rotary(), rngs=rngs),
    "undivided": lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.recurrent(feature_map=linear.unit), position=Rotary(), rngs=rngs)}


def _pairs(query, key, value, m):
    """All cosines of a layer, written out."""
    length, power = query.shape[1], jnp.arange(1, query.shape[1] + 1.0)[:, None] ** -jax.nn.sigmoid(m)
    cosines = jnp.einsum("btnh,bsnh->bnts", linear.unit(query), linear.unit(key)) * jnp.tril(jnp.ones((length, length)))
    return jnp.einsum("bnts,bsnv->btnv", cosines, value * power[..., None])


FORMS = {"chunks": functools.partial(linear.cosine_linear_attention, implementation="chunked"), "all pairs": _pairs}


@functools.cache
def _mebibytes(name, length):
    """Of arguments, intermediate results and the output together."""
    array, m = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32), jax.ShapeDtypeStruct((HEADS,), jnp.float32)
    memory = jax.jit(FORMS[name]).lower(array, array, array, m).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def run(trial: Trial):
    """Trains all arms, and asks the compiler."""
    measured = {}
    for index, (name, attention) in enumerate(ARMS.items()):
        params, apply = functional(Tiny(FEATURES, [attention] * LAYERS, inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(300), trial=trial.part(0.3 * index, 0.3 * (index + 1)), name=name)
        measured[f"{name} bits"] = text.bits(apply, params, LENGTH, count=trial.scaled(96, 2)).mean()
    for name in FORMS:
        sizes = [_mebibytes(name, length) for length in (LENGTHS[:2] if trial.smoke else LENGTHS)]
        measured |= {f"{name}, memory": sizes, f"{name}, exponent": np.polyfit(np.log(LENGTHS[:len(sizes)]), np.log(sizes), 1)[0], f"{name}, last memory": sizes[-1]}
    return measured


def draw(figure, seeds):
    """Bits per byte, and memory against length."""
    left, right = figure.subplots(1, 2)
    bars(left, {name: [seed[f"{name} bits"] for seed in seeds] for name in ARMS}, f"bits per byte at {LENGTH}")
    left.set_ylim(min(seed[f"{name} bits"] for seed in seeds for name in ARMS) * 0.9)
    lines(right, LENGTHS[:len(seeds[0]["chunks, memory"])], {name: [seed[f"{name}, memory"] for seed in seeds] for name in FORMS}, "tokens",
          "MiB, forward")
    right.set_xscale("log", base=2)
    right.set_yscale("log")


claim = Claim(
    id="cottention",
    run=run,
    criteria=(
        Criterion("bits per byte at most 8% above softmax's", lambda m: 1.08 * m["softmax bits"] - m["cosine bits"]),
        Criterion("bits per byte below those of undivided sums", lambda m: m["undivided bits"] - m["cosine bits"]),
        Criterion("exponent of memory in chunks within 0.15 of 1", lambda m: 0.15 - math.fabs(m["chunks, exponent"] - 1)),
        Criterion("exponent of memory of all pairs at least 1.7", lambda m: m["all pairs, exponent"] - 1.7)),
    table=(("", "bits per byte", "exponent of memory", f"MiB at {LENGTHS[-1]}"),
           {**{name: (f"{name} bits", "", "") for name in ARMS}, **{name: ("", f"{name}, exponent", f"{name}, last memory") for name in FORMS}}),
    draw=draw)
