"""The paper: trained with clipped softmax or with gated heads, transformers have activations without outliers, so that rounding weights and activations to 8 bits
costs them next to nothing, where it ruins a model with plain softmax; and they are as good as that before rounding.

Here: a decoder of bytes of four post-norm blocks (width 64, four heads, learned positions, windows of 128 bytes of Python source, 400 steps of 8 windows) with
softmax, with clipped softmax (alpha = 4) and with heads gated by token (linear predictors). Outliers are the largest activation of a sequence and the kurtosis,
at the output of each block, averaged over blocks. Bits per byte are measured on held-out files, and again with weights and activations rounded to 8 and to 6
bits, each tensor with one range (of activations: running averages over 16 batches), all matrix products but the last. So small a model, so briefly trained, may
have no outliers to be rid of: 6 bits are there to make rounding matter at all.
The claim holds if both remedies lower the largest activation and what rounding to 6 bits costs, and lose less than 1% before rounding.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import analysis, masks, weights
from attnx.nn import Attention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.tiny import Tiny

FEATURES, HEADS, BLOCKS, LENGTH, BATCH = 64, 4, 4, 128, 8
REMEDIES = ("clipped", "gated")
BITS = (8, 6)


def _mechanism(part):
    return attnx.pairs(mask=masks.causal(), weights=part, implementation="reference")  # so that there are weights to be rounded


ARMS = {"softmax": lambda rngs: Attention(FEATURES, HEADS, mechanism=_mechanism(weights.softmax()), rngs=rngs),
        "clipped": lambda rngs: Attention(FEATURES, HEADS, mechanism=_mechanism(weights.clipped_softmax(alpha=4.0, length=LENGTH)), rngs=rngs),
        "gated": lambda rngs: weights.GatedAttention(FEATURES, HEADS, mechanism=_mechanism(weights.softmax()), rngs=rngs)}


def run(trial: Trial):
    """Trains, measures and rounds all arms."""
    measured = {}
    sample, count = text.sampler(LENGTH, BATCH), trial.scaled(64, 2)
    for index, (name, attention) in enumerate(ARMS.items()):
        model = Tiny(FEATURES, [attention] * BLOCKS, inputs=text.VOCABULARY, position="learned", max_length=LENGTH, norm="layer", norm_position="post",
                     rngs=nnx.Rngs(trial.seed))
        params, apply = functional(model)
        params = fit(text.loss(apply), params, sample, steps=trial.scaled(400), trial=trial.part(index / 3, (index + 1) / 3), name=name)
        batches = [sample(key)[:, :-1] for key in jax.random.split(jax.random.key(10_000 + trial.seed), trial.scaled(16, 2))]
        states = jnp.stack(jax.jit(lambda params, tokens, apply=apply: apply(params, tokens, method="states"))(params, jnp.concatenate(batches)))
        measured[f"{name} largest"] = analysis.max_inf_norm(states)
        measured[f"{name} kurtosis"] = jnp.mean(jax.vmap(analysis.activation_kurtosis)(states))
        measured[f"{name} bits"] = text.bits(apply, params, LENGTH, count=count).mean()
        ranges = analysis.calibrate(apply, params, batches)
        for bits in BITS:
            rounded = analysis.quantized(apply, ranges, bits=bits, weight_bits=bits)
            measured[f"{name} bits, {bits}"] = text.bits(rounded, params, LENGTH, count=count).mean()
    return measured


def _cost(measured, name, bits=6):
    """Bits per byte that rounding costs."""
    return measured[f"{name} bits, {bits}"] - measured[f"{name} bits"]


def draw(figure, seeds):
    """The largest activation, and what rounding costs."""
    left, middle, right = figure.subplots(1, 3)
    bars(left, {name: [seed[f"{name} bits"] for seed in seeds] for name in ARMS}, "bits per byte, not rounded")
    bars(middle, {name: [seed[f"{name} largest"] for seed in seeds] for name in ARMS}, "largest activation")
    bars(right, {name: [_cost(seed, name) for seed in seeds] for name in ARMS}, "bits per byte that rounding to 6 bits costs")


claim = Claim(
    id="quantizable-attention",
    run=run,
    criteria=tuple(criterion for name in REMEDIES for criterion in (
        Criterion(f"largest activation: {name} below softmax", lambda m, name=name: m["softmax largest"] - m[f"{name} largest"]),
        Criterion(f"bits per byte that 6 bits cost: {name} below softmax", lambda m, name=name: _cost(m, "softmax") - _cost(m, name)),
        Criterion(f"bits per byte: {name} within 1% of softmax", lambda m, name=name: 1.01 * m["softmax bits"] - m[f"{name} bits"]))),
    table=(("", "largest activation", "kurtosis", "bits per byte", *(f"at {bits} bits" for bits in BITS)),
           {name: (f"{name} largest", f"{name} kurtosis", f"{name} bits", *(f"{name} bits, {bits}" for bits in BITS)) for name in ARMS}),
    draw=draw)
