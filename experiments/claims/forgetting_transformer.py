"""The paper: a Transformer with forget gates and no position embeddings models long text better than one with rotary positions, extrapolates to longer
text, and is as good at short tasks.

Here: a two-layer decoder of bytes (width 64, four heads) is trained 600 steps on windows of 128 bytes of Python source, with forget gates and no positions, with
rotary positions, with ALiBi, and with neither. Bits per byte are measured on held-out files in windows of 128, and on the last 64 bytes of
windows of 512, which end with the same bytes. Besides, such models answer for the last value of a key since the last RESET token.
The claim holds if forgetting is no worse than rotary at 128, loses at 512 less than a third of what rotary loses, and beats ALiBi on the resets.
"""

import jax
from flax import nnx

import attnx
from attnx import masks, scores
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import reset, text
from experiments.tiny import Tiny

FEATURES, HEADS, LENGTH, LONGER, LAST = 64, 4, 128, 512, 64


def _attention(parts=(), position=None):
    mechanism = attnx.pairs(mask=masks.causal(), scores=parts)
    return lambda rngs: Attention(FEATURES, HEADS, mechanism=mechanism, position=position, rngs=rngs)


ARMS = {"forgetting": lambda rngs: scores.ForgettingAttention(FEATURES, HEADS, rngs=rngs), "rotary": _attention(position=Rotary()),
        "ALiBi": _attention((scores.alibi(HEADS),)), "no positions": _attention()}


def run(trial: Trial):
    """Trains all arms on text, and two on resets."""
    measured = {}
    for index, (name, attention) in enumerate(ARMS.items()):
        part = trial.part(0.2 * index, 0.2 * (index + 1))
        params, apply = functional(Tiny(FEATURES, [attention] * 2, inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 16), steps=trial.scaled(600), trial=part, name=name)
        count = trial.scaled(96, 2)
        short = text.bits(apply, params, LENGTH, count=count)
        measured[f"{name} at {LENGTH}"] = short.mean()
        measured[f"{name}, last, {LENGTH}"] = short[:, -LAST:].mean()
        measured[f"{name}, last, {LONGER}"] = text.bits(apply, params, LONGER, count=count)[:, -LAST:].mean()
    for index, name in enumerate(("forgetting", "ALiBi")):
        measured[f"{name} resets"] = _resets(trial.part(0.8 + 0.1 * index, 0.9 + 0.1 * index), name)
    return measured


def _resets(trial, name):
    sample = reset.sampler(24, 64)
    params, apply = functional(Tiny(FEATURES, [ARMS[name]] * 2, inputs=reset.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
    answer = lambda params, tokens: apply(params, tokens)[:, -1]
    params = fit(lambda params, batch, key: cross_entropy(answer(params, batch[0]), batch[1]), params, sample, steps=trial.scaled(800), trial=trial,
                 name=f"{name}, resets")
    tokens, answers = reset.sampler(24, trial.scaled(2048, 16))(jax.random.key(10_000 + trial.seed))
    return accuracy(jax.jit(answer)(params, tokens), answers)


def _loss(measured, name):
    """Bits per byte lost on the last bytes when windows are four times longer."""
    return measured[f"{name}, last, {LONGER}"] - measured[f"{name}, last, {LENGTH}"]


def draw(figure, seeds):
    """Bits per byte at both lengths, and accuracy on resets."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 2))
    bars(left, {name: [seed[f"{name} at {LENGTH}"] for seed in seeds] for name in ARMS}, f"bits per byte at {LENGTH}")
    bars(middle, {name: [seed[f"{name}, last, {LONGER}"] for seed in seeds] for name in ARMS}, f"bits per byte, last {LAST} of {LONGER}")
    bars(right, {name: [seed[f"{name} resets"] for seed in seeds] for name in ("forgetting", "ALiBi")}, "accuracy, resets")


claim = Claim(
    id="forgetting-transformer",
    run=run,
    criteria=(
        Criterion(f"bits per byte at {LENGTH}: forgetting no worse than rotary", lambda m: m[f"rotary at {LENGTH}"] - m[f"forgetting at {LENGTH}"]),
        Criterion("bits per byte lost on longer text: forgetting less than a third of rotary", lambda m: _loss(m, "rotary") / 3 - _loss(m, "forgetting")),
        Criterion("accuracy on resets: forgetting above ALiBi", lambda m: m["forgetting resets"] - m["ALiBi resets"])),
    table=(("", f"bits per byte, {LENGTH}", f"last {LAST} of {LENGTH}", f"last {LAST} of {LONGER}", "resets"),
           {name: (f"{name} at {LENGTH}", f"{name}, last, {LENGTH}", f"{name}, last, {LONGER}", f"{name} resets" if name in ("forgetting", "ALiBi") else "")
            for name in ARMS}),
    draw=draw)
