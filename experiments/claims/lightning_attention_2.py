"""The paper: linear attention in tiles trains as many tokens a second whatever the length of the sequence, and more than softmax attention or other ways of
computing linear attention do on long ones.

Here: a forward and backward pass of one layer of attention (four heads of 64, one sequence) on the CPU, as the masked product of all pairs, as a scan over tokens, in
tiles, and as softmax attention in tiles; in tiles for 512 to 16384 tokens, the others to 4096. Of several runs the quickest counts, in processor time, which other
processes disturb least; of memory, what the compiler sets aside for intermediate results.
The claim holds if in tiles the tokens a second vary by less than a quarter over all lengths, they beat all pairs beyond 1024 tokens and softmax attention at 4096, and
the scan fivefold at every length, and memory grows no faster than the length (by a tenth at most).
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from attnx import linear, masks
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import COLOURS

HEADS, SIZE = 4, 64
LENGTHS, SHORT = (512, 1024, 2048, 4096, 8192, 16384), (512, 1024, 2048, 4096)
SLOPES = linear.lightning_slopes(HEADS, 0, 2)


def _masked(query, key, value):
    """All pairs, written out."""
    t = jnp.arange(query.shape[1])
    decay = jnp.exp(jnp.where(t[:, None] >= t, -SLOPES[:, None, None] * (t[:, None] - t), -jnp.inf))
    return jnp.einsum("bnts,bsnv->btnv", jnp.einsum("btnh,bsnh->bnts", query, key) * decay, value)


FORMS = {"tiles": functools.partial(linear.lightning_attention, slopes=SLOPES, implementation="chunked"), "all pairs": _masked,
         "scan": functools.partial(linear.lightning_attention, slopes=SLOPES, implementation="recurrent"),
         "softmax": functools.partial(attnx.attention, mask=masks.causal(), implementation="blockwise")}


@functools.cache
def _compiled(name, length):
    loss = lambda *args: jnp.sum(FORMS[name](*args) ** 2)
    array = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array).compile()


def _seconds(run, args, repeats):
    def once():
        began = time.process_time()
        jax.block_until_ready(run(*args))
        return time.process_time() - began

    return min(once() for _ in range(repeats + 1))


def run(trial: Trial):
    """Times all forms at all their lengths."""
    measured, done = {}, 0
    lengths = {name: LENGTHS if name == "tiles" else SHORT for name in FORMS}
    lengths = {name: some[:2] for name, some in lengths.items()} if trial.smoke else lengths
    total = sum(map(len, lengths.values()))
    for name, some in lengths.items():
        speeds, memory = [], []
        for length in some:
            compiled = _compiled(name, length)
            args = jax.random.normal(jax.random.key(trial.seed), (3, 1, length, HEADS, SIZE))
            speeds.append(length / _seconds(compiled, args, trial.scaled(max(2, 4096 // length), 1)))
            memory.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
            done += 1
            trial.report(done / total, f"{name}, {length} tokens")
        measured |= {f"{name}, speed": speeds, f"{name}, memory": memory, f"{name}, last speed": speeds[-1], f"{name}, last memory": memory[-1]}
    return measured


def _over(measured, name, begin=0):
    """How many times faster tiles are, at the lengths from ``begin`` on."""
    pairs = list(zip(measured["tiles, speed"], measured[f"{name}, speed"], SHORT))
    return [tiles / other for tiles, other, length in pairs if length >= begin] or [pairs[-1][0] / pairs[-1][1]]


def _variation(measured):
    speeds = measured["tiles, speed"]
    return 1 - min(speeds) / max(speeds)


def _growth(measured):
    """Memory a token at the longest sequence, in units of that at 2048 (or the shortest)."""
    memory = [size / length for size, length in zip(measured["tiles, memory"], LENGTHS)]
    return memory[-1] / memory[min(2, len(memory) - 2)]


def draw(figure, seeds):
    """Speed and memory against length."""
    left, right = figure.subplots(1, 2)
    for axes, kind, label in ((left, "speed", "tokens a second, forward and backward"), (right, "memory", "MiB of intermediate results")):
        for name, colour in zip(FORMS, COLOURS):
            values = np.asarray([seed[f"{name}, {kind}"] for seed in seeds])
            axes.plot(LENGTHS[:values.shape[1]], values.mean(0), ".-", color=colour, label=name)
            axes.fill_between(LENGTHS[:values.shape[1]], values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
    left.legend(frameon=False)


claim = Claim(
    id="lightning-attention-2",
    run=run,
    criteria=(
        Criterion("tokens a second in tiles vary by less than a quarter", lambda m: 0.25 - _variation(m)),
        Criterion("beyond 1024 tokens, tiles faster than all pairs: times faster, less 1", lambda m: min(_over(m, "all pairs", 2048)) - 1),
        Criterion("at all lengths, tiles five times faster than the scan: times faster, less 5", lambda m: min(_over(m, "scan")) - 5),
        Criterion("at 4096 tokens, tiles faster than softmax attention: times faster, less 1", lambda m: _over(m, "softmax", 4096)[-1] - 1),
        Criterion("memory a token of the longest at most 1.1 times that at 2048", lambda m: 1.1 - _growth(m))),
    table=(("", "tokens a second, longest", "MiB, longest"), {name: (f"{name}, last speed", f"{name}, last memory") for name in FORMS}),
    draw=draw)
