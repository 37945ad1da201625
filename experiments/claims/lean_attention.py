"""The paper: decoding by equal shares of all tiles, across heads and sequences, is 2.6 times as fast as FlashAttention-2 on average, 8.3 times with long contexts.

Here: a simulation of schedules, not of hardware. An accelerator runs 216 workers at once (108 processors, two each); a tile of 256 keys costs 1, merging a partial
state 0.5. For 8, 32 and 56 heads, 1, 4 and 16 sequences and contexts of 1024 to 524288 tokens, all as long or of log-uniformly drawn lengths up to that, the time
of equal shares (stream-K) is compared with one worker a head (FlashAttention-2) and a fixed number of pieces (Flash-Decoding, by its heuristic). Besides, all three
plans are followed on the CPU (3 sequences, 8 heads, 4096 tokens) and compared with the definition in float32.
The claim holds if stream-K stays within 1.1 of the ideal (all tiles evenly spread) wherever there are four tiles a worker, is twice as fast as one worker a head
for single sequences from 65536 tokens on, is nowhere more than 5% slower than a fixed number of pieces, and all plans are exact to 1e-5.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from attnx.core import lean_attention_decode
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import lines
from pallas_kernels.decode import fixed_split_plan, flash_decoding_splits, no_split_plan, simulate_makespan, stream_k_plan

WORKERS, TILE = 216, 256
HEADS, BATCHES, CONTEXTS = (8, 32, 56), (1, 4, 16), tuple(2**n for n in range(10, 20))


def _times(lengths, heads):
    """The times of stream-K, fixed pieces and no pieces, and the ideal."""
    tiles = -(-lengths // TILE)
    total = int(tiles.sum()) * heads
    splits = flash_decoding_splits(len(lengths) * heads, int(tiles.max()), WORKERS)
    plans = stream_k_plan(lengths, heads, TILE, WORKERS), fixed_split_plan(lengths, heads, TILE, splits), no_split_plan(lengths, heads, TILE)
    return [simulate_makespan(plan, WORKERS)[0] for plan in plans] + [total / min(WORKERS, total)], total


def _worst(seed):
    """The largest difference of any plan's result from the definition's."""
    q, k, v = (jax.random.normal(jax.random.key(3 * seed + n), (3, length, 8, 64)) for n, length in enumerate((1, 4096, 4096)))
    lengths = np.array([4096, 1, 1234 + seed])
    expected = attnx.decode(q, k, v, jnp.asarray(lengths), implementation="reference")
    plans = stream_k_plan(lengths, 8, TILE, 50), fixed_split_plan(lengths, 8, TILE, 5), no_split_plan(lengths, 8, TILE)
    return max(float(jnp.abs(lean_attention_decode(q, k, v, jnp.asarray(lengths), plan)[0] - expected).max()) for plan in plans)


def run(trial: Trial):
    """All cells; the seed draws the ragged lengths."""
    rng = np.random.default_rng(trial.seed)
    contexts = CONTEXTS[:3] if trial.smoke else CONTEXTS
    cells = []
    for ragged, heads, batch, context in itertools.product((False, True), HEADS, BATCHES, contexts):
        lengths = np.full(batch, context) if not ragged else np.exp(rng.uniform(np.log(64), np.log(context), batch)).astype(int)
        (stream, fixed, none, ideal), total = _times(lengths, heads)
        cells.append((ragged, heads, batch, context, total, stream / ideal, fixed / stream, none / stream))
        trial.report(len(cells) / (2 * len(HEADS) * len(BATCHES) * len(contexts)), f"{batch} sequences of {context} tokens")
    cells = np.array(cells, float)
    full, single = cells[:, 4] >= 4 * WORKERS, (cells[:, 2] == 1) & (cells[:, 3] >= 65536) & (cells[:, 0] == 0)
    largest = lambda x: float(x.max(initial=0))
    smallest = lambda x: float(x.min(initial=np.inf)) if len(x) else 0.0
    measured = {"over ideal": largest(cells[full, 5]), "faster, single": smallest(cells[single, 7]), "faster than pieces, worst": smallest(cells[:, 6]),
                "error": _worst(trial.seed)}
    for column, name in ((6, "fixed pieces"), (7, "one worker a head")):
        measured |= {f"{name}, mean": float(cells[:, column].mean()), f"{name}, best": largest(cells[:, column]), f"{name}, worst": smallest(cells[:, column]),
                     f"{name}, contexts": [float(cells[cells[:, 3] == context, column].mean()) for context in contexts]}
    return measured


def draw(figure, seeds):
    """How many times faster stream-K is, by context."""
    axes = figure.subplots()
    names = ("one worker a head", "fixed pieces")
    lines(axes, CONTEXTS[:len(seeds[0][f"{names[0]}, contexts"])], {name: [seed[f"{name}, contexts"] for seed in seeds] for name in names}, "tokens of context",
          "times faster than, mean over heads and batches")
    axes.set_xscale("log", base=2)
    axes.axhline(1, color="k", linewidth=0.5)


claim = Claim(
    id="lean-attention",
    run=run,
    criteria=(
        Criterion("time with four tiles a worker or more: at most 1.1 of the ideal, at worst", lambda m: 1.1 - m["over ideal"]),
        Criterion("single sequences from 65536 tokens on: twice as fast as one worker a head, at worst", lambda m: m["faster, single"] - 2),
        Criterion("nowhere more than 5% slower than fixed pieces", lambda m: m["faster than pieces, worst"] - 1 / 1.05),
        Criterion("all plans agree with the definition to 1e-5", lambda m: 1e-5 - m["error"])),
    table=(("stream-K faster than", "on average", "at best", "at worst"),
           {name: tuple(f"{name}, {kind}" for kind in ("mean", "best", "worst")) for name in ("fixed pieces", "one worker a head")}),
    draw=draw)
