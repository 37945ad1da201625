"""The paper: with weights for lags in the place of attention, the extractor of a matrix a lag (SHE) models text better than self-attention at equal settings, and those
of a vector or a number a lag (HE, WE, ME) are close to it or better at lower cost.

Here: a decoder of bytes of two blocks (width 64) is trained 200 steps on 16 windows of 64 bytes of Python source, its tokens mixed by each of the four extractors (64
lags; the sum of SHE divided by the square root of its terms, as in a public port), or by softmax attention with four heads and rotary positions; everything else is the
same, the highest learning rate 3e-3. Bits per byte are measured on held-out files. What a training step costs is reported; so is, of HE and softmax, the recall of the
last value of a key among eight pairs after 200 steps, where weights that do not see content should fail. The claim holds if SHE is no worse than softmax and none of
the others more than 5% worse.
"""

import jax
from flax import nnx

import attnx
from attnx import masks
from attnx.mixers import Extractor
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import reset, text
from experiments.timing import least_seconds
from experiments.tiny import Tiny

FEATURES, HEADS, LENGTH, BATCH, STEPS, PAIRS = 64, 4, 64, 16, 200, 8


def _softmax(rngs):
    return Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=masks.causal()), position=Rotary(), rngs=rngs)


def _extractor(kind):
    return lambda rngs: Extractor(FEATURES, LENGTH, kind=kind, scale="rsqrt_count" if kind == "SHE" else None, rngs=rngs)


ARMS = {"softmax": _softmax, **{kind: _extractor(kind) for kind in ("SHE", "HE", "WE", "ME")}}
RECALLED = ("softmax", "HE")


def run(trial: Trial):
    """Trains all arms on text, and two on recall."""
    measured = {}
    for index, (name, mixer) in enumerate(ARMS.items()):
        params, apply = functional(Tiny(FEATURES, [mixer] * 2, inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
        loss, sample = text.loss(apply), text.sampler(LENGTH, BATCH)
        params = fit(loss, params, sample, steps=trial.scaled(STEPS), trial=trial.part(0.16 * index, 0.16 * (index + 1)), name=name)
        step, batch = jax.jit(jax.grad(loss)), sample(jax.random.key(0))
        measured |= {f"{name}, bits": text.bits(apply, params, LENGTH, count=trial.scaled(96, 2)).mean(),
                     f"{name}, milliseconds": 1000 * least_seconds(lambda step=step, params=params, batch=batch: step(params, batch, None), trial.scaled(7, 1)),
                     f"{name}, parameters": sum(x.size for x in jax.tree.leaves(params))}
    for index, name in enumerate(RECALLED):
        measured[f"{name}, recall"] = _recall(trial.part(0.8 + 0.1 * index, 0.9 + 0.1 * index), name)
    return measured


def _recall(trial, name):
    sample = reset.sampler(PAIRS, 64, rate=0.0)
    params, apply = functional(Tiny(FEATURES, [ARMS[name]] * 2, inputs=reset.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
    answer = lambda params, tokens: apply(params, tokens)[:, -1]
    params = fit(lambda params, batch, key: cross_entropy(answer(params, batch[0]), batch[1]), params, sample, steps=trial.scaled(STEPS), trial=trial,
                 name=f"{name}, recall")
    tokens, answers = reset.sampler(PAIRS, trial.scaled(2048, 16), rate=0.0)(jax.random.key(10_000 + trial.seed))
    return accuracy(jax.jit(answer)(params, tokens), answers)


def draw(figure, seeds):
    """Bits per byte, the time of a step, and recall."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 5, 2))
    bars(left, {name: [seed[f"{name}, bits"] for seed in seeds] for name in ARMS}, "bits per byte")
    bars(middle, {name: [seed[f"{name}, milliseconds"] for seed in seeds] for name in ARMS}, "milliseconds a gradient")
    bars(right, {name: [seed[f"{name}, recall"] for seed in seeds] for name in RECALLED}, f"recall of {PAIRS} pairs")


claim = Claim(
    id="extractors",
    run=run,
    criteria=(
        Criterion("bits per byte: SHE no worse than softmax", lambda m: m["softmax, bits"] - m["SHE, bits"]),
        Criterion("bits per byte: HE, WE and ME at most 5% worse than softmax",
                  lambda m: 1.05 * m["softmax, bits"] - max(m[f"{kind}, bits"] for kind in ("HE", "WE", "ME")))),
    table=(("", "bits per byte", "ms a gradient", "parameters", "recall"),
           {name: (f"{name}, bits", f"{name}, milliseconds", f"{name}, parameters", f"{name}, recall" if name in RECALLED else "") for name in ARMS}),
    draw=draw)
