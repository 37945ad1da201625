"""The paper: a T5 fine-tuned with key-value heads that are learned combinations of its own does better by half a point than with their plain means, and nears
multi-head attention, at the cost of grouped attention.

Here: a decoder of bytes of two layers (width 64, eight heads, rotary positions) is trained 300 steps on 8 windows of 128 bytes of Python source, with
multi-head attention. Then it is given two or four key-value heads - plain means, or combinations weighted by head; for two heads also by channel, and by head
from random weights - and trained 100 steps more, as is the model that it was. Bits per byte are measured on held-out files.
The claim holds if for one of the two numbers of heads weights by head need fewer bits than plain means, and for none more than 0.5% more.
"""

import jax
from flax import nnx

import attnx
from attnx import masks, memory
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.tiny import Tiny

FEATURES, HEADS, BLOCKS, LENGTH, BATCH = 64, 8, 2, 128, 8
GROUPS = (2, 4)
ALL_TRIED = 2  # the number of heads with which all arms are tried
ARMS = {"mean": dict(), "weighted": dict(variant="scalar"), "by channel": dict(variant="column"), "random": dict(variant="scalar", init="normal")}
CHOICES = {f"{arm}, {groups}": (arm, groups) for groups in GROUPS for arm in ARMS if groups == ALL_TRIED or arm in ("mean", "weighted")}


def _attention(rngs):
    return Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=masks.causal()), position=Rotary(), rngs=rngs)


def _model(seed):
    return Tiny(FEATURES, [_attention] * BLOCKS, inputs=text.VOCABULARY, rngs=nnx.Rngs(seed))


def _converted(params, seed, arm, groups):
    """The trained model with grouped heads."""
    model = _model(seed)
    nnx.update(model, jax.tree.map(lambda x: x.copy(), params))
    model = memory.convert_mha_to_gqa(model, groups, rngs=nnx.Rngs(seed), **ARMS[arm])
    return memory.fold_gqa(model) if arm == "mean" else model


def run(trial: Trial):
    """Trains, converts, trains on."""
    count = trial.scaled(96, 2)
    params, apply = functional(_model(trial.seed))
    params = fit(text.loss(apply), params, text.sampler(LENGTH, BATCH), steps=trial.scaled(300), trial=trial.part(0, 0.25), name="multi-head")
    runs = {"multi-head": functional(_converted(params, trial.seed, "mean", HEADS))}
    runs |= {name: functional(_converted(params, trial.seed, *choice)) for name, choice in CHOICES.items()}
    measured = {}
    for index, (name, (start, apply)) in enumerate(runs.items()):
        part = trial.part(0.25 + 0.75 * index / len(runs), 0.25 + 0.75 * (index + 1) / len(runs))
        tuned = fit(text.loss(apply), start, text.sampler(LENGTH, BATCH), steps=trial.scaled(100), learning_rate=1e-3, trial=part, name=name)
        measured[name] = text.bits(apply, tuned, LENGTH, count=count).mean()
    return measured


def _gain(measured, groups):
    """The share of bits per byte that weights save."""
    return 1 - measured[f"weighted, {groups}"] / measured[f"mean, {groups}"]


def draw(figure, seeds):
    """Bits per byte, by number of heads."""
    for axes, groups in zip(figure.subplots(1, len(GROUPS), sharey=True), GROUPS):
        names = {"multi-head": "multi-head", **{arm: name for name, (arm, number) in CHOICES.items() if number == groups}}
        bars(axes, {arm: [seed[name] for seed in seeds] for arm, name in names.items()}, f"bits per byte, {groups} key-value heads")
        axes.set_ylim(bottom=0.9 * min(min(seed.values()) for seed in seeds))


claim = Claim(
    id="weighted-gqa",
    run=run,
    criteria=(
        Criterion("share of bits saved by weights over means: above 0 for 2 or 4 heads", lambda m: max(_gain(m, groups) for groups in GROUPS)),
        *(Criterion(f"share of bits lost by weights, {groups} heads: at most 0.005", lambda m, groups=groups: 0.005 + _gain(m, groups)) for groups in GROUPS)),
    table=(("", *(f"bits per byte, {groups} heads" for groups in GROUPS)),
           {arm: tuple(name if (name := f"{arm}, {groups}") in CHOICES else "" for groups in GROUPS) for arm in ARMS} | {"multi-head": ("multi-head", "")}),
    draw=draw)
