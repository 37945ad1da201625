"""The paper: Mega, one head of gated attention over exponential moving averages, does better than Transformers on the Long Range Arena, and nearly as well
with attention in chunks.

Here: digits read pixel by pixel (64 tokens) and small ListOps (at most 100 tokens, depth 3), by two layers of width 64: Mega (z 32, v 128, 8 dimensions a
channel in each direction, softmax), Mega without its averages, Mega with chunks of 16, and a Transformer with four heads, learned positions and as many
parameters; 300 steps of 32 sequences each, on ListOps Mega and the Transformer alone. The claim holds if Mega is above the Transformer on digits, loses more
than three points there without averages, and at most two points by chunks.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx.mixers import MegaLayer, NormalizedFFN
from attnx.nn import Attention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits, listops
from experiments.tiny import Tiny

FEATURES, LENGTH, STEPS, BATCH = 64, 100, 300, 32


class WithoutAverage(MegaLayer):
    """Mega whose queries and keys are made of each token alone."""

    def _average(self, x, positions, segment_ids):
        return jax.nn.silu(self.omega[...] * x)


class Mega(nnx.Module):
    """Tokens or numbers in, logits of the whole out; token PAD does not count."""

    def __init__(self, layer, inputs, outputs, rngs, **options):
        self.embed = nnx.Linear(1, FEATURES, rngs=rngs) if inputs is None else nnx.Embed(inputs, FEATURES, rngs=rngs)
        make = lambda: layer(FEATURES, 32, 128, 8, causal=False, max_length=LENGTH, rngs=rngs, **options)
        self.layers = nnx.List([part for _ in range(2) for part in (make(), NormalizedFFN(FEATURES, 128, rngs=rngs))])
        self.norm, self.head = nnx.LayerNorm(FEATURES, rngs=rngs), nnx.Linear(FEATURES, outputs, rngs=rngs)

    def __call__(self, x, positions=None):
        """Logits [B, outputs]."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, positions=positions) if isinstance(layer, MegaLayer) else layer(x)
        return self.head(_mean(self.norm(x), positions))


class Transformer(nnx.Module):
    """The same around a transformer."""

    def __init__(self, inputs, outputs, rngs):
        attention = lambda rngs: Attention(FEATURES, 4, mechanism=attnx.pairs(), rngs=rngs)
        self.body = Tiny(FEATURES, [attention] * 2, inputs=inputs, outputs=outputs, input_size=1, hidden=200, position="learned", max_length=LENGTH, norm="layer",
                         rngs=rngs)

    def __call__(self, x, positions=None):
        """Logits [B, outputs]."""
        return self.body.head(_mean(self.body.hidden(x, **({} if positions is None else {"positions": positions})), positions))


def _mean(x, positions):
    if positions is None:
        return x.mean(axis=1)
    real = (positions >= 0)[..., None]
    return jnp.sum(jnp.where(real, x, 0), axis=1) / real.sum(axis=1)


ARMS = {"Mega": lambda *a: Mega(MegaLayer, *a), "Transformer": lambda *a: Transformer(*a), "Mega without averages": lambda *a: Mega(WithoutAverage, *a),
        "Mega, chunks of 16": lambda *a: Mega(MegaLayer, *a, chunk=16)}


def run(trial: Trial):
    """Trains all arms on digits, and two on ListOps."""
    measured = {}
    train, (images, labels) = digits.split(trial.seed)
    for index, (name, make) in enumerate(ARMS.items()):
        params, apply = functional(make(None, digits.CLASSES, nnx.Rngs(trial.seed)))
        measured[f"{name}, parameters"] = sum(x.size for x in jax.tree.leaves(params))
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, digits.sequence(batch[0])), batch[1])
        params = fit(loss, params, digits.sampler(train, BATCH), steps=trial.scaled(STEPS), trial=trial.part(0.17 * index, 0.17 * (index + 1)),
                     name=f"{name}, digits")
        measured[f"{name}, digits"] = 100 * accuracy(jax.jit(apply)(params, digits.sequence(images)), labels)
    for index, name in enumerate(("Mega", "Transformer")):
        measured[f"{name}, ListOps"] = _listops(trial.part(0.68 + 0.16 * index, 0.84 + 0.16 * index), name)
    return measured


def _listops(trial, name):
    tokens, answers = (jnp.asarray(x) for x in listops.examples(trial.scaled(6000, 64), 2 * trial.seed))
    held, wanted = (jnp.asarray(x) for x in listops.examples(trial.scaled(1000, 64), 2 * trial.seed + 1))
    params, apply = functional(ARMS[name](listops.VOCABULARY, listops.CLASSES, nnx.Rngs(trial.seed)))
    answer = lambda params, tokens: apply(params, tokens, jnp.where(tokens == listops.PAD, -1, jnp.arange(tokens.shape[1])))

    def sample(key):
        chosen = jax.random.randint(key, (BATCH,), 0, len(answers))
        return tokens[chosen], answers[chosen]

    params = fit(lambda params, batch, key: cross_entropy(answer(params, batch[0]), batch[1]), params, sample, steps=trial.scaled(STEPS), trial=trial,
                 name=f"{name}, ListOps")
    return 100 * accuracy(jax.jit(answer)(params, held), wanted)


def draw(figure, seeds):
    """Accuracy on both."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    bars(left, {name: [seed[f"{name}, digits"] for seed in seeds] for name in ARMS}, "accuracy, digits by pixel, %")
    bars(right, {name: [seed[f"{name}, ListOps"] for seed in seeds] for name in ("Mega", "Transformer")}, "accuracy, ListOps, %")


claim = Claim(
    id="mega",
    run=run,
    criteria=(
        Criterion("digits: Mega above the Transformer, points", lambda m: m["Mega, digits"] - m["Transformer, digits"]),
        Criterion("digits: averages worth more than three points", lambda m: m["Mega, digits"] - m["Mega without averages, digits"] - 3),
        Criterion("digits: chunks cost at most two points", lambda m: m["Mega, chunks of 16, digits"] - m["Mega, digits"] + 2)),
    table=(("", "digits, %", "ListOps, %", "parameters"),
           {name: (f"{name}, digits", f"{name}, ListOps" if name in ("Mega", "Transformer") else "", f"{name}, parameters") for name in ARMS}),
    draw=draw)
