"""The paper: attention matrices of trained models are nearly of low rank; with keys and values projected to 128 or 256 slots a model is as good as with all 512 keys, and
up to 20 times as fast on long sequences.

Here: (1) the attention matrices of MiniLM (6 layers of 12 heads) on the first 256 tokens of three docstrings a seed: what share of the sum of singular values the 64
largest have, on average; needs `attnx fetch minilm-l6`. (2) Digits as sequences of 64 pixels are classified by a bidirectional transformer (two layers, width 32,
two heads, learned positions, 300 steps of 32 images) with softmax attention and with 4 to 32 slots (E and F for all heads). (3) Seconds of a forward pass of one
layer's attention (four heads of 32, 64 slots) for 512 to 8192 tokens, the least of several, as a power of the length; softmax attention's beside it.
The claim holds if the share is above 0.9 on average, 16 slots are at most 1.5 points below softmax attention, and the power is at most 1.2.
"""

import functools

import jax
import numpy as np
from flax import nnx

import attnx
from attnx import analysis, linear, pretrained
from attnx.nn import Attention, record
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars, lines
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits, passages
from experiments.timing import least_seconds
from experiments.tiny import Tiny

TOKENS, PASSAGES, FEATURES, HEADS, SLOTS, STEPS = 256, 3, 32, 2, (4, 8, 16, 32), 300
LENGTHS, TIMED = (512, 1024, 2048, 4096, 8192), 64


def _linformer(slots):
    return lambda rngs: linear.LinformerAttention(FEATURES, HEADS, max_length=64, slots=slots, rngs=rngs)


ARMS = {"softmax": lambda rngs: Attention(FEATURES, HEADS, mechanism=attnx.pairs(), rngs=rngs)} | {f"{slots} slots": _linformer(slots) for slots in SLOTS}


@functools.cache
def _model():
    return pretrained.load("minilm-l6")


@functools.partial(jax.jit, static_argnums=0)
def _maps(graph, params, tokens):
    return record(nnx.merge(graph, params), tokens)[1]


def spectra(seed, count):
    """Cumulative singular values of the model's maps of passages: [layers, heads * passages, ranks]."""
    read = [encoding.ids for encoding in _model().tokenizer.encode_batch(passages.texts(seed, 40, shortest=1200, longest=1200))]
    tokens = np.array([ids[:TOKENS] for ids in read if len(ids) >= TOKENS][:count])
    maps = _maps(*nnx.split(_model().model), tokens)
    return np.asarray(jax.jit(jax.vmap(analysis.spectrum))(maps)).reshape(len(maps), -1, TOKENS)


@functools.cache
def _compiled(name):
    return jax.jit(linear.linformer_attention if name == "linformer" else lambda query, key, value, _: attnx.attention(query, key, value))


def _microseconds(name, length, times):
    """Of a token."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, length, 4, 32))
    projection = jax.random.normal(jax.random.key(1), (TIMED, length)) * TIMED**-0.5
    return 1e6 * least_seconds(lambda: _compiled(name)(query, key, value, projection), times) / length


def _power(measured):
    lengths = LENGTHS[:len(measured["linformer, microseconds"])]
    return 1 + np.polyfit(np.log(lengths), np.log(measured["linformer, microseconds"]), 1)[0]


def run(trial: Trial):
    """Looks into the model, trains all arms, and takes the time."""
    shares = spectra(trial.seed, trial.scaled(PASSAGES, 1))
    measured = {"spectrum": shares.mean((0, 1))[::4].tolist(), "share at a quarter": shares[..., TOKENS // 4 - 1].mean(),
                "share at a quarter, last layer": shares[-1, :, TOKENS // 4 - 1].mean()}
    train, (images, labels) = digits.split(trial.seed)
    for index, (name, attention) in enumerate(ARMS.items()):
        model = Tiny(FEATURES, [attention] * 2, input_size=1, outputs=digits.CLASSES, position="learned", max_length=64, pooled=True, rngs=nnx.Rngs(trial.seed))
        params, apply = functional(model)
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, digits.sequence(batch[0])), batch[1])
        params = fit(loss, params, digits.sampler(train, 32), steps=trial.scaled(STEPS), trial=trial.part(0.1 + 0.16 * index, 0.26 + 0.16 * index), name=name)
        measured[name] = 100 * accuracy(jax.jit(apply)(params, digits.sequence(images)), labels)
    for name in ("linformer", "softmax"):
        lengths = LENGTHS[:2] if trial.smoke else LENGTHS if name == "linformer" else LENGTHS[:4]
        measured[f"{name}, microseconds"] = [_microseconds(name, length, trial.scaled(10, 1)) for length in lengths]
    measured["power"] = _power(measured)
    return measured


def draw(figure, seeds):
    """Spectra, accuracy, and time."""
    left, middle, right = figure.subplots(1, 3)
    lines(left, range(1, TOKENS + 1, 4), {"MiniLM": [seed["spectrum"] for seed in seeds]}, "rank", "share of singular values")
    left.set_ylim(0, 1)
    bars(middle, {name: [seed[name] for seed in seeds] for name in ARMS}, "accuracy on digits held out, %")
    middle.set_ylim(max(0, min(seed[name] for seed in seeds for name in ARMS) - 5), 100)
    for name in ("linformer", "softmax"):
        values = np.asarray([seed[f"{name}, microseconds"] for seed in seeds])
        right.plot(LENGTHS[:values.shape[1]], values.mean(0), ".-", label=name)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds a token")
    right.legend(frameon=False)


claim = Claim(
    id="linformer",
    run=run,
    criteria=(
        Criterion("share of singular values in the largest quarter above 0.9", lambda m: m["share at a quarter"] - 0.9),
        Criterion("accuracy, points: 16 slots at most 1.5 below softmax", lambda m: m["16 slots"] - m["softmax"] + 1.5),
        Criterion("time as a power of the length at most 1.2: 1.2 less the power", lambda m: 1.2 - m["power"])),
    table=(("", "measured"), {"share of the largest quarter": ("share at a quarter",), "the same, last layer": ("share at a quarter, last layer",),
                              **{f"accuracy, {name}, %": (name,) for name in ARMS}, "time, power of the length": ("power",)}),
    draw=draw)
