"""The paper: attention with Taylor polynomials in place of exponentials is comparable to softmax attention on the tasks of Long Range Arena, in time linear in the
length.

Here: a two-layer decoder of bytes (width 64, four heads of 16, rotary positions) is trained 300 steps on 8 windows of 128 bytes of Python source with polynomials
of order 1 and 2 (standardised queries and keys), with softmax attention, and with linear attention of elu + 1. Bits per byte are measured on held-out files.
Besides, the time of a forward pass of one layer (four heads of 16) at 512 to 8192 tokens: order 2 factored, and softmax attention in tiles, the least of several.
The claim holds if order 2 is no worse than order 1, better than elu + 1 and within 5% of softmax, and quicker than softmax attention at 8192 tokens. With 153
features it should cross between 128 and 256 tokens by the count of operations; where it does is recorded (0: beyond what is measured).
"""

import functools

import jax
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
from experiments.timing import least_seconds
from experiments.tiny import Tiny

FEATURES, HEADS, LAYERS, LENGTH = 64, 4, 2, 128
LENGTHS = (512, 1024, 2048, 4096, 8192)


def _attention(mechanism):
    return lambda rngs: Attention(FEATURES, HEADS, mechanism=mechanism, position=Rotary(), rngs=rngs)


ARMS = {"order 2": lambda rngs: linear.FastmaxAttention(FEATURES, HEADS, order=2, position=Rotary(), rngs=rngs),
        "order 1": lambda rngs: linear.FastmaxAttention(FEATURES, HEADS, order=1, position=Rotary(), rngs=rngs),
        "softmax": _attention(attnx.pairs(mask=masks.causal())),
        "elu + 1": _attention(attnx.recurrent(feature_map=linear.elu_plus_one, normalize=True))}

TIMED = {"order 2": jax.jit(functools.partial(linear.fastmax_attention, form="factored", implementation="chunked")),
         "softmax": jax.jit(functools.partial(attnx.attention, mask=masks.causal(), implementation="blockwise"))}


def run(trial: Trial):
    """Trains all arms, then times two."""
    measured = {}
    for index, (name, attention) in enumerate(ARMS.items()):
        params, apply = functional(Tiny(FEATURES, [attention] * LAYERS, inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(300), trial=trial.part(0.2 * index, 0.2 * (index + 1)), name=name)
        measured[f"{name} bits"] = text.bits(apply, params, LENGTH, count=trial.scaled(96, 2)).mean()
    lengths = LENGTHS[:2] if trial.smoke else LENGTHS
    for name, call in TIMED.items():
        times = []
        for length in lengths:
            args = jax.random.normal(jax.random.key(trial.seed), (3, 1, length, HEADS, FEATURES // HEADS))
            times.append(1e3 * least_seconds(functools.partial(call, *args), trial.scaled(max(3, 8192 // length), 1)))
        measured |= {f"{name} times": times, f"{name} last time": times[-1]}
    ahead = np.array(measured["order 2 times"]) < measured["softmax times"]
    measured["crossover"] = lengths[len(ahead) - int(np.argmin(ahead[::-1]))] if ahead[-1] and not ahead.all() else lengths[0] if ahead.all() else 0
    return measured


def draw(figure, seeds):
    """Bits per byte, and time against length."""
    left, right = figure.subplots(1, 2)
    bars(left, {name: [seed[f"{name} bits"] for seed in seeds] for name in ARMS}, f"bits per byte at {LENGTH}")
    left.set_ylim(min(seed[f"{name} bits"] for seed in seeds for name in ARMS) * 0.9)
    lines(right, LENGTHS[:len(seeds[0]["softmax times"])], {name: [seed[f"{name} times"] for seed in seeds] for name in TIMED}, "tokens", "milliseconds, forward")
    right.set_xscale("log", base=2)
    right.set_yscale("log")


claim = Claim(
    id="fastmax",
    run=run,
    criteria=(
        Criterion("bits per byte: order 2 no worse than order 1", lambda m: m["order 1 bits"] - m["order 2 bits"]),
        Criterion("bits per byte: order 2 below elu + 1", lambda m: m["elu + 1 bits"] - m["order 2 bits"]),
        Criterion("bits per byte: order 2 at most 5% above softmax", lambda m: 1.05 * m["softmax bits"] - m["order 2 bits"]),
        Criterion("time at the greatest length: softmax over order 2, less 1", lambda m: m["softmax last time"] / m["order 2 last time"] - 1)),
    table=(("", "bits per byte", f"ms at {LENGTHS[-1]}", "crossover, tokens"),
           {name: (f"{name} bits", f"{name} last time" if name in TIMED else "", "crossover" if name == "order 2" else "") for name in ARMS}),
    draw=draw)
