"""The paper: shallow feed-forward networks that imitate attention layers take their place in encoder and decoder at little cost in translation, but taking the place of
attention to the encoder costs a lot.

Here: sources of 4 to 10 of 20 tokens are to be written backwards through a fixed permutation of the tokens (experiments/tasks/reversal.py). A transformer of 2 + 2
layers (width 32, four heads, feed-forward 64) is trained 900 steps on 64 sources. Then, for the encoder's self-attention, the decoder's and its attention to the
encoder, networks of sizes S and L imitate both layers (ALR: 500 steps of Adam at 1e-3 on 64 of 3000 recorded sentences) and take their places together. Measured on
1000 held-out sources: target tokens, END included, that are the likeliest given those before. The claim holds if networks of size L cost at most five points in the
encoder and in the decoder, at least five points more in attention to the encoder than in either, and imitate the encoder better than those of size S.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import masks, mixers
from attnx.models import EncoderDecoder, TransformerConfig
from attnx.nn import unstack
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import cross_entropy, fit, functional
from experiments.tasks import reversal

FEATURES, SHORTEST, LONGEST = 32, 4, 10
PLACES = {"encoder": ("encoder", False), "decoder": ("decoder", False), "to the encoder": ("decoder", True)}
SIZES = ("S", "L")


def _teacher(rngs):
    config = TransformerConfig(vocab_size=reversal.VOCABULARY, features=FEATURES, hidden_features=2 * FEATURES, num_heads=4, num_layers=2, mlp="gelu", norm="layer",
                               position=None, position_embedding="sinusoidal")
    everything = attnx.pairs(implementation="reference")
    return unstack(EncoderDecoder(config, attnx.pairs(mask=masks.causal(), implementation="reference"), encoder_mechanism=everything, cross_mechanism=everything,
                                  rngs=rngs))


def _student(place, size, rngs):
    length = LONGEST if place != "decoder" else LONGEST + 1
    kind = {"encoder": mixers.SentenceFF, "decoder": mixers.CausalSentenceFF, "to the encoder": mixers.CrossSentenceFF}[place]
    return kind(length, FEATURES, mixers.hidden_size("ALR", size, length, FEATURES), rngs=rngs)


def _call(model, batch):
    return model(batch.source, batch.given, source_positions=batch.positions, target_positions=_target_positions(batch))


def _target_positions(batch):
    return jnp.where(batch.counted, jnp.arange(batch.target.shape[1]), -1)


@functools.partial(nnx.jit, static_argnames=("half", "cross"))
def _record(model, batch, half, cross):
    return mixers.extract_io(getattr(model, half), lambda: _call(model, batch), cross=cross)[1]


@nnx.jit
def _right(model, batch):
    return 100 * jnp.sum((jnp.argmax(_call(model, batch), -1) == batch.target) & batch.counted) / batch.counted.sum()


def run(trial: Trial):
    """Trains the teacher; then, place by place and size by size, two students."""
    teacher = _teacher(nnx.Rngs(trial.seed))
    params, apply = functional(teacher)

    def loss(params, batch, key):
        del key
        logits = apply(params, batch.source, batch.given, source_positions=batch.positions, target_positions=_target_positions(batch))
        return cross_entropy(jnp.where(batch.counted[..., None], logits, 0), batch.target)  # padding adds a constant

    params = fit(loss, params, reversal.sampler(SHORTEST, LONGEST, 64), steps=trial.scaled(900), trial=trial.part(0.0, 0.4), name="teacher")
    nnx.update(teacher, params)
    held = reversal.sampler(SHORTEST, LONGEST, trial.scaled(1000, 8))(jax.random.key(10_000 + trial.seed))
    seen = reversal.sampler(SHORTEST, LONGEST, trial.scaled(3000, 8))(jax.random.key(20_000 + trial.seed))
    measured = {"teacher": _right(teacher, held)}
    for index, (place, (half, cross)) in enumerate(PLACES.items()):
        data = _record(teacher, seen, half, cross)
        for size in SIZES:
            taken, losses = [], []
            for layer, io in enumerate(data):
                student = _student(place, size, nnx.Rngs(100 * trial.seed + layer))
                found = mixers.distill_attention(student, io, steps=trial.scaled(500), key=jax.random.key(trial.seed))
                losses.append(found[-50:].mean() / jnp.mean(io.outputs[io.positions >= 0] ** 2))
                taken.append(mixers.swap(getattr(teacher, half), layer, student, cross=cross))
            measured |= {f"{place}, {size}": _right(teacher, held), f"{place}, {size}, error": jnp.mean(jnp.stack(losses))}
            for layer, attention in enumerate(taken):
                mixers.swap(getattr(teacher, half), layer, attention, cross=cross)
        trial.report(0.4 + 0.2 * (index + 1), place)
    return measured


def _cost(measured, place):
    """Points lost by networks of size L."""
    return measured["teacher"] - measured[f"{place}, L"]


def draw(figure, seeds):
    """Tokens right with networks of size L, and errors by size."""
    left, right = figure.subplots(1, 2)
    bars(left, {"teacher": [seed["teacher"] for seed in seeds], **{place: [seed[f"{place}, L"] for seed in seeds] for place in PLACES}}, "tokens right, %, size L")
    lines(right, range(len(SIZES)), {place: [[seed[f"{place}, {size}, error"] for size in SIZES] for seed in seeds] for place in PLACES}, "size of networks",
          "squared error / squared output")
    right.set_xticks(range(len(SIZES)), SIZES)


claim = Claim(
    id="ff-attention-replacement",
    run=run,
    criteria=(
        Criterion("points: in the encoder at most five lost", lambda m: 5 - _cost(m, "encoder")),
        Criterion("points: in the decoder at most five lost", lambda m: 5 - _cost(m, "decoder")),
        Criterion("points: attention to the encoder costs at least five more than either",
                  lambda m: _cost(m, "to the encoder") - max(_cost(m, "encoder"), _cost(m, "decoder")) - 5),
        Criterion("relative error in the encoder: L below S", lambda m: m["encoder, S, error"] - m["encoder, L, error"])),
    table=(("in the place of attention of", *(f"{size}, tokens right %" for size in SIZES), *(f"{size}, error" for size in SIZES)),
           {"nothing (teacher)": ("teacher", *("",) * 5),
            **{place: (*(f"{place}, {size}" for size in SIZES), *(f"{place}, {size}, error" for size in SIZES)) for place in PLACES}}),
    draw=draw)
