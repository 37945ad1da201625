"""The paper: mixing tokens by an adaptive filter of their spectrum beats FNet's fixed Fourier transform and standard attention on long-range tasks and images, in time
O(T log T).

Here: which three of eight tones sound in noise, and in which half of 256 tokens a chirp is, by classifiers of two blocks of width 32 that differ in their mixer
alone: FFTNet, FFTNet with a filter that does not adapt, FNet (the real part of the transform over tokens and features) and softmax attention with four heads; 300
steps of 32 sequences. Tones count as right if all eight are. Digits read pixel by pixel (64 tokens, 200 steps) are reported besides; so is the half of the chirp,
which none of them finds in so few steps. The claim holds if FFTNet names tones better than FNet and no worse than attention, and the time of its mixing grows with T
from 1024 to 8192 at most as T^1.3.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import attnx
from attnx.mixers import FFTNetClassifier, FFTNetMixer, spectral_mix
from attnx.nn import Attention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits, tones

FEATURES, HEADS, BATCH = 32, 4, 32
LENGTHS = (1024, 2048, 4096, 8192)


class FNet(nnx.Module):
    """The real part of the Fourier transform over tokens and features; called like attention."""

    def __call__(self, x, **options):
        """[B, T, D] to the same."""
        return jnp.fft.fft2(x, norm="ortho").real


MIXERS = {"FFTNet": lambda length: lambda rngs: FFTNetMixer(FEATURES, length, num_heads=HEADS, rngs=rngs),
          "FFTNet, fixed filter": lambda length: lambda rngs: FFTNetMixer(FEATURES, length, num_heads=HEADS, adaptive=False, rngs=rngs),
          "FNet": lambda length: lambda rngs: FNet(), "softmax": lambda length: lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.pairs(), rngs=rngs)}


def _model(name, length, outputs, seed):
    return functional(FFTNetClassifier(1, FEATURES, length, outputs, mixer=MIXERS[name](length), dropout_rate=0.0, rngs=nnx.Rngs(seed)))


def run(trial: Trial):
    """Trains all arms on both tasks, and times the mixer."""
    measured = {}
    train, (images, labels) = digits.split(trial.seed)
    for index, name in enumerate(MIXERS):
        part = trial.part(0.23 * index, 0.23 * (index + 1))
        params, apply = _model(name, tones.LENGTH, len(tones.FREQUENCIES) + 1, trial.seed)
        loss = lambda params, batch, key, apply=apply: optax.sigmoid_binary_cross_entropy(apply(params, batch[0]), batch[1]).mean()
        params = fit(loss, params, tones.sampler(BATCH), steps=trial.scaled(300), trial=part.part(0.0, 0.8), name=f"{name}, tones")
        signal, wanted = tones.sampler(trial.scaled(1024, 16))(jax.random.key(10_000 + trial.seed))
        right = (jax.jit(apply)(params, signal) > 0) == (wanted > 0.5)
        measured |= {f"{name}, tones": right[:, :-1].all(-1).mean(), f"{name}, chirp": right[:, -1].mean()}
        params, apply = _model(name, 64, digits.CLASSES, trial.seed)
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, digits.sequence(batch[0])), batch[1])
        params = fit(loss, params, digits.sampler(train, BATCH), steps=trial.scaled(200), trial=part.part(0.8, 1.0), name=f"{name}, digits")
        measured[f"{name}, digits"] = accuracy(jax.jit(apply)(params, digits.sequence(images)), labels)
    return measured | _times(trial)


def _times(trial):
    """Milliseconds of mixing at each length, the least of seven, and the slope of their logarithms."""
    lengths = [length // (16 if trial.smoke else 1) for length in LENGTHS]
    found = []
    for length in lengths:
        x, base = jax.random.normal(jax.random.key(0), (1, length, FEATURES)), jnp.ones((HEADS, length // 2 + 1))
        mix = jax.jit(spectral_mix)
        mix(x, base, bias=-0.1 * base).block_until_ready()
        runs = []
        for _ in range(trial.scaled(7, 1)):
            began = time.perf_counter()
            mix(x, base, bias=-0.1 * base).block_until_ready()
            runs.append(time.perf_counter() - began)
        found.append(1000 * min(runs))
    return {"slope": np.polyfit(np.log(lengths), np.log(found), 1)[0], "times": found}


def draw(figure, seeds):
    """Accuracy on tones and on the half of the chirp, and the times."""
    left, middle, right = figure.subplots(1, 3)
    for axes, task in ((left, "tones"), (middle, "chirp")):
        bars(axes, {name: [seed[f"{name}, {task}"] for seed in seeds] for name in MIXERS}, f"accuracy, {task}")
    lines(right, LENGTHS, {"FFTNet": [seed["times"] for seed in seeds]}, "tokens", "milliseconds")
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)


claim = Claim(
    id="fftnet",
    run=run,
    criteria=(
        Criterion("tones: FFTNet above FNet", lambda m: m["FFTNet, tones"] - m["FNet, tones"]),
        Criterion("tones: FFTNet no worse than softmax", lambda m: m["FFTNet, tones"] - m["softmax, tones"]),
        Criterion("time of mixing grows at most as T^1.3", lambda m: 1.3 - m["slope"])),
    table=(("mixer", "tones, all right", "half of the chirp", "digits"), {name: (f"{name}, tones", f"{name}, chirp", f"{name}, digits") for name in MIXERS}),
    draw=draw)
