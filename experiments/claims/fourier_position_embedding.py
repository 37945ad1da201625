"""The paper: with Fourier position embedding, language models of 60M to 1.2B parameters lose less on text longer than they were trained on than with rotary positions
or ALiBi, and find passkeys in it more often.

Here: a decoder of bytes of two layers (width 64, two heads of size 32) is trained 300 steps on 8 windows of 128 bytes of Python source with rotary positions, with
Fourier positions (gain 0.3), with the same tones dropped but no series (gain 0), and with ALiBi. Bits per byte are measured on the last 64 bytes of held-out
windows of 128 to 1024 bytes, which end with the same bytes. Besides, such models with rotary and with Fourier positions are trained 500 steps to tell a key
of five digits hidden in 64 tokens, and asked for it in 128 and 256.
The claim holds if from 128 to 512 bytes Fourier positions lose less than half of what rotary positions lose, and find at least as many keys in 128 tokens.
"""

import jax
from flax import nnx

import attnx
from attnx import masks, scores
from attnx.nn import Attention
from attnx.positions import FourierPosition, Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import cross_entropy, fit, functional
from experiments.tasks import passkey, text
from experiments.tiny import Tiny

FEATURES, HEADS, LENGTH, LAST, SHORT = 64, 2, 128, 64, 64
LENGTHS, KEYS = (128, 256, 512, 1024), (64, 128, 256)
ARMS = ("rotary", "Fourier", "tones dropped", "ALiBi")


def _model(name, length, vocabulary, seed):
    """All layers share the coefficients of the series."""
    rngs = nnx.Rngs(seed)
    position = {"rotary": lambda: Rotary(), "ALiBi": lambda: None, "Fourier": lambda: FourierPosition(HEADS, FEATURES // HEADS, train_length=length, rngs=rngs),
                "tones dropped": lambda: FourierPosition(HEADS, FEATURES // HEADS, train_length=length, gain=0.0, rngs=rngs)}[name]()
    mechanism = attnx.pairs(mask=masks.causal(), scores=(scores.alibi(HEADS),) if name == "ALiBi" else ())
    attention = lambda rngs: Attention(FEATURES, HEADS, mechanism=mechanism, position=position, rngs=rngs)
    return functional(Tiny(FEATURES, [attention] * 2, inputs=vocabulary, rngs=nnx.Rngs(seed)))


def run(trial: Trial):
    """Trains all arms on text, and two on passkeys."""
    measured = {}
    for index, name in enumerate(ARMS):
        params, apply = _model(name, LENGTH, text.VOCABULARY, trial.seed)
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(300), trial=trial.part(0.15 * index, 0.15 * (index + 1)), name=name)
        for length in LENGTHS[:2] if trial.smoke else LENGTHS:
            measured[f"{name}, {length}"] = text.bits(apply, params, length, count=trial.scaled(64, 2))[:, -LAST:].mean()
    for index, name in enumerate(("rotary", "Fourier")):
        params, apply = _model(name, SHORT, passkey.VOCABULARY, trial.seed)
        loss = lambda params, tokens, key, apply=apply: cross_entropy(passkey.answer(apply, params, tokens), tokens[:, -passkey.LENGTH:])
        params = fit(loss, params, passkey.sampler(SHORT, 16), steps=trial.scaled(500), trial=trial.part(0.6 + 0.2 * index, 0.8 + 0.2 * index),
                     name=f"{name}, passkeys")
        for length in KEYS[:2] if trial.smoke else KEYS:
            tokens = passkey.sampler(length, trial.scaled(256, 4))(jax.random.key(10_000 + trial.seed))
            measured[f"{name} keys, {length}"] = passkey.found(jax.jit(lambda params, tokens, apply=apply: passkey.answer(apply, params, tokens))(params, tokens),
                                                               tokens)
    return {name: measured.get(name, float("nan")) for name in _NAMES}


_NAMES = (*(f"{name}, {length}" for name in ARMS for length in LENGTHS), *(f"{name} keys, {length}" for name in ARMS[:2] for length in KEYS))


def _loss(measured, name):
    """Bits per byte lost on the last bytes when windows are four times longer."""
    return measured[f"{name}, {4 * LENGTH}"] - measured[f"{name}, {LENGTH}"]


def draw(figure, seeds):
    """Bits per byte by length, and keys found."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    lines(left, LENGTHS, {name: [[seed[f"{name}, {length}"] for length in LENGTHS] for seed in seeds] for name in ARMS}, "bytes in the window",
          f"bits per byte, last {LAST}")
    left.set_xscale("log", base=2)
    bars(right, {f"{name}, {length}": [seed[f"{name} keys, {length}"] for seed in seeds] for length in KEYS for name in ARMS[:2]}, "keys found")


claim = Claim(
    id="fourier-position-embedding",
    run=run,
    criteria=(
        Criterion(f"bits per byte lost from {LENGTH} to {4 * LENGTH}: Fourier less than half of rotary", lambda m: _loss(m, "rotary") / 2 - _loss(m, "Fourier")),
        Criterion(f"keys found in {2 * SHORT} tokens: Fourier no fewer than rotary", lambda m: m[f"Fourier keys, {2 * SHORT}"] - m[f"rotary keys, {2 * SHORT}"])),
    table=(("", *(f"bits per byte, {length}" for length in LENGTHS), *(f"keys in {length}" for length in KEYS)),
           {name: (*(f"{name}, {length}" for length in LENGTHS), *(f"{name} keys, {length}" if name in ARMS[:2] else "" for length in KEYS)) for name in ARMS}),
    draw=draw)
