"""The paper: transformers that know the offset between tokens, by vectors for clipped offsets, translate better than transformers that know where each token is,
by sinusoids; and knowing both is no better than knowing offsets.

Here: a causal transformer of one block (width 32, two heads, 400 steps of 64 sequences) copies the token five places back. Sequences of 24 random tokens start
at positions 0 to 31 in training and 32 to 63 in the test. It is told offsets (c = 8, vectors for keys and values), or positions (learned vectors,
or sinusoids), or offsets and learned positions; besides, offsets by the vectors of keys alone, and by those of values alone.
The claim holds if offsets bring more than 95% of the answers right in the test, the better kind of positions at least 20 points less, and offsets with positions
no more (by half a point).
"""

import jax
from flax import nnx

import attnx
from attnx import masks
from attnx.nn import Attention
from attnx.positions import RelativeSelfAttention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import copy_back
from experiments.tiny import Tiny

FEATURES, HEADS, CLIP, LENGTH, STARTS = 32, 2, 8, 24, 64


def _relative(tables="both"):
    return lambda rngs: RelativeSelfAttention(FEATURES, HEADS, clip=CLIP, is_causal=True, tables=tables, rngs=rngs)


def _plain(rngs):
    return Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=masks.causal(), implementation="reference"), rngs=rngs)


ARMS = {"offsets": (_relative(), None), "learned positions": (_plain, "learned"), "sinusoids": (_plain, "sinusoidal"),
        "offsets and positions": (_relative(), "learned"), "offsets, keys only": (_relative("keys"), None), "offsets, values only": (_relative("values"), None)}


def run(trial: Trial):
    """Trains all arms, and measures them at positions of training and beyond."""
    measured = {}
    for index, (name, (attention, position)) in enumerate(ARMS.items()):
        params, apply = functional(Tiny(FEATURES, [attention], inputs=copy_back.VOCABULARY, position=position, max_length=STARTS + LENGTH,
                                        rngs=nnx.Rngs(trial.seed)))
        answer = lambda params, batch, apply=apply: apply(params, batch[0], positions=batch[1])[:, copy_back.DISTANCE:]
        params = fit(lambda params, batch, key: cross_entropy(answer(params, batch), copy_back.answers(batch[0])), params,  # noqa: B023
                     copy_back.sampler(LENGTH, 64, (0, STARTS // 2)), steps=trial.scaled(400), trial=trial.part(index / len(ARMS), (index + 1) / len(ARMS)),
                     name=name)
        for kind, starts in (("known", (0, STARTS // 2)), ("new", (STARTS // 2, STARTS))):
            batch = copy_back.sampler(LENGTH, trial.scaled(512, 8), starts)(jax.random.key(10_000 + trial.seed))
            measured[f"{name}, {kind}"] = accuracy(jax.jit(answer)(params, batch), copy_back.answers(batch[0]))
    return measured


def draw(figure, seeds):
    """Accuracy at positions of training, and beyond."""
    for axes, kind in zip(figure.subplots(1, 2), ("known", "new")):
        bars(axes, {name: [seed[f"{name}, {kind}"] for seed in seeds] for name in ARMS}, f"accuracy at {kind} positions")


claim = Claim(
    id="shaw-relative-positions",
    run=run,
    criteria=(
        Criterion("accuracy at new positions: offsets above 0.95", lambda m: m["offsets, new"] - 0.95),
        Criterion("accuracy at new positions: the better kind of positions at least 0.2 below offsets",
                  lambda m: m["offsets, new"] - max(m["learned positions, new"], m["sinusoids, new"]) - 0.2),
        Criterion("accuracy at new positions: offsets with positions no better than offsets, by 0.005",
                  lambda m: m["offsets, new"] - m["offsets and positions, new"] + 0.005)),
    table=(("", "accuracy, known positions", "new positions"), {name: (f"{name}, known", f"{name}, new") for name in ARMS}),
    draw=draw)
