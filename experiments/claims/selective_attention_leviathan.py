"""The paper: with selective attention transformers of 100M parameters have the perplexity of ones with twice the heads, and their context can be pruned so that
at the same perplexity as without it attention needs 16 to 47 times less memory, at lengths of 512 to 2048.

Here: four variables are assigned again and again and asked for (32 events, 96 tokens). Decoders of two layers (width 64, four heads, rotary positions) are
trained 400 steps on 16 sequences with selective and with plain attention. On fresh sequences: the loss; how well the penalties of the last query, added over
layers, tell the values of superseded assignments from live ones (area under the curve; 0.5 is chance); accuracy with all keys, and when caches hold 24.
Selective attention then evicts the key that most is held against; the plain model evicts at random, or the oldest. Besides, both are trained 150 steps on
windows of 128 bytes of Python source.
The claim holds if selective attention has the lower loss, the area is above 0.9, it loses at most two points by pruning and less than the plain model does
either way, and bits per byte are no more than with plain attention.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

import attnx
from attnx import masks, scores
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import assignments, text
from experiments.tiny import Tiny

FEATURES, HEADS, BLOCKS, EVENTS, BUDGET, LENGTH = 64, 4, 2, 32, 24, 128
TOKENS = 3 * EVENTS


class Model(Tiny):
    """One that also reads token by token, and shows what it holds against keys."""

    def streamed(self, tokens):
        """Logits [B, T, V] by steps."""
        states = [block.init_state(len(tokens), tokens.shape[1]) for block in self.blocks]

        def step(states, token):
            x, after = self.embedding(token[:, None]), []
            for block, state in zip(self.blocks, states):
                state, x = block.step(state, x)
                after.append(state)
            return after, self.embedding.logits(self.norm(x))[:, 0]

        return jnp.moveaxis(jax.lax.scan(step, states, tokens.T)[1], 0, 1)

    def penalties(self, tokens):
        """[B, T], what is held against each token at the end, added over blocks."""
        inputs = [self.embedding(tokens), *self.states(tokens)[:-1]]
        return sum(block.attention.selection(block.attention_norm(x)).penalty for block, x in zip(self.blocks, inputs))


def _selective(budget=None):
    return lambda rngs: scores.SelectiveAttention(FEATURES, HEADS, budget=budget, position=Rotary(), rngs=rngs)


def _plain(mask=masks.causal()):
    return lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=mask), position=Rotary(), rngs=rngs)


ARMS = {"selective": _selective(), "plain": _plain()}


def _model(attention, vocabulary, seed):
    return functional(Model(FEATURES, [attention] * BLOCKS, inputs=vocabulary, rngs=nnx.Rngs(seed)))


def _random_eviction(batch, seed):
    """Booleans [B, 1, T, T]: which keys a cache of BUDGET still holds, if it evicts one at random for each new one."""
    rng = np.random.default_rng(seed)
    slots, seen = np.full((batch, BUDGET), -1), np.zeros((batch, 1, TOKENS, TOKENS), bool)
    for t in range(TOKENS):
        slots[np.arange(batch), np.full(batch, t) if t < BUDGET else rng.integers(0, BUDGET, batch)] = t
        rows, columns = np.nonzero(slots >= 0)
        seen[rows, 0, t, slots[rows, columns]] = True
    return jnp.asarray(seen)


def _area(stale, live):
    """The probability that a stale one has the larger penalty."""
    return stats.mannwhitneyu(stale, live).statistic / (len(stale) * len(live))


def run(trial: Trial):
    """Trains both on both tasks; prunes."""
    measured = {}
    sample, count = assignments.sampler(EVENTS, 16), trial.scaled(256, 8)
    held = assignments.sampler(EVENTS, count)(jax.random.key(10_000 + trial.seed))
    for index, (name, attention) in enumerate(ARMS.items()):
        part = trial.part(index / 2, index / 2 + 0.3)
        params, apply = _model(attention, assignments.VOCABULARY, trial.seed)
        params = fit(lambda params, batch, key, apply=apply: assignments.loss(apply(params, batch.tokens), batch), params, sample, steps=trial.scaled(400), trial=part,
                     name=f"{name}, assignments")
        logits = jax.jit(apply)(params, held.tokens)
        measured |= {f"{name} loss": assignments.loss(logits, held), f"{name} accuracy": assignments.accuracy(logits, held)}
        if name == "selective":
            against = np.asarray(jax.jit(lambda params: apply(params, held.tokens, method="penalties"))(params))[:, 2::3]
            measured["area"] = _area(against[np.asarray(held.stale)], against[np.asarray(held.live)])
            pruned = _model(_selective(BUDGET), assignments.VOCABULARY, trial.seed)[1]
            evicted = {"selective pruned": jax.jit(lambda params: pruned(params, held.tokens, method="streamed"))(params)}
        else:
            evicted = {}
            for eviction, mask in (("random", masks.explicit(_random_eviction(count, trial.seed))), ("oldest", masks.sliding_window(BUDGET))):
                other = _model(_plain(mask), assignments.VOCABULARY, trial.seed)[1]
                evicted[f"plain {eviction}"] = jax.jit(other)(params, held.tokens)
        measured |= {name: assignments.accuracy(logits, held) for name, logits in evicted.items()}
        params, apply = _model(attention, text.VOCABULARY, trial.seed)
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(150), trial=trial.part(index / 2 + 0.3, index / 2 + 0.5), name=f"{name}, text")
        measured[f"{name} bits"] = text.bits(apply, params, LENGTH, count=trial.scaled(96, 2)).mean()
    return measured


def _loss_by_pruning(measured):
    return measured["selective accuracy"] - measured["selective pruned"]


def draw(figure, seeds):
    """Loss, accuracy with and without pruning, and bits per byte."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 5, 2))
    bars(left, {name: [seed[f"{name} loss"] for seed in seeds] for name in ARMS}, "nats an answer")
    shown = {"selective": "selective accuracy", "selective, 24 keys": "selective pruned", "plain": "plain accuracy", "plain, 24 random": "plain random",
             "plain, last 24": "plain oldest"}
    bars(middle, {title: [seed[name] for seed in seeds] for title, name in shown.items()}, "accuracy")
    bars(right, {name: [seed[f"{name} bits"] for seed in seeds] for name in ARMS}, "bits per byte")


claim = Claim(
    id="selective-attention-leviathan",
    run=run,
    criteria=(
        Criterion("nats an answer: selective below plain", lambda m: m["plain loss"] - m["selective loss"]),
        Criterion("area under the curve, superseded against live: above 0.9", lambda m: m["area"] - 0.9),
        Criterion("accuracy lost by pruning to 24 keys: at most 0.02", lambda m: 0.02 - _loss_by_pruning(m)),
        Criterion("accuracy lost: less than plain attention loses by random eviction", lambda m: m["plain accuracy"] - m["plain random"] - _loss_by_pruning(m)),
        Criterion("accuracy lost: less than plain attention loses by evicting the oldest", lambda m: m["plain accuracy"] - m["plain oldest"] - _loss_by_pruning(m)),
        Criterion("bits per byte: selective no more than plain", lambda m: m["plain bits"] - m["selective bits"])),
    table=(("", "nats an answer", "accuracy", "24 keys", "24 keys, otherwise", "area", "bits per byte"),
           {"selective": ("selective loss", "selective accuracy", "selective pruned", "", "area", "selective bits"),
            "plain": ("plain loss", "plain accuracy", "plain random", "plain oldest", "", "plain bits")}),
    draw=draw)
