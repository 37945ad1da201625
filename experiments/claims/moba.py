"""The paper: attention to the few blocks of keys whose means a query likes best models text as well as full attention, and a model switches between the two
without training.

Here: a two-layer decoder of bytes (width 64, four heads, rotary positions) is trained 500 steps on windows of 256 bytes of Python source with full attention,
with MoBA (blocks of 16, three to a query), with a window of 48 bytes, and with the own block and two earlier ones drawn at random for each query and head. Bits
per byte are measured on the last quarter of held-out windows; also where their last 64 bytes are made to repeat their first 64, and of the MoBA model run with
full attention. And SmolLM2, trained with full attention, reads 512 tokens of docstrings: how much of its weight is on the three blocks of 16 that MoBA chooses, and how
much on the last 48 tokens (reported only; needs `attnx fetch smollm2-135m`).
The claim holds if MoBA is better than window and random blocks by 0.01 bits per byte, within 0.03 of full attention, and switching to that changes it by at most 0.02.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import attnx
from attnx import masks, sparse
from attnx.nn import Attention, set_mechanism
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import smollm, text
from experiments.tiny import Tiny

FEATURES, HEADS, LAYERS, LENGTH, BLOCK, CHOSEN, REPEAT, READ = 64, 4, 2, 256, 16, 3, 64, 512


def _random_blocks(seed):
    """The own block and as many earlier ones as MoBA has, fixed for each query and head."""
    own = np.arange(LENGTH) // BLOCK
    liking = np.random.default_rng(seed).random((HEADS, LENGTH, LENGTH // BLOCK))
    liking = np.where(np.arange(LENGTH // BLOCK) < own[:, None], liking, -1)
    rank = (-liking).argsort(-1).argsort(-1)
    chosen = ((rank < CHOSEN - 1) & (liking >= 0)) | (np.arange(LENGTH // BLOCK) == own[:, None])
    return masks.explicit(jnp.asarray(np.repeat(chosen, BLOCK, axis=-1)[None])) & masks.causal()


FULL = attnx.pairs(mask=masks.causal(), implementation="reference")
ARMS = {"full": lambda seed: FULL, "MoBA": lambda seed: sparse.moba(BLOCK, CHOSEN, implementation="reference"),
        "window": lambda seed: attnx.pairs(mask=masks.sliding_window(BLOCK * CHOSEN), implementation="reference"),
        "random": lambda seed: attnx.pairs(mask=_random_blocks(seed), implementation="reference")}


def _model(mechanism, seed):
    attention = lambda rngs: Attention(FEATURES, HEADS, mechanism=mechanism, position=Rotary(), rngs=rngs)
    return Tiny(FEATURES, [attention] * LAYERS, inputs=text.VOCABULARY, rngs=nnx.Rngs(seed))


def _repeated(apply, params, count):
    """Bits of the bytes that repeat the first ones of their window, but for the first half of these."""
    tokens = text.sampler(LENGTH, count)(jax.random.key(7))
    tokens = tokens.at[:, -REPEAT:].set(tokens[:, :REPEAT])
    costs = jax.jit(lambda params: optax.softmax_cross_entropy_with_integer_labels(apply(params, tokens[:, :-1]), tokens[:, 1:]))(params)
    return float(costs[:, -REPEAT // 2:].mean()) / math.log(2)


def _mass(scores):
    """Of scores [..., T, T]: the share of the causal softmax's weight on chosen blocks, and on a window of as many keys; over the queries that have more."""
    size = scores.shape[-1]
    at, own = jnp.arange(size), jnp.arange(size) // BLOCK
    blocks = jnp.arange(size // BLOCK)
    means = scores.reshape(*scores.shape[:-1], -1, BLOCK).mean(-1)  # of a query's scores: its score with the mean of the keys
    liking = jnp.where(blocks == own[:, None], jnp.inf, jnp.where(blocks < own[:, None], means, -jnp.inf))
    chosen = jnp.repeat(liking >= jax.lax.top_k(liking, CHOSEN)[0][..., -1:], BLOCK, axis=-1)
    weights = jax.nn.softmax(jnp.where(at <= at[:, None], scores, -jnp.inf))
    masses = (jnp.sum(weights, -1, where=where)[..., BLOCK * CHOSEN:].mean() for where in (chosen, at > at[:, None] - BLOCK * CHOSEN))
    return dict(zip(("MoBA, mass", "window, mass"), masses))


def run(trial: Trial):
    """Trains all arms, measures them, and switches one."""
    measured = smollm.look(_mass, trial.seed, trial.scaled(READ, 4 * BLOCK), "scores")
    count = trial.scaled(96, 2)
    tail = lambda apply, params: float(text.bits(apply, params, LENGTH, count=count)[:, -LENGTH // 4:].mean())
    for index, (name, mechanism) in enumerate(ARMS.items()):
        model = _model(mechanism(trial.seed), trial.seed)
        params, apply = functional(model)
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(500), trial=trial.part(index / 4, (index + 1) / 4), name=name)
        measured |= {name: tail(apply, params), f"{name}, repeated": _repeated(apply, params, trial.scaled(32, 2))}
        if name == "MoBA":
            set_mechanism(model, FULL)
            measured["MoBA switched to full"] = tail(functional(model)[1], params)
    return measured


def draw(figure, seeds):
    """Bits per byte of the last quarter, and of what is repeated."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 4, 2))
    names = [*ARMS, "MoBA switched to full"]
    bars(left, {name: [seed[name] for seed in seeds] for name in names}, "bits per byte, last quarter")
    left.set_ylim(0.9 * min(seed[name] for seed in seeds for name in names))
    bars(middle, {name: [seed[f"{name}, repeated"] for seed in seeds] for name in ARMS}, "bits per byte, repeated")
    bars(right, {name: [seed[f"{name}, mass"] for seed in seeds] for name in ("MoBA", "window")}, "share of SmolLM2's weight")


def _margin(other, slack):
    return functools.partial(lambda other, slack, m: m[other] - m["MoBA"] + slack, other, slack)


claim = Claim(
    id="moba",
    run=run,
    criteria=(
        Criterion("bits per byte: MoBA at least 0.01 below a window of as many keys", _margin("window", -0.01)),
        Criterion("bits per byte: MoBA at least 0.01 below random blocks", _margin("random", -0.01)),
        Criterion("bits per byte: MoBA at most 0.03 above full attention", _margin("full", 0.03)),
        Criterion("bits per byte change by at most 0.02 with a switch to full attention", lambda m: 0.02 - abs(m["MoBA switched to full"] - m["MoBA"]))),
    table=(("", "bits per byte, last quarter", "repeated", "share of SmolLM2's weight"),
           {**{name: (name, f"{name}, repeated", f"{name}, mass" if name in ("MoBA", "window") else "") for name in ARMS},
            "MoBA switched to full": ("MoBA switched to full", "", "")}),
    draw=draw)
