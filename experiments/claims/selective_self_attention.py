"""The paper: temperatures of queries and values that depend on the token and its position make language models better, trained from scratch or fine-tuned, for less
than half a percent of new parameters; a constant temperature does not. The logarithmic temperature of positions keeps attention from thinning out with length.

Here: (1) a decoder of bytes of two blocks (width 64, four heads, rotary positions) is trained 300 steps on 8 windows of 64 bytes of Python source. Then all its
parameters are frozen and for 80 steps only temperatures are learned: those of selective attention (of positions, in the printed form 1 + sigmoid(beta) log n from beta =
-3; of queries and of values), or one constant a head. Bits per byte are measured on held-out windows. The paper's own checkpoints are too large to train here.
(2) One key with a score of 4 stands among n = 16 to 1024 others with normal scores: how much its weight falls with log n, without temperature and with 1 + log(n) / 2.
The claim holds if selective attention is better than the constant, the constant no worse than the frozen model, and the temperature at least halves the slope.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import attnx
from attnx import masks, objectives, weights
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.tiny import Tiny

FEATURES, HEADS, LENGTH = 64, 4, 64
COUNTS = (16, 64, 256, 1024)
ARMS = ("frozen", "constant", "selective")


def _selective(layer, rngs):
    return weights.SelectiveSelfAttention.from_attention(layer, pos_temp="sigmoid", beta=-3.0, rngs=rngs)


def _constant(layer, rngs):
    """One learned temperature a head."""
    new = objectives.TemperatureAttention(FEATURES, HEADS, max_length=1, position=Rotary(), implementation="reference", rngs=rngs)
    for name in ("query", "key", "value", "out"):
        setattr(new, name, getattr(layer, name))
    return new


def _is_temperature(path, value):
    del value
    return any("temperature" in str(part) or part == "beta" for part in path)


def _tune(trial, model, wrap, name):
    """The bits per byte of the model with other attention layers, whose temperatures alone are trained."""
    model = nnx.clone(model)
    for index, block in enumerate(model.blocks):
        block.attention = wrap(block.attention, nnx.Rngs(trial.seed + index))
    graph, new, frozen, rest = nnx.split(model, _is_temperature, nnx.Param, ...)
    apply = lambda new, tokens: nnx.merge(graph, new, frozen, rest)(tokens)
    new = fit(text.loss(apply), new, text.sampler(LENGTH, 8), steps=trial.scaled(80), trial=trial, optimizer=optax.adam(1e-2), name=name)
    return text.bits(apply, new, LENGTH, count=trial.scaled(96, 2)).mean()


def _dilution(seed, repeats=200):
    """The mean weight of the one key at each number of others, without temperature and with it."""
    rng = np.random.default_rng(seed)
    found = {"plain": [], "tempered": []}
    for count in COUNTS:
        scores = jnp.asarray(np.concatenate([np.full((repeats, 1), 4.0), rng.normal(size=(repeats, count))], axis=1))
        for name, temperature in (("plain", 1.0), ("tempered", weights.position_temperature(0.0, count + 1, form="sigmoid"))):
            found[name].append(float(jax.nn.softmax(temperature * scores, axis=-1)[:, 0].mean()))
    return found


def _slope(weights):
    """By how much the weight falls with the natural logarithm of the number of keys."""
    return -float(np.polyfit(np.log(COUNTS), weights, 1)[0])


def run(trial: Trial):
    """Trains a model, then its temperatures; dilutes one key."""
    mechanism = attnx.pairs(mask=masks.causal(), implementation="reference")
    attention = functools.partial(Attention, FEATURES, HEADS, mechanism=mechanism, position=Rotary())
    model = Tiny(FEATURES, [lambda rngs: attention(rngs=rngs)] * 2, inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed))
    params, apply = functional(model)
    params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(300), trial=trial.part(0, 0.6), name="softmax")
    nnx.update(model, params)
    measured = {"frozen bits": text.bits(apply, params, LENGTH, count=trial.scaled(96, 2)).mean(),
                "constant bits": _tune(trial.part(0.6, 0.8), model, _constant, "constant"),
                "selective bits": _tune(trial.part(0.8, 1), model, _selective, "selective")}
    diluted = _dilution(trial.seed)
    return measured | {f"{name} weights": found for name, found in diluted.items()} | {f"{name} slope": _slope(found) for name, found in diluted.items()}


def draw(figure, seeds):
    """Bits per byte, and the weight of the one key."""
    left, right = figure.subplots(1, 2)
    bars(left, {name: [seed[f"{name} bits"] for seed in seeds] for name in ARMS}, "bits per byte")
    values = np.concatenate([[seed[f"{name} bits"] for name in ARMS] for seed in seeds])
    left.set_ylim(values.min() - 0.3 * np.ptp(values), values.max() + 0.1 * np.ptp(values))
    lines(right, COUNTS, {name: [seed[f"{name} weights"] for seed in seeds] for name in ("plain", "tempered")}, "other keys", "weight of the one key")
    right.set_xscale("log", base=2)


claim = Claim(
    id="selective-self-attention",
    run=run,
    criteria=(
        Criterion("bits per byte: selective below the constant temperature", lambda m: m["constant bits"] - m["selective bits"]),
        Criterion("bits per byte: the constant temperature no worse than the frozen model", lambda m: m["frozen bits"] - m["constant bits"]),
        Criterion("fall of the one key's weight with log n: tempered at most half", lambda m: m["plain slope"] / 2 - m["tempered slope"])),
    table=(("", "bits per byte", "fall of the one key's weight"), {"frozen, plain": ("frozen bits", "plain slope"), "constant": ("constant bits", ""),
                                                                   "selective, tempered": ("selective bits", "tempered slope")}),
    draw=draw)
