"""The paper: of efficient attentions, windows with an orthogonal memory extrapolate best to longer text, at a cost in proportion to the length.

Here: a two-layer decoder of bytes (width 64, four heads, eight directions, windows of 32) is trained 600 steps on windows of 128 bytes of Python source; the
same without its memory (every window a document of its own); and one with full softmax attention and learned positions. Bits per byte are measured on held-out
files in windows of 128, and on the last 64 bytes of windows of 128, 512 and 2048, which end with the same bytes. The
processor time of a forward pass is taken at 512 to 8192 tokens, the quickest of several.
The claim holds if at 2048 LAVO loses at most 3% of what it has at 128, it beats windows alone at 128, and the time a token at 8192 is at most 1.25 times that at 512.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx import linear, masks
from attnx.nn import Attention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.tiny import Tiny

FEATURES, HEADS, LAYERS, LENGTH, WINDOW, LAST = 64, 4, 2, 128, 32, 64
LONGER, TIMED = (128, 512, 2048), (512, 1024, 2048, 4096, 8192)


def _lavo(rngs):
    return linear.LAVO(FEATURES, HEADS, num_bases=8, window=WINDOW, rngs=rngs)


def _softmax(rngs):
    return Attention(FEATURES, HEADS, mechanism=attnx.pairs(mask=masks.causal()), rngs=rngs)


ARMS = {"LAVO": _lavo, "windows alone": _lavo, "softmax": _softmax}


def _apply(name, apply):
    """A model's logits; of windows alone with each its own document."""
    if name != "windows alone":
        return apply
    return lambda params, tokens: apply(params, tokens, segment_ids=jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32) // WINDOW, tokens.shape))


def _microseconds(apply, params, length, repeats):
    """Of a token in a forward pass."""
    run, tokens = jax.jit(apply), jnp.zeros((1, length), jnp.int32)
    best = np.inf
    for _ in range(repeats + 1):
        began = time.process_time()
        jax.block_until_ready(run(params, tokens))
        best = min(best, time.process_time() - began)
    return 1e6 * best / length


def run(trial: Trial):
    """Trains all arms, reads longer and longer text, and times one."""
    measured = {}
    for index, (name, attention) in enumerate(ARMS.items()):
        position = dict(position="learned", max_length=max(LONGER)) if name == "softmax" else {}
        params, apply = functional(Tiny(FEATURES, [attention] * LAYERS, inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed), **position))
        logits = _apply(name, apply)
        params = fit(text.loss(logits), params, text.sampler(LENGTH, 16), steps=trial.scaled(600), trial=trial.part(0.3 * index, 0.3 * (index + 1)), name=name)
        count = trial.scaled(96, 2)
        for length in LONGER[:2] if trial.smoke else LONGER:
            bits = text.bits(logits, params, length, count=count)
            measured[f"{name}, last, {length}"] = bits[:, -LAST:].mean()
            if length == LENGTH:
                measured[f"{name} at {LENGTH}"] = bits.mean()
        measured.setdefault(f"{name}, last, {LONGER[-1]}", measured[f"{name}, last, {LONGER[1]}"])
        if name == "LAVO":
            measured["microseconds"] = [_microseconds(apply, params, length, trial.scaled(8, 1)) for length in TIMED[:1 if trial.smoke else None]]
    return measured


def draw(figure, seeds):
    """Bits per byte at the length of training, on longer text, and time."""
    left, middle, right = figure.subplots(1, 3)
    bars(left, {name: [seed[f"{name} at {LENGTH}"] for seed in seeds] for name in ARMS}, f"bits per byte at {LENGTH}")
    lengths = [length for length in LONGER if f"LAVO, last, {length}" in seeds[0]]
    lines(middle, lengths, {name: [[seed[f"{name}, last, {length}"] for length in lengths] for seed in seeds] for name in ARMS}, "bytes",
          f"bits per byte, last {LAST}")
    lines(right, TIMED[:len(seeds[0]["microseconds"])], {"LAVO": [seed["microseconds"] for seed in seeds]}, "tokens", "microseconds a token")
    right.set_ylim(0)
    for axes in (middle, right):
        axes.set_xscale("log", base=2)


claim = Claim(
    id="lavo-orthogonal-memory",
    run=run,
    criteria=(
        Criterion(f"bits per byte of the last {LAST}: with {LONGER[-1]} at most 3% above that with {LENGTH}",
                  lambda m: 1.03 * m[f"LAVO, last, {LENGTH}"] - m[f"LAVO, last, {LONGER[-1]}"]),
        Criterion(f"bits per byte at {LENGTH}: LAVO below windows alone", lambda m: m[f"windows alone at {LENGTH}"] - m[f"LAVO at {LENGTH}"]),
        Criterion("time a token at 8192 at most 1.25 times that at 512: 1.25 less the ratio", lambda m: 1.25 - m["microseconds"][-1] / m["microseconds"][0])),
    table=(("", f"bits per byte, {LENGTH}", *(f"last {LAST} of {length}" for length in LONGER)),
           {name: (f"{name} at {LENGTH}", *(f"{name}, last, {length}" for length in LONGER)) for name in ARMS}),
    draw=draw)
