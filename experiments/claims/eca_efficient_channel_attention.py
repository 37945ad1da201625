"""The paper: gates from a kernel of a few weights over the channels' means give ResNet-50 2.3 points on ImageNet with 80 parameters, as much as or more than
squeeze and excitation with 2.5 million; what matters is that channels interact without a bottleneck.

Here: digits, each filtered in eight fixed ways, and for each filter a channel of noise beside it; which of the two is the image changes from sample to
sample, so a gate must look at what is there. A residual network (16, 32, 64 channels, one block each; norms by the statistics of the batch) is trained 200
steps of 32 images with each gate on its residual branches, and tested on the 450 digits held out. The claim holds if ECA (k = 3) has half a point over no
gates, is within half a point of SE (r = 4) with under 2% of its parameters, and is no worse than SE-Var2, which has no interaction of channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import vision
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits

WIDTHS, STEPS, BATCH = (16, 32, 64), 200, 32
FILTERS = jnp.array([[[0, 0, 0], [0, 1, 0], [0, 0, 0]], [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
                     [[0, -1, 0], [-1, 4, -1], [0, -1, 0]], [[1, 1, 1], [1, 1, 1], [1, 1, 1]], [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]],
                     [[2, 1, 0], [1, 0, -1], [0, -1, -2]], [[1, -2, 1], [-2, 4, -2], [1, -2, 1]]], jnp.float32)


class Gate(nnx.Module):
    """A gate with arrays for its parameters."""

    def __init__(self, apply, shapes, rngs):
        self.apply = apply
        self.weights = nnx.List([nnx.Param(jax.random.normal(rngs.params(), shape) * shape[0] ** -0.5) for shape in shapes])

    def __call__(self, x):
        """x, gated."""
        return self.apply(x, *(w[...] for w in self.weights))


GATES = {"none": lambda c, rngs: Gate(lambda x: x, (), rngs), "SE": lambda c, rngs: Gate(vision.se, ((c, c // 4), (c // 4, c)), rngs),
         "SE-Var2": lambda c, rngs: Gate(vision.se_var2, ((c,),), rngs), "SE-Var3": lambda c, rngs: Gate(vision.se_var3, ((c, c),), rngs),
         "ECA, k = 3": lambda c, rngs: vision.ECA(c, 3, rngs=rngs), "ECA, k = 5": lambda c, rngs: vision.ECA(c, 5, rngs=rngs)}


class Norm(nnx.Module):
    """Batch norm by the statistics of the batch, in training and in tests."""

    def __init__(self, channels):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        """x, normalised."""
        axes = (0, 1, 2)
        return (x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + 1e-5) * self.scale[...] + self.bias[...]


class ResNet(nnx.Module):
    """A stem, a residual block a width, and a classifier of the mean."""

    def __init__(self, gate, rngs):
        conv = lambda inputs, outputs, size=3, stride=1: nnx.Conv(inputs, outputs, (size, size), strides=stride, use_bias=False, rngs=rngs)
        self.stem = conv(2 * len(FILTERS), WIDTHS[0])
        stages = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2, 2))
        self.blocks = nnx.List([nnx.List([conv(inputs, c, 3, stride), Norm(c), conv(c, c), Norm(c), GATES[gate](c, rngs), conv(inputs, c, 1, stride)])
                                for inputs, c, stride in stages])
        self.head = nnx.Linear(WIDTHS[-1], digits.CLASSES, rngs=rngs)

    def __call__(self, x):
        """Logits [B, classes] of x [B, H, W, C]."""
        x = self.stem(x)
        for first, first_norm, second, second_norm, gate, skip in self.blocks:
            x = jax.nn.relu(gate(second_norm(second(jax.nn.relu(first_norm(first(x)))))) + skip(x))
        return self.head(x.mean((1, 2)))


def channels(key, images):
    """[B, 8, 8, 16]: in each pair of channels a filtered image and noise, in random order."""
    order, noise = jax.random.split(key)
    filters = (FILTERS / jnp.abs(FILTERS).sum((1, 2), keepdims=True)).transpose(1, 2, 0)[:, :, None]
    seen = jax.lax.conv_general_dilated(images[..., None], filters, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    seen = seen / seen.std((0, 1, 2))
    first = jax.random.bernoulli(order, shape=(len(images), 1, 1, seen.shape[-1]))
    noise = 2 * jax.random.normal(noise, seen.shape)
    return jnp.stack([jnp.where(first, seen, noise), jnp.where(first, noise, seen)], axis=-1).reshape(*images.shape, -1)


def run(trial: Trial):
    """Trains all arms."""
    train, (images, labels) = digits.split(trial.seed)
    held = channels(jax.random.key(9_000 + trial.seed), images)
    draw = digits.sampler(train, BATCH)
    measured = {}
    for index, name in enumerate(GATES):
        params, apply = functional(ResNet(name, nnx.Rngs(trial.seed)))

        def loss(params, batch, key, apply=apply):
            return cross_entropy(apply(params, channels(key, batch[0])), batch[1])

        params = fit(loss, params, draw, steps=trial.scaled(STEPS), trial=trial.part(index / len(GATES), (index + 1) / len(GATES)), name=name)
        measured[name] = 100 * accuracy(jax.jit(apply)(params, held), labels)
        gates = (GATES[name](c, nnx.Rngs(0)) for c in WIDTHS)
        measured[f"{name}, parameters"] = sum(x.size for gate in gates for x in jax.tree.leaves(nnx.state(gate, nnx.Param)))
    return measured


def draw(figure, seeds):
    """Accuracy of all arms."""
    axes = figure.subplots()
    bars(axes, {f"{name} ({seeds[0][f'{name}, parameters']})": [seed[name] for seed in seeds] for name in GATES}, "accuracy on digits held out, %")
    lowest = min(seed[name] for seed in seeds for name in GATES)
    axes.set_ylim(max(0, lowest - 5), 100)


claim = Claim(
    id="eca-efficient-channel-attention",
    run=run,
    criteria=(
        Criterion("ECA half a point above no gates, points", lambda m: m["ECA, k = 3"] - m["none"] - 0.5),
        Criterion("ECA at most half a point below SE, points", lambda m: m["ECA, k = 3"] - m["SE"] + 0.5),
        Criterion("ECA with less than 2% of the parameters of SE's gates, share", lambda m: 0.02 - m["ECA, k = 3, parameters"] / m["SE, parameters"]),
        Criterion("ECA no worse than SE-Var2, points", lambda m: m["ECA, k = 3"] - m["SE-Var2"])),
    table=(("gate", "accuracy, %", "its parameters"), {name: (name, f"{name}, parameters") for name in GATES}),
    draw=draw,
    seeds=5)
