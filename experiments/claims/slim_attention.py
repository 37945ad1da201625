"""The paper: with values computed from keys, the cache of a multi-head decoder is half the size, exactly, and decoding up to twice as fast.

Here: (1) all six layers of MiniLM (384 features, 12 heads, biases) are converted, and the embeddings of 50 docstrings of the standard library compared with the
original's, in float32; needs `attnx fetch minilm-l6`. (2) One layer of attention (512 features, 8 heads, random weights and cache) decodes a token after 1024 to
8192 others from a standard and from a slim cache on the CPU; the quickest of several runs counts, in processor time.
The claim holds if all cosines are at least 0.99999 and no number differs by more than 1e-3, the cache is half as large, and at 8192 tokens a step takes at most
1.15 times the standard one's time.
"""

import importlib
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx import masks, memory, pretrained
from attnx.core import cache
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import COLOURS

FEATURES, HEADS, LENGTHS = 512, 8, (1024, 2048, 4096, 8192)
MODULES = ("argparse", "ast", "collections", "csv", "datetime", "decimal", "difflib", "email", "functools", "heapq", "json", "logging", "os", "pathlib", "random", "re",
           "shutil", "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "typing", "unittest", "zipfile")


def _docstrings(seed, count):
    found = sorted({text[:400] for name in MODULES for _, thing in inspect.getmembers(importlib.import_module(name), inspect.isroutine)
                    if len(text := inspect.getdoc(thing) or "") > 60})
    return [found[index] for index in np.random.default_rng(seed).choice(len(found), count, replace=False)]


def _minilm(seed, count):
    texts = _docstrings(seed, count)
    minilm = pretrained.load("minilm-l6")
    expected = np.asarray(minilm.embed(texts))
    memory.slim_convert(minilm.model)
    got = np.asarray(minilm.embed(texts))
    layers = [module for _, module in nnx.iter_modules(minilm.model) if isinstance(module, memory.SlimAttention)]
    return (expected * got).sum(1).min(), np.abs(expected - got).max(), [condition for layer in layers for condition in layer.condition]


@jax.jit
def _standard(query, key, value):
    return attnx.decode(query, key, value, key.shape[1], implementation="blockwise")


@jax.jit
def _slim(query, key, kernel):
    positions = jnp.full(1, key.shape[1] - 1, jnp.int32)
    return memory.slim_attend(query, key, memory.SlimWeights(kernel, None), option="late", mask=masks.causal(), query_positions=positions)


def _milliseconds(run, args, repeats):
    best = np.inf
    for _ in range(repeats + 1):
        began = time.process_time()
        jax.block_until_ready(run(*args))
        best = min(best, time.process_time() - began)
    return 1e3 * best


def run(trial: Trial):
    """Compares embeddings, then times decoding."""
    cosine, difference, conditions = _minilm(trial.seed, trial.scaled(50, 4))
    trial.report(0.4, "MiniLM")
    measured = {"cosine": cosine, "difference": difference, "condition": conditions, "largest condition": max(conditions), "standard": [], "slim": []}
    size = FEATURES // HEADS
    for index, length in enumerate(LENGTHS[:1] if trial.smoke else LENGTHS):
        q, k, v, w = (jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(trial.seed), 4), (
            (1, 1, HEADS, size), (1, length, HEADS, size), (1, length, HEADS, size), (FEATURES, HEADS, size))))
        repeats = trial.scaled(30, 1)
        measured["standard"].append(_milliseconds(_standard, (q, k, v), repeats))
        measured["slim"].append(_milliseconds(_slim, (q, k, w), repeats))
        trial.report(0.4 + 0.6 * (index + 1) / len(LENGTHS), f"{length} tokens")
    number = lambda value_size: sum(x.nbytes for x in cache.init(1, LENGTHS[-1], HEADS, size, value_size)[:2])
    return measured | {"standard, last": measured["standard"][-1], "slim, last": measured["slim"][-1], "standard, MiB": number(size) / 2**20,
                       "slim, MiB": number(0) / 2**20, "times": measured["slim"][-1] / measured["standard"][-1]}


def draw(figure, seeds):
    """Time against length, and condition numbers by layer."""
    left, right = figure.subplots(1, 2)
    for name, colour in zip(("standard", "slim"), COLOURS):
        values = np.asarray([seed[name] for seed in seeds])
        left.plot(LENGTHS[:values.shape[1]], values.mean(0), ".-", color=colour, label=name)
        left.fill_between(LENGTHS[:values.shape[1]], values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    left.set_xlabel("tokens")
    left.set_ylabel("milliseconds a step")
    left.set_ylim(0)
    left.legend(frameon=False)
    right.bar(range(1, 1 + len(seeds[0]["condition"])), seeds[0]["condition"], color=COLOURS[1], alpha=0.75)
    right.set_yscale("log")
    right.set_xlabel("layer of MiniLM")
    right.set_ylabel("condition number of W_K")


claim = Claim(
    id="slim-attention",
    run=run,
    criteria=(
        Criterion("embeddings of MiniLM: the smallest cosine at least 0.99999", lambda m: m["cosine"] - 0.99999),
        Criterion("embeddings of MiniLM: no number differs by more than 1e-3", lambda m: 1e-3 - m["difference"]),
        Criterion("bytes of the cache: half, less what is more", lambda m: 0.5 - m["slim, MiB"] / m["standard, MiB"]),
        Criterion(f"time of a step after {LENGTHS[-1]} tokens: 1.15 less the ratio", lambda m: 1.15 - m["times"])),
    table=(("", "milliseconds a step, longest", "MiB of cache", "smallest cosine", "largest condition"),
           {"standard": ("standard, last", "standard, MiB", "", ""), "slim": ("slim, last", "slim, MiB", "cosine", "largest condition")}),
    draw=draw)
