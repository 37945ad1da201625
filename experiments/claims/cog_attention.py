"""The paper: with weights of either sign one head can take away as well as add; Cogformers, which keep softmax in their first and last layers, are better language
models than transformers, and their tokens collapse less.

Here: (1) of 16 keys with values a question names two, and the difference of their values is asked for: one block (width 32, 600 steps of 64 sequences) with one
head of Cog, one or two heads of softmax, or one head of weights tanh(s) over the sum of their absolute values; the mean squared error is relative to that of
always answering zero. (2) A decoder of bytes of four blocks (width 48, four heads, rotary positions) is trained 200 steps on 8 windows of 64 bytes of
Python source with softmax throughout, and with Cog in the two blocks in the middle; bits per byte and the cosine of neighbouring tokens after the last block are
measured on held-out windows.
The claim holds if one head of Cog has less than half of the error of one head of softmax and at most 1.25 times that of two heads, and the decoder with Cog
is no more than 0.5% worse and its tokens are less alike.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import analysis, weights
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import differences, text
from experiments.tiny import Tiny
from pallas_kernels.parts import part

FEATURES, HEADS, BLOCKS, LENGTH = 48, 4, 4, 64


def _size(s, earlier):
    return jnp.abs(jnp.tanh(s))


def _itself(total, earlier):
    return total


@part
class Tanh(weights.Weights):
    """w = tanh(s) over the sum of |tanh(s)|: signs without an exponential."""

    statistics = (weights.Sum(_size, _itself),)

    def weight(self, s, statistics):
        return jnp.tanh(s) / jnp.where(statistics[0] > 0, statistics[0], 1)


HEADS_OF = {"Cog": (weights.cog(), 1), "softmax": (weights.softmax(), 1), "softmax, 2 heads": (weights.softmax(), 2), "tanh": (Tanh(), 1)}
MODELS = {"softmax": ("first", 1, 2, "last"), "Cogformer": ("first", "last")}


def _error(trial, name):
    """Of one block on differences."""
    weigh, heads = HEADS_OF[name]
    mechanism = attnx.pairs(weights=weigh, implementation="reference")
    model = Tiny(32, [lambda rngs: Attention(32, heads, mechanism=mechanism, rngs=rngs)], input_size=differences.FEATURES, outputs=differences.SIZE,
                 rngs=nnx.Rngs(trial.seed))
    params, apply = functional(model)
    answer = lambda params, x: apply(params, x)[:, -1]
    params = fit(lambda params, batch, key: jnp.mean((answer(params, batch[0]) - batch[1]) ** 2), params, differences.sampler(64), steps=trial.scaled(600), trial=trial,
                 name=f"differences, {name}")
    x, answers = differences.sampler(trial.scaled(2048, 16))(jax.random.key(10_000 + trial.seed))
    return jnp.mean((jax.jit(answer)(params, x) - answers) ** 2) / jnp.mean(answers**2)


def _language(trial, name):
    """Bits per byte and the cosine of neighbours of a decoder."""
    layers = weights.cogformer_mechanisms(BLOCKS, keep_softmax_layers=MODELS[name], implementation="reference")
    attention = [functools.partial(Attention, FEATURES, HEADS, mechanism=mechanism, position=Rotary()) for mechanism in layers]
    params, apply = functional(Tiny(FEATURES, [lambda rngs, make=make: make(rngs=rngs) for make in attention], inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
    sample, count = text.sampler(LENGTH, 8), trial.scaled(96, 2)
    params = fit(text.loss(apply), params, sample, steps=trial.scaled(200), trial=trial, name=f"bytes, {name}")
    states = jax.jit(lambda params, tokens: apply(params, tokens, method="states")[-1])(params, sample(jax.random.key(10_000 + trial.seed))[:, :-1])
    return text.bits(apply, params, LENGTH, count=count).mean(), analysis.layer_cosine_collapse(states).mean()


def run(trial: Trial):
    """Both experiments, all arms."""
    measured = {f"{name} error": _error(trial.part(0.1 * index, 0.1 * (index + 1)), name) for index, name in enumerate(HEADS_OF)}
    for index, name in enumerate(MODELS):
        measured[f"{name} bits"], measured[f"{name} cosine"] = _language(trial.part(0.4 + 0.3 * index, 0.7 + 0.3 * index), name)
    return measured


def draw(figure, seeds):
    """Errors on differences; bits per byte and cosines of the decoders."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 2, 2))
    bars(left, {name: [seed[f"{name} error"] for seed in seeds] for name in HEADS_OF}, "relative error, differences")
    bars(middle, {name: [seed[f"{name} bits"] for seed in seeds] for name in MODELS}, "bits per byte")
    bars(right, {name: [seed[f"{name} cosine"] for seed in seeds] for name in MODELS}, "cosine of neighbouring tokens")


claim = Claim(
    id="cog-attention",
    run=run,
    criteria=(
        Criterion("relative error on differences: Cog below half of softmax", lambda m: m["softmax error"] / 2 - m["Cog error"]),
        Criterion("relative error on differences: Cog at most 1.25 times two heads of softmax", lambda m: 1.25 * m["softmax, 2 heads error"] - m["Cog error"]),
        Criterion("bits per byte: the Cogformer within 0.5% of softmax", lambda m: 1.005 * m["softmax bits"] - m["Cogformer bits"]),
        Criterion("cosine of neighbouring tokens: the Cogformer below softmax", lambda m: m["softmax cosine"] - m["Cogformer cosine"])),
    table=(("", "relative error, differences", "bits per byte", "cosine of neighbours"),
           {name: (f"{name} error", f"{name} bits" if name in MODELS else "", f"{name} cosine" if name in MODELS else "") for name in HEADS_OF}
           | {"Cogformer": ("", "Cogformer bits", "Cogformer cosine")}),
    draw=draw)
