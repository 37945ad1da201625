"""The paper: in place of non-local modules (softmax attention between all pixels) efficient attention does as well in detection and stereo matching, with memory in
proportion to the number of pixels.

Here: photographs with half of their pixels missing are restored by a network of three 3x3 convolutions (24 channels), alone, with an efficient attention module
(16 key and 24 value channels, one head) and with a non-local one of the same size after the second. It is trained 200 steps on eight crops of 24 by 24 pixels, on the
left three quarters of two photographs, and tested on 64 crops of their right quarters. Besides, the bytes that the compiler sets aside for a module's forward and
backward pass on 64 by 64 pixels: of both modules, the non-local one with its weights held as the paper's was, and of a non-local one computed in tiles, which did
not exist then.
The claim holds if efficient attention is at most 0.15 dB below the non-local module and above no module, and takes less than a tenth of the non-local module's bytes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import linear
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import photos

CHANNELS, KEYS, SIZE, LARGE, STEPS, BATCH, HELD = 24, 16, 24, 64, 200, 8, 64


class NonLocal(linear.EfficientAttention2d):
    """The same projections around softmax attention between all pixels."""

    implementation = None

    def __call__(self, x):
        tokens = x.reshape(x.shape[0], -1, self.in_channels)
        found = attnx.attention(self.query(tokens), self.key(tokens), self.value(tokens), implementation=self.implementation)
        return x + self.out(found).reshape(x.shape)


class Held(NonLocal):
    """With its weights in memory."""

    implementation = "reference"


def _module(kind):
    return lambda rngs: kind(CHANNELS, key_channels=KEYS, value_channels=CHANNELS, rngs=rngs)


ARMS = {"none": lambda rngs: None, "efficient": _module(linear.EfficientAttention2d), "non-local": _module(NonLocal)}
MEMORY = {"efficient": ARMS["efficient"], "non-local": _module(Held), "non-local in tiles": _module(NonLocal)}


class Restorer(nnx.Module):
    """Three convolutions, and a module between the second and the third; adds to the pixels that are there."""

    def __init__(self, module, rngs):
        sizes = (4, CHANNELS, CHANNELS, 3)
        self.convolutions = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in zip(sizes, sizes[1:])])
        self.module = nnx.data(module(rngs))

    def __call__(self, damaged):
        """[B, h, w, 4] to [B, h, w, 3]."""
        first, second, last = self.convolutions
        x = jax.nn.relu(second(jax.nn.relu(first(damaged))))
        x = x if self.module is None else self.module(x)
        return damaged[..., :3] + last(x)


@functools.cache
def _mebibytes(name):
    """Of temporary results, for an image of LARGE by LARGE."""
    params, apply = functional(MEMORY[name](nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((1, LARGE, LARGE, CHANNELS), jnp.float32)
    compiled = jax.jit(jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2), (0, 1))).lower(params, image).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def run(trial: Trial):
    """Trains all arms, and compiles for a larger image."""
    measured = {f"{name}, MiB": _mebibytes(name) for name in MEMORY}
    damaged, whole = photos.sampler(SIZE, HELD, held=True)(jax.random.key(10_000 + trial.seed))
    for index, (name, module) in enumerate(ARMS.items()):
        params, apply = functional(Restorer(module, nnx.Rngs(trial.seed)))
        loss = lambda params, batch, key, apply=apply: jnp.mean(jnp.square(apply(params, batch[0]) - batch[1]))
        params = fit(loss, params, photos.sampler(SIZE, BATCH), steps=trial.scaled(STEPS), trial=trial.part(index / len(ARMS), (index + 1) / len(ARMS)), name=name)
        measured[name] = photos.psnr(jax.jit(apply)(params, damaged), whole)
    return measured


def draw(figure, seeds):
    """What is restored, and what it takes."""
    left, right = figure.subplots(1, 2)
    bars(left, {name: [seed[name] for seed in seeds] for name in ARMS}, "PSNR of crops held out, dB")
    left.set_ylim(min(seed[name] for seed in seeds for name in ARMS) - 1)
    bars(right, {name: [seed[f"{name}, MiB"] for seed in seeds] for name in MEMORY}, f"MiB of temporary results, {LARGE} by {LARGE}")
    right.set_yscale("log")


claim = Claim(
    id="efficient-attention-linear",
    run=run,
    criteria=(
        Criterion("PSNR, dB: efficient at most 0.15 below non-local", lambda m: m["efficient"] - m["non-local"] + 0.15),
        Criterion("PSNR, dB: efficient above no module", lambda m: m["efficient"] - m["none"]),
        Criterion("temporary bytes: a tenth of non-local's less efficient's, MiB", lambda m: 0.1 * m["non-local, MiB"] - m["efficient, MiB"])),
    table=(("", "PSNR, dB", f"MiB, {LARGE} by {LARGE}"),
           {name: (name if name in ARMS else "", f"{name}, MiB" if name in MEMORY else "") for name in (*ARMS, "non-local in tiles")}),
    draw=draw)
