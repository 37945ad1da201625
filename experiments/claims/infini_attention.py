"""The paper: with a compressive memory a 1B model, fine-tuned on 5K tokens, finds a passkey in a million, an 8B model summarises books best, and the memory is 114
times smaller than a cache.

Here: two-layer models (width 64, four heads, rotary positions) are trained 400 steps on 16 sequences of 64 tokens: twelve keys are given one of eight values each,
filler follows, and at the end all keys are asked for. Attention sees segments of 16 tokens and, with the linear or the delta rule, a memory of those before; or
segments alone; or all that came before. Then all are asked after filler for sequences of 1024 tokens. The claim holds if segments alone are at chance (an eighth,
up to five points more), both memories answer more than 60%, the delta rule no less than the linear one (by half a point), and both lose less than 20 points in the
long sequences.
"""

import jax
from flax import nnx

import attnx
from attnx import masks, memory
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import stored_pairs
from experiments.tiny import Tiny

FEATURES, HEADS, LAYERS, SEGMENT, LENGTH, LONGER = 64, 4, 2, 16, 64, 1024


def _infini(rule):
    return lambda rngs: memory.InfiniAttention(FEATURES, HEADS, segment_length=SEGMENT, rule=rule, position=Rotary(), rngs=rngs)


def _softmax(mask):
    return lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=mask), position=Rotary(), rngs=rngs)


ARMS = {"delta": _infini("delta"), "linear": _infini("linear"), "segments alone": _softmax(masks.causal() & masks.within_blocks(SEGMENT)),
        "everything": _softmax(masks.causal())}
MEMORIES = ("delta", "linear")


def run(trial: Trial):
    """Trains all arms, then asks late."""
    measured = {}
    for index, (name, attention) in enumerate(ARMS.items()):
        model = Tiny(FEATURES, [attention] * LAYERS, inputs=stored_pairs.VOCABULARY, outputs=stored_pairs.VALUES, rngs=nnx.Rngs(trial.seed))
        params, apply = functional(model)
        loss = lambda params, batch, key, apply=apply: cross_entropy(stored_pairs.answer(apply, params, batch[0]), batch[1])
        params = fit(loss, params, stored_pairs.sampler(LENGTH, 16), steps=trial.scaled(400), trial=trial.part(index / len(ARMS), (index + 1) / len(ARMS)), name=name)
        for length in (LENGTH, LONGER):
            tokens, answers = stored_pairs.sampler(length, trial.scaled(64, 4))(jax.random.key(10_000 + trial.seed))
            measured[f"{name} {length}"] = accuracy(jax.jit(lambda params, tokens, apply=apply: stored_pairs.answer(apply, params, tokens))(params, tokens), answers)
    return measured


def draw(figure, seeds):
    """The share of right answers at both lengths."""
    for axes, length in zip(figure.subplots(1, 2, sharey=True), (LENGTH, LONGER)):
        bars(axes, {name: [seed[f"{name} {length}"] for seed in seeds] for name in ARMS}, f"right answers, {length} tokens")
        axes.axhline(1 / stored_pairs.VALUES, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(0, 1)


claim = Claim(
    id="infini-attention",
    run=run,
    criteria=(
        Criterion("segments alone: at most five points above chance", lambda m: 1 / stored_pairs.VALUES + 0.05 - m[f"segments alone {LENGTH}"]),
        Criterion("right answers with either memory: more than 60%", lambda m: min(m[f"{name} {LENGTH}"] for name in MEMORIES) - 0.6),
        Criterion("right answers: delta rule no less than linear, by half a point", lambda m: m[f"delta {LENGTH}"] - m[f"linear {LENGTH}"] + 0.005),
        Criterion(f"lost at {LONGER} tokens: less than 20 points", lambda m: 0.2 - max(m[f"{name} {LENGTH}"] - m[f"{name} {LONGER}"] for name in MEMORIES))),
    table=(("", f"right answers, {LENGTH} tokens", f"{LONGER} tokens"), {name: (f"{name} {LENGTH}", f"{name} {LONGER}") for name in ARMS}),
    draw=draw)
