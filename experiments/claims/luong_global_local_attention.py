"""The paper: in translation attention is worth up to five BLEU over a decoder without it; local attention with a predicted centre is the best, and its cost does not
depend on the length of the source.

Here: words among fillers are to be copied without the fillers (sources of 12 to 24 tokens; experiments/tasks/insertions.py). An LSTM of width 64 reads the source
from its end and hands its last state to one that writes the target; trained 500 steps on 32 sources without attention, with global attention (dot, general), with
local attention (general, five words to either side) around the target's own position and around a predicted one, and the last with input feeding too. Measured on
held-out sources: the share of words that are right given those before. Besides, the operations of local attention as compiled, for sources of 64 and of 4096 words.
The claim holds if every attention without input feeding beats none, predicted centres are at least as good as fixed ones, and operations grow by less than a tenth.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnx.alignment import LuongDecoder, luong_local_attention
from attnx.nn import StackedLSTM
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import insertions

FEATURES, LENGTH, BATCH, REACH = 64, 24, 32, 5
LOCAL = dict(kind="general", reach=REACH)
ARMS = {"none": None, "global, dot": dict(kind="dot"), "global, general": dict(kind="general"), "local-m": LOCAL | dict(mode="local-m"),
        "local-p": LOCAL | dict(mode="local-p"), "local-p, fed": LOCAL | dict(mode="local-p", input_feeding=True)}
PLAIN = tuple(ARMS)[1:-1]


class Blind(nnx.Module):
    """In place of attention: a layer on the decoder's state alone."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, query, source, *, mask, positions):
        return jnp.tanh(self.linear(query))


class Copier(nnx.Module):
    """An encoder and a decoder."""

    def __init__(self, attention, rngs):
        self.words = nnx.Embed(insertions.VOCABULARY, FEATURES, rngs=rngs)
        self.encoder = StackedLSTM(FEATURES, FEATURES, rngs=rngs)
        self.decoder = LuongDecoder(insertions.VOCABULARY, FEATURES, num_layers=1, rngs=rngs, **{"input_feeding": False, **(attention or {})})
        if attention is None:
            self.decoder.attention = Blind(rngs)

    def __call__(self, batch):
        state, source = self.encoder(self.words(batch.source), mask=batch.seen, reverse=True)
        return self.decoder(batch.given, source, mask=batch.seen, lstm=state)


def run(trial: Trial):
    """Trains and measures all arms."""
    measured = {}
    held = insertions.sampler(LENGTH, trial.scaled(512, 8))(jax.random.key(10_000 + trial.seed))
    for index, (name, attention) in enumerate(ARMS.items()):
        params, apply = functional(Copier(attention, nnx.Rngs(trial.seed)))

        def loss(params, batch, key, apply=apply):
            del key
            cost = optax.softmax_cross_entropy_with_integer_labels(apply(params, batch), batch.target)
            return jnp.sum(jnp.where(batch.counted, cost, 0)) / jnp.sum(batch.counted)

        params = fit(loss, params, insertions.sampler(LENGTH, BATCH), steps=trial.scaled(500), learning_rate=1e-2, name=name,
                     trial=trial.part(index / len(ARMS), (index + 1) / len(ARMS)))
        right = jnp.argmax(jax.jit(apply)(params, held), axis=-1) == held.target
        measured[name] = jnp.sum(right & held.counted) / jnp.sum(held.counted)
    return measured | {"growth": _operations(4096) / _operations(64)}


def _operations(length):
    """Of one step of local attention, as compiled."""
    query, source = jnp.zeros((1, 1, FEATURES)), jnp.zeros((1, length, FEATURES))
    step = lambda query, source: luong_local_attention(query, source, jnp.ones(1), reach=REACH, sigma=REACH / 2, implementation="gathered")
    return jax.jit(step).lower(query, source).compile().cost_analysis()["flops"]


def draw(figure, seeds):
    """Words that are right."""
    bars(figure.subplots(), {name: [seed[name] for seed in seeds] for name in ARMS}, "share of words that are right")


claim = Claim(
    id="luong-global-local-attention",
    run=run,
    criteria=(
        Criterion("share of words: the least of the attentions above none", lambda m: min(m[name] for name in PLAIN) - m["none"]),
        Criterion("share of words: local-p no worse than local-m", lambda m: m["local-p"] - m["local-m"]),
        Criterion("operations of a step at 4096 words: below 1.1 of those at 64", lambda m: 1.1 - m["growth"])),
    table=(("", "words right"), {name: (name,) for name in ARMS} | {"operations, 4096 / 64 words": ("growth",)}),
    draw=draw)
