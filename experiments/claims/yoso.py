"""The paper: sampled attention does about as well as softmax attention in GLUE and on long sequences, and is as good as its expectation with few hashes, at a cost linear
in the length.

Here: (1) the distance of the sampled output from its expectation, as a share of the latter, with 1 to 128 hashes of 9 bits on queries, keys and values of MiniLM's
third layer (12 heads, 128 tokens of two docstrings a seed); needs `attnx fetch minilm-l6`. (2) Digits as sequences of 64 pixels are classified by a bidirectional
transformer (two layers, width 32, two heads, learned positions, 300 steps of 32 images) with softmax attention, with YOSO's expectation (6 bits), and with 8 and 32
hashes. (3) Seconds of a sampled forward pass (four heads of 32, 8 hashes of 6 bits in tables) for 512 to 8192 tokens, the least of several, as a power of the length.
The claim holds if 32 hashes are at most 2 points below the expectation, that at most 2 below softmax attention, 8 hashes no better than 32, and the time's power is at
most 1.2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx import pretrained, sparse
from attnx.nn import Attention, record
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits, passages
from experiments.timing import least_seconds
from experiments.tiny import Tiny

TOKENS, LAYER, HASHES, PAPER_BITS, BITS = 128, 2, (1, 2, 4, 8, 16, 32, 64, 128), 9, 6
FEATURES, HEADS, STEPS, LENGTHS = 32, 2, 300, (512, 1024, 2048, 4096, 8192)


def _yoso(hashes):
    return lambda rngs: sparse.YosoAttention(FEATURES, HEADS, bits=BITS, hashes=hashes, rngs=rngs)


ARMS = {"softmax": lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.pairs(), rngs=rngs), "expectation": _yoso(None), "8 hashes": _yoso(8), "32 hashes": _yoso(32)}


@functools.cache
def _model():
    return pretrained.load("minilm-l6")


@functools.partial(jax.jit, static_argnums=0)
def _read(graph, params, tokens):
    return jax.tree.map(lambda x: x[LAYER], record(nnx.merge(graph, params), tokens, stage="qkv")[1])


@functools.partial(jax.jit, static_argnames="hashes")
def _error(key, query, key_, value, hashes):
    expected = sparse.yoso_expectation(query, key_, value, bits=PAPER_BITS)
    return jnp.linalg.norm(sparse.yoso_sample(key, query, key_, value, bits=PAPER_BITS, hashes=hashes) - expected) / jnp.linalg.norm(expected)


def errors(seed, sizes):
    """Of samples of so many hashes."""
    tokens, _ = _model().encode(passages.texts(seed, 2, shortest=800, longest=800))
    arrays = _read(*nnx.split(_model().model), tokens[:, :TOKENS])
    return [float(_error(jax.random.key(seed), *arrays, hashes=size)) for size in sizes]


@jax.jit
def _sampled(key, query, key_, value):
    return sparse.yoso_sample(key, query, key_, value, bits=BITS, hashes=8, implementation="gathered")


def _microseconds(length, times):
    """Of a token."""
    arrays = jax.random.normal(jax.random.key(0), (3, 1, length, 4, 32))
    return 1e6 * least_seconds(lambda: _sampled(jax.random.key(1), *arrays), times) / length


def _power(x, y):
    return np.polyfit(np.log(x[:len(y)]), np.log(y), 1)[0]


def run(trial: Trial):
    """Samples, trains all arms, and takes the time."""
    sizes = HASHES[:2] if trial.smoke else HASHES
    measured = {"errors": errors(trial.seed, sizes)}
    measured["error's power"] = _power(HASHES, measured["errors"])
    train, (images, labels) = digits.split(trial.seed)
    for index, (name, attention) in enumerate(ARMS.items()):
        model = Tiny(FEATURES, [attention] * 2, input_size=1, outputs=digits.CLASSES, position="learned", max_length=64, pooled=True, rngs=nnx.Rngs(trial.seed))
        params, apply = functional(model)
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, digits.sequence(batch[0]), dropout_key=key), batch[1])
        part = trial.part(0.1 + 0.2 * index, 0.3 + 0.2 * index)
        params = fit(loss, params, digits.sampler(train, 32), steps=trial.scaled(STEPS), trial=part, name=name)
        measured[name] = 100 * accuracy(jax.jit(apply)(params, digits.sequence(images), dropout_key=jax.random.key(trial.seed)), labels)
    measured["microseconds"] = [_microseconds(length, trial.scaled(5, 1)) for length in (LENGTHS[:2] if trial.smoke else LENGTHS)]
    measured["power"] = 1 + _power(LENGTHS, measured["microseconds"])
    return measured


def draw(figure, seeds):
    """Errors, accuracy, and time."""
    left, middle, right = figure.subplots(1, 3)
    count = len(seeds[0]["errors"])
    lines(left, HASHES[:count], {f"{PAPER_BITS} bits": [seed["errors"] for seed in seeds]}, "hashes", "distance from the expectation, a share")
    left.set(xscale="log", yscale="log")
    bars(middle, {name: [seed[name] for seed in seeds] for name in ARMS}, "accuracy on digits held out, %")
    middle.set_ylim(max(0, min(seed[name] for seed in seeds for name in ARMS) - 5), 100)
    lines(right, LENGTHS[:len(seeds[0]["microseconds"])], {"8 hashes": [seed["microseconds"] for seed in seeds]}, "tokens", "microseconds a token")
    right.set_xscale("log", base=2)
    right.set_ylim(0)


claim = Claim(
    id="yoso",
    run=run,
    criteria=(
        Criterion("accuracy, points: 32 hashes at most 2 below the expectation", lambda m: m["32 hashes"] - m["expectation"] + 2),
        Criterion("accuracy, points: the expectation at most 2 below softmax", lambda m: m["expectation"] - m["softmax"] + 2),
        Criterion("accuracy, points: 8 hashes no better than 32", lambda m: m["32 hashes"] - m["8 hashes"]),
        Criterion("time as a power of the length at most 1.2: 1.2 less the power", lambda m: 1.2 - m["power"])),
    table=(("", "measured"), {**{f"accuracy, {name}, %": (name,) for name in ARMS}, "error, power of the hashes": ("error's power",),
                              "time, power of the length": ("power",)}),
    draw=draw)
