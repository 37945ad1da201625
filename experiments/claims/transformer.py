"""The paper: a model of attention alone translates better than recurrent and convolutional encoder-decoders with attention, for a small part of their training cost.

Here: sources of 6 to 16 of 20 tokens are to be written backwards through a fixed permutation of the tokens (experiments/tasks/reversal.py). The paper's model with 2
+ 2 layers (width 64, four heads, feed-forward 128), its optimiser and schedule (warm-up of 150 steps) and its smoothed labels is trained 600 steps on 64 sources;
once more without positions. The recurrent baseline, an LSTM encoder-decoder with additive attention and input feeding of as many parameters (width 84; Adam, cosine
schedule), is trained for as long, by the measured time of its steps. Measured on 1000 held-out sources: targets that greedy decoding gets wholly right.
The claim holds if the transformer gets at least 95% right, no fewer than the baseline, and fewer than 30% without positions.
"""


import jax
import optax
from flax import nnx

from attnx import models
from attnx.alignment import LuongDecoder
from attnx.nn import StackedLSTM
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import reversal
from experiments.timing import least_seconds

FEATURES, WIDTH, STEPS, BATCH, SHORTEST, LONGEST = 64, 84, 600, 64, 6, 16
ARMS = ("transformer", "no positions", "recurrent")


class Recurrent(nnx.Module):
    """The baseline."""

    def __init__(self, rngs):
        self.words = nnx.Embed(reversal.VOCABULARY, WIDTH, rngs=rngs)
        self.encoder = StackedLSTM(WIDTH, WIDTH, rngs=rngs)
        self.decoder = LuongDecoder(reversal.VOCABULARY, WIDTH, num_layers=1, kind="concat", rngs=rngs)

    def __call__(self, source, given, source_positions):
        seen = source_positions >= 0
        state, vectors = self.encoder(self.words(source), mask=seen)
        return self.decoder(given, vectors, mask=seen, lstm=state)


def _transformer(rngs, **changes):
    return models.OriginalTransformer(vocab_size=reversal.VOCABULARY, features=FEATURES, hidden_features=2 * FEATURES, num_heads=4, num_layers=2,
                                      dropout_rate=0.0, implementation="reference", unroll=True, rngs=rngs, **changes)


MAKE = {"transformer": _transformer, "no positions": lambda rngs: _transformer(rngs, position_embedding=None), "recurrent": Recurrent}


def run(trial: Trial):
    """Trains all arms, the recurrent one for as long as the transformer."""
    measured, pace = {}, {}
    held = reversal.sampler(SHORTEST, LONGEST, trial.scaled(1000, 8))(jax.random.key(10_000 + trial.seed))
    sample = reversal.sampler(SHORTEST, LONGEST, BATCH)
    noam = models.noam_schedule(FEATURES, warmup=150, scale=0.5)
    for index, name in enumerate(ARMS):
        params, apply = functional(MAKE[name](nnx.Rngs(trial.seed)))
        predict = lambda params, batch, apply=apply: apply(params, batch.source, batch.given, source_positions=batch.positions)

        def loss(params, batch, key, predict=predict, smoothing=0.0 if name == "recurrent" else 0.1):
            del key
            return models.label_smoothed_cross_entropy(predict(params, batch), batch.target, smoothing=smoothing, mask=batch.counted)

        step, batch = jax.jit(jax.grad(loss)), sample(jax.random.key(0))
        pace[name] = least_seconds(lambda: step(params, batch, None), trial.scaled(12, 1))
        steps, options = STEPS, dict(optimizer=optax.adam(lambda count: noam(count + 1), b1=0.9, b2=0.98, eps=1e-9))
        if name == "recurrent":
            steps, options = 10 * round(STEPS * pace["transformer"] / pace[name] / 10), dict(learning_rate=5e-3)
        params = fit(loss, params, sample, steps=trial.scaled(max(steps, 10)), trial=trial.part(index / 3, (index + 1) / 3), name=name, **options)
        measured |= {name: reversal.exact(jax.jit(predict)(params, held), held), f"{name} steps": steps,
                     f"{name} parameters": sum(x.size for x in jax.tree.leaves(params))}
    return measured


def draw(figure, seeds):
    """Targets that are wholly right."""
    bars(figure.subplots(), {name: [seed[name] for seed in seeds] for name in ARMS}, "share of targets wholly right")


claim = Claim(
    id="transformer",
    run=run,
    criteria=(
        Criterion("share of targets: transformer at least 0.95", lambda m: m["transformer"] - 0.95),
        Criterion("share of targets: transformer no worse than recurrent, trained for as long", lambda m: m["transformer"] - m["recurrent"]),
        Criterion("share of targets: without positions below 0.3", lambda m: 0.3 - m["no positions"])),
    table=(("", "wholly right", "steps", "parameters"), {name: (name, f"{name} steps", f"{name} parameters") for name in ARMS}),
    draw=draw)
