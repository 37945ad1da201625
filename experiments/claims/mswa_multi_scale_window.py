"""The paper: sliding windows that grow from head to head and from shallow to deep layers model text better, and know more, than the same window everywhere, at seven
eighths of its budget; that they grow with depth matters.

Here: a decoder of bytes of four layers (width 64, four heads, rotary positions) is trained 300 steps on 8 windows of 128 bytes of Python source with a sliding window
of 16 (everywhere, varied by head, by layer, by both, and by both with the largest windows in shallow layers) and with full attention. Bits per byte
are measured on held-out files, on the last 64 bytes of windows of 128.
The claim holds if varying by both is better than one window, and than its reverse.
"""

from flax import nnx

from attnx import masks
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.tiny import Tiny

FEATURES, HEADS, LAYERS, WINDOW, LENGTH = 64, 4, 4, 16, 128
BOTH = masks.mswa_windows(LAYERS, HEADS, WINDOW)
ARMS = {"one window": masks.mswa_windows(LAYERS, HEADS, WINDOW, factors=(1,)), "by head": masks.mswa_windows(LAYERS, HEADS, WINDOW, mode="head"),
        "by layer": masks.mswa_windows(LAYERS, HEADS, WINDOW, mode="layer"), "by both": BOTH, "reversed": BOTH[::-1],
        "full attention": masks.mswa_windows(LAYERS, HEADS, LENGTH, factors=(1,))}


def _layer(windows):
    return lambda rngs: masks.MSWAttention(FEATURES, HEADS, windows=windows, position=Rotary(), implementation="reference", rngs=rngs)  # compiles quickly


def run(trial: Trial):
    """Trains all arms."""
    measured = {}
    for index, (name, windows) in enumerate(ARMS.items()):
        params, apply = functional(Tiny(FEATURES, [_layer(row) for row in windows], inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(300), trial=trial.part(index / len(ARMS), (index + 1) / len(ARMS)),
                     name=name)
        measured[name] = text.bits(apply, params, LENGTH, count=trial.scaled(96, 2))[:, -LENGTH // 2:].mean()
        measured[f"{name}, budget"] = windows.mean() / WINDOW
    return measured


def draw(figure, seeds):
    """Bits per byte."""
    axes = figure.subplots()
    bars(axes, {name: [seed[name] for seed in seeds] for name in ARMS}, "bits per byte")
    shown = [seed[name] for seed in seeds for name in ARMS]
    axes.set_ylim(0.98 * min(shown), 1.01 * max(shown))


claim = Claim(
    id="mswa-multi-scale-window",
    run=run,
    criteria=(
        Criterion("bits per byte: by both below one window", lambda m: m["one window"] - m["by both"]),
        Criterion("bits per byte: by both below reversed", lambda m: m["reversed"] - m["by both"])),
    table=(("", "bits per byte", "windows, of the budget"), {name: (name, f"{name}, budget") for name in ARMS}),
    draw=draw)
