"""The paper: attention without a value projection, with three quarters of the weights, does as well as all of it, one with half of them nearly as well and
quicker, and super attention, which maps values along the sequence, clearly better, on images and text.

Here: one block (width 32, four heads, learned positions, the mean over tokens read out) learns to classify handwritten digits as 64 pixels, and 64 bytes of the
standard library as docstring or code: 300 steps of 32 examples with each attention. Accuracies are on held-out images and files. As a control, efficient and
super attention also learn digits whose pixels are put in another order in each example: what super attention learns about places must then be of no use.
The claim holds if optimised attention is within one point of standard attention and efficient within 1.5 (mean of both tasks), super is no worse than standard
on digits, and with pixels in any order super is no more than one point above efficient.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import scores
from attnx.nn import Attention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits, docstrings
from experiments.tiny import Tiny

FEATURES, HEADS, LENGTH, BATCH = 32, 4, 64, 32
ARMS = {"standard": functools.partial(Attention, FEATURES, HEADS, mechanism=attnx.pairs()), "optimised": functools.partial(scores.OptimisedAttention, FEATURES, HEADS),
        "efficient": functools.partial(scores.EfficientAttention, FEATURES, HEADS),
        "super": functools.partial(scores.SuperAttention, FEATURES, HEADS, length=LENGTH)}
CONTROLS = ("efficient", "super")
TASKS = {"digits": (dict(input_size=1, outputs=digits.CLASSES), ARMS), "text": (dict(inputs=docstrings.VOCABULARY, outputs=docstrings.CLASSES), ARMS),
         "shuffled": (dict(input_size=1, outputs=digits.CLASSES), CONTROLS)}


def _shuffle(key, x):
    """Each sequence [n, LENGTH, 1] in an order of its own."""
    return jax.vmap(jax.random.permutation)(jax.random.split(key, len(x)), x)


def _data(task, seed):
    """``sample(key)``, and held-out inputs and labels."""
    if task == "text":
        return docstrings.sampler(BATCH), *map(jnp.asarray, docstrings.split()[1])
    train, (images, labels) = digits.split(seed)
    change = _shuffle if task == "shuffled" else lambda key, x: x

    def sample(key):
        pixels, labels = digits.sampler(train, BATCH)(key)
        return change(jax.random.fold_in(key, 1), digits.sequence(pixels)), labels

    return sample, change(jax.random.key(20_000 + seed), digits.sequence(images)), labels


def run(trial: Trial):
    """Trains all arms on both tasks, and the control."""
    measured, runs = {}, [(task, name) for task, (_, names) in TASKS.items() for name in names]
    for index, (task, name) in enumerate(runs):
        sample, inputs, labels = _data(task, trial.seed)
        model = Tiny(FEATURES, [lambda rngs, name=name: ARMS[name](rngs=rngs)], position="learned", max_length=LENGTH, pooled=True, rngs=nnx.Rngs(trial.seed),
                     **TASKS[task][0])
        params, apply = functional(model)
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, batch[0]), batch[1])
        part = trial.part(index / len(runs), (index + 1) / len(runs))
        params = fit(loss, params, sample, steps=trial.scaled(300), trial=part, name=f"{name}, {task}")
        measured[f"{name} {task}"] = accuracy(jax.jit(apply)(params, inputs), labels)
    return measured


def _mean(measured, name):
    return (measured[f"{name} digits"] + measured[f"{name} text"]) / 2


def draw(figure, seeds):
    """Accuracies, task by task."""
    for axes, (task, (_, names)) in zip(figure.subplots(1, 3, width_ratios=(4, 4, 2)), TASKS.items()):
        bars(axes, {name: [seed[f"{name} {task}"] for seed in seeds] for name in names}, f"accuracy, {task}")


claim = Claim(
    id="optimised-efficient-super-attention",
    run=run,
    criteria=(
        Criterion("mean accuracy: optimised within 0.01 of standard", lambda m: 0.01 + _mean(m, "optimised") - _mean(m, "standard")),
        Criterion("mean accuracy: efficient within 0.015 of standard", lambda m: 0.015 + _mean(m, "efficient") - _mean(m, "standard")),
        Criterion("accuracy on digits: super no less than standard", lambda m: m["super digits"] - m["standard digits"]),
        Criterion("accuracy on shuffled digits: super no more than 0.01 above efficient", lambda m: 0.01 + m["efficient shuffled"] - m["super shuffled"])),
    table=(("", *TASKS), {name: tuple(f"{name} {task}" if name in names else "" for task, (_, names) in TASKS.items()) for name in ARMS}),
    draw=draw)
