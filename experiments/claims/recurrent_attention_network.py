"""The paper: a recurrent attention network, whose windows hand on a cell, understands long documents about as well as or better than models that see them whole, where
windows by themselves do not; reviewing the cells tells early tokens what comes late.

Here: texts of 64 tokens of noise hold two markers, in different windows of 8, each of which says 0 or 1 (experiments/tasks/two_markers.py). Asked for is the
exclusive or of the two, by a linear map of the text's vector. Models of width 48 with four heads are trained 600 steps on 32 texts: two recurrent attention layers (the
last cell), two transformer blocks over the whole text, and two whose attention stays within windows (both the mean over tokens, learned positions). Besides, such
networks of one layer with and without the review say at every token what the first marker says, after 300 steps; accuracy is measured in windows after its own, and in
windows before it. The claim holds if the network has at least 95% of the accuracy of attention over the whole text, which has at least 80%, windows by themselves
stay below 60%, the cell alone tells at least 90% of later tokens, and the review earlier ones at least 20 points more than no review.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import masks
from attnx.memory import RanNet
from attnx.nn import Attention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import two_markers
from experiments.tiny import Tiny

FEATURES, HEADS, LENGTH, WINDOW, BATCH, STEPS = 48, 4, 64, 8, 32, 600
TEXTS, TOKENS = ("RAN", "whole text", "windows alone"), ("RAN", "RAN, no review")


def _ran(rngs, layers=2, **options):
    return RanNet(two_markers.VOCABULARY, FEATURES, num_layers=layers, outputs=2, num_heads=HEADS, head_size=FEATURES // HEADS, window_size=WINDOW, min_window=0,
                  rngs=rngs, **options)


def _transformer(rngs, mask=None):
    attention = lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=mask), rngs=rngs)
    return Tiny(FEATURES, [attention] * 2, inputs=two_markers.VOCABULARY, outputs=2, pooled=True, position="learned", max_length=LENGTH, rngs=rngs)


MAKE = {"RAN": lambda rngs: _ran(rngs, pooled=True), "whole text": _transformer, "windows alone": lambda rngs: _transformer(rngs, masks.within_blocks(WINDOW))}


def run(trial: Trial):
    """Trains three models to answer for texts, and two for tokens."""
    measured = {}
    sample = two_markers.sampler(LENGTH, WINDOW, BATCH)
    held = two_markers.sampler(LENGTH, WINDOW, trial.scaled(1024, 16))(jax.random.key(10_000 + trial.seed))
    for index, name in enumerate(TEXTS):
        params, apply = functional(MAKE[name](nnx.Rngs(trial.seed)))
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, batch.tokens), batch.both)
        params = fit(loss, params, sample, steps=trial.scaled(STEPS), trial=trial.part(0.25 * index, 0.25 * (index + 1)), name=name)
        measured[name] = 100 * accuracy(jax.jit(apply)(params, held.tokens), held.both)
    for index, name in enumerate(TOKENS):
        measured |= _tokens(trial.part(0.75 + 0.125 * index, 0.875 + 0.125 * index), name, sample, held)
    return measured


def _tokens(trial, name, sample, held):
    params, apply = functional(_ran(nnx.Rngs(trial.seed), 1, review=name == "RAN"))
    wanted = lambda batch: jnp.broadcast_to(batch.first[:, None], batch.tokens.shape)
    loss = lambda params, batch, key: cross_entropy(apply(params, batch.tokens), wanted(batch))
    params = fit(loss, params, sample, steps=trial.scaled(STEPS // 2), trial=trial, name=f"{name}, tokens")
    right = jnp.argmax(jax.jit(apply)(params, held.tokens), -1) == wanted(held)
    window, home = jnp.arange(LENGTH) // WINDOW, held.place[:, None] // WINDOW
    share = lambda chosen: 100 * jnp.sum(right & chosen) / chosen.sum()
    return {f"{name}, later": share(window > home), f"{name}, earlier": share(window < home)}


def draw(figure, seeds):
    """Accuracy of texts, and of tokens after and before the marker."""
    left, right = figure.subplots(1, 2)
    bars(left, {name: [seed[name] for seed in seeds] for name in TEXTS}, "texts right, %")
    names = [f"{name}, {where}" for name in TOKENS for where in ("later", "earlier")]
    bars(right, {name: [seed[name] for seed in seeds] for name in names}, "tokens right, %")


claim = Claim(
    id="recurrent-attention-network",
    run=run,
    criteria=(
        Criterion("texts: RAN at least 95% of attention over the whole text", lambda m: m["RAN"] - 0.95 * m["whole text"]),
        Criterion("texts: attention over the whole text at least 80%", lambda m: m["whole text"] - 80),
        Criterion("texts: windows alone below 60%", lambda m: 60 - m["windows alone"]),
        Criterion("tokens after the marker: at least 90% without the review", lambda m: m["RAN, no review, later"] - 90),
        Criterion("tokens before the marker: the review worth at least 20 points", lambda m: m["RAN, earlier"] - m["RAN, no review, earlier"] - 20)),
    table=(("", "texts, %", "tokens after, %", "tokens before, %"),
           {"RAN": ("RAN", "RAN, later", "RAN, earlier"), "RAN, no review": ("", "RAN, no review, later", "RAN, no review, earlier"),
            "whole text": ("whole text", "", ""), "windows alone": ("windows alone", "", "")}),
    draw=draw)
