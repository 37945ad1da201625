"""The paper: pooling tokens before they attend, and a loss that keeps rows of attention apart, make vision transformers 2.4 points more accurate on corrupted ImageNet
and 0.4 on clean images.

Here: scikit-learn's digits, doubled in size, somewhere in 32 x 32 pixels among bright spots (experiments/tasks/corruptions.py). A vision transformer of 4 x 4
patches with three layers (width 48, four heads) is trained 400 steps on 24 clean pictures as it is, with the pooling, with the loss (weight 1), and with both.
Measured on a quarter held out: accuracy clean, and on average under Gaussian and shot noise, blur, contrast and pixelation at three severities; the cosine between a
picture's attention maps clean and corrupted; the weight of the five tokens that are looked at most.
The claim holds if both together gain a point of accuracy on corrupted pictures, lose at most half a point on clean ones, and have more stable maps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.nn import record
from attnx.objectives import TAPBlock, attention_diversification_loss
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit
from experiments.tasks import corruptions, digits

FEATURES, PATCH, GRID = 48, 4, corruptions.SIDE // 4
ARMS = {"plain": (False, 0.0), "pooling": (True, 0.0), "loss": (False, 1.0), "both": (True, 1.0)}


class Vision(nnx.Module):
    """Patches, three blocks, and the mean."""

    def __init__(self, pooling, rngs):
        self.embed = nnx.Linear(PATCH**2, FEATURES, rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (GRID, GRID, FEATURES)))
        self.blocks = nnx.List([TAPBlock(FEATURES, 4, pooling=pooling, hidden_features=2 * FEATURES, rngs=rngs) for _ in range(3)])
        self.norm, self.head = nnx.LayerNorm(FEATURES, rngs=rngs), nnx.Linear(FEATURES, digits.CLASSES, rngs=rngs)

    def __call__(self, pictures, *, train=False, hooks=None):
        x = pictures.reshape(-1, GRID, PATCH, GRID, PATCH).swapaxes(2, 3).reshape(-1, GRID, GRID, PATCH**2)
        x = self.embed(x) + self.places
        for layer, block in enumerate(self.blocks):
            x = block(x, train=train, hooks=hooks, layer=layer)
        return self.head(self.norm(x).mean(axis=(1, 2)))


@nnx.jit
def _look(model, pictures):
    """Logits, and of each layer the attention [layers, B, T, T], the mean over heads."""
    logits, maps = record(model, pictures)
    return logits, maps.mean(axis=2)


@nnx.jit
def _remember(model, pictures):
    """Adds to the statistics of the norms."""
    model(pictures, train=True)


def run(trial: Trial):
    """Trains and measures all arms."""
    measured = {}
    sample, (clean, labels) = corruptions.sampler(trial.seed, 24)
    clean, labels = clean[:trial.scaled(len(labels), 16)], labels[:trial.scaled(len(labels), 16)]
    for index, (name, (pooling, weight)) in enumerate(ARMS.items()):
        graph, params, rest = nnx.split(Vision(pooling, nnx.Rngs(trial.seed)), nnx.Param, ...)

        def loss(params, batch, key, graph=graph, rest=rest, weight=weight):
            del key
            logits, maps = record(nnx.merge(graph, params, rest, copy=True), batch[0], train=True)
            return cross_entropy(logits, batch[1]) + weight * attention_diversification_loss(maps)

        params = fit(loss, params, sample, steps=trial.scaled(400), trial=trial.part(index / 4, (index + 1) / 4), name=name)
        model = nnx.merge(graph, params, rest)
        for key in jax.random.split(jax.random.key(30_000 + trial.seed), trial.scaled(40, 1)) if pooling else ():
            _remember(model, sample(key)[0])
        logits, maps = _look(model, clean)
        right, alike = [], []
        for place, kind in enumerate(corruptions.CORRUPTIONS):
            for severity in corruptions.SEVERITIES:
                wrong, changed = _look(model, corruptions.corrupt(kind, clean, severity, jax.random.key(100 * place + severity)))
                right.append(accuracy(wrong, labels))
                alike.append(jnp.mean(jnp.sum(maps * changed, -1) / (jnp.linalg.norm(maps, axis=-1) * jnp.linalg.norm(changed, axis=-1))))
        top = jax.lax.top_k(maps.mean(axis=2), 5)[0].sum(-1).mean()
        measured |= {f"{name}, clean": accuracy(logits, labels), f"{name}, corrupted": jnp.mean(jnp.stack(right)),
                     f"{name}, stability": jnp.mean(jnp.stack(alike)), f"{name}, top": top}
    return measured


def draw(figure, seeds):
    """Accuracy on clean and corrupted pictures, and stability of the maps."""
    panels = (("accuracy, clean", "clean"), ("accuracy, corrupted", "corrupted"), ("cosine of maps, clean and corrupted", "stability"))
    for axes, (label, what) in zip(figure.subplots(1, 3), panels):
        bars(axes, {name: [seed[f"{name}, {what}"] for seed in seeds] for name in ARMS}, label)


claim = Claim(
    id="tap-adl-robust-token-attention",
    run=run,
    criteria=(
        Criterion("accuracy, corrupted: both a point above plain", lambda m: m["both, corrupted"] - m["plain, corrupted"] - 0.01),
        Criterion("accuracy, clean: both at most half a point below plain", lambda m: m["both, clean"] - m["plain, clean"] + 0.005),
        Criterion("cosine of maps: both above plain", lambda m: m["both, stability"] - m["plain, stability"])),
    table=(("", "clean", "corrupted", "cosine of maps", "top 5"),
           {name: tuple(f"{name}, {what}" for what in ("clean", "corrupted", "stability", "top")) for name in ARMS}),
    draw=draw)
