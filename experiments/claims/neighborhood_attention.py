"""The paper: with windows around each pixel a transformer of images classifies better than with windows that tile the image (83.2% of ImageNet, 1.9 points more than
Swin), for neighbourhoods keep what convolutions have, that outputs move with the input.

Here: handwritten digits of 8 x 8 pixels lie somewhere in 24 x 24 pixels among scraps of other digits. Small models of two stages (12 x 12 and 6 x 6 tokens, widths 32
and 64, two blocks each, patches of 2 x 2 pixels) with neighbourhoods of 5 x 5, with windows of 4 x 4 (then 3 x 3), shifted in every second block, with full attention
and with depthwise convolutions of 5 x 5 are trained 1000 steps on 64 pictures; attention has relative biases everywhere. Accuracy is measured on held-out digits at
places as in training, and at places where no training picture has one. The claim holds if neighbourhoods are at least one point above shifted windows, lose less at
new places, and cost time that grows as at most the power 1.2 of the tokens (16 x 16 to 64 x 64, 5 x 5 of them each, one head of 32).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx import masks
from attnx.vision import NeighborhoodAttention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy
from experiments.tasks import digits, placed_digits
from experiments.timing import least_seconds
from experiments.tiny_grid import DepthwiseConv, ShiftedWindows, TinyGrid, train

FEATURES, HEADS, WINDOW, STEPS, BATCH, SIDES = 32, 2, 5, 1000, 64, (16, 32, 64)


def _around(window):
    return lambda features, rngs: NeighborhoodAttention(features, HEADS, window, rngs=rngs)


def _shifted(window):
    return [lambda features, rngs, shifted=shifted: ShiftedWindows(features, HEADS, window, shifted, rngs=rngs) for shifted in (False, True)]


ARMS = {"neighbourhoods": [[_around(WINDOW)] * 2] * 2, "shifted windows": [_shifted(4), _shifted(3)], "full": [[_around(12)] * 2, [_around(6)] * 2],
        "convolutions": [[lambda features, rngs: DepthwiseConv(features, WINDOW, rngs=rngs)] * 2] * 2}


def run(trial: Trial):
    """Trains all arms and takes the time of neighbourhoods."""
    data, held = digits.split(trial.seed)
    measured = {}
    for index, (name, mixers) in enumerate(ARMS.items()):
        part = trial.part(index / len(ARMS), (index + 1) / len(ARMS))
        model = TinyGrid(1, FEATURES, mixers, digits.CLASSES, rngs=nnx.Rngs(trial.seed))
        sample = placed_digits.sampler(data, BATCH)
        params, apply = train(name, model, lambda logits, batch: cross_entropy(logits, batch[1]), sample, steps=trial.scaled(STEPS), trial=part)
        logits = jax.jit(apply)
        for places in ("usual", "new"):
            pictures, labels = placed_digits.sampler(held, trial.scaled(1000, 20), places)(jax.random.key(10_000 + trial.seed))
            measured[f"{name}, {places}"] = 100 * float(accuracy(logits(params, pictures), labels))
    seconds = [_seconds(side, trial.scaled(7, 1)) for side in SIDES]
    return measured | {"power": float(np.polyfit(2 * np.log(SIDES), np.log(seconds), 1)[0]), "ms": [1e3 * x for x in seconds]}


def _seconds(side, times):
    x = jnp.ones((1, side, side, 1, 32))
    attend = jax.jit(lambda x: masks.neighborhood_attention(x, x, x, WINDOW, implementation="blockwise", query_tile=(8, 8), key_tile=(8, 8)))
    return least_seconds(lambda: attend(x), times)


def draw(figure, seeds):
    """Accuracies at both kinds of places."""
    for axes, places in zip(figure.subplots(1, 2), ("usual", "new")):
        bars(axes, {name: [seed[f"{name}, {places}"] for seed in seeds] for name in ARMS}, f"accuracy at {places} places, %")


claim = Claim(
    id="neighborhood-attention",
    run=run,
    criteria=(
        Criterion("accuracy, points: neighbourhoods at least 1 above shifted windows", lambda m: m["neighbourhoods, usual"] - m["shifted windows, usual"] - 1),
        Criterion("points lost at new places: fewer than with shifted windows",
                  lambda m: (m["shifted windows, usual"] - m["shifted windows, new"]) - (m["neighbourhoods, usual"] - m["neighbourhoods, new"])),
        Criterion("time as a power of the tokens at most 1.2: 1.2 less the power", lambda m: 1.2 - m["power"])),
    table=(("", "accuracy, %", "at new places"), {name: (f"{name}, usual", f"{name}, new") for name in ARMS}),
    draw=draw)
