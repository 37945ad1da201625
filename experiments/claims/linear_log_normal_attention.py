"""The paper: linear log-normal attention is nearest to softmax attention in distribution and concentration among linear attentions, and on GLUE it is better than
they are, better still with softmax attention in blocks beside it.

Here: (a) the queries, keys and values of all layers and heads of a pretrained encoder, MiniLM (heads of 32), on 20 docstrings of Python's standard library (`attnx
fetch minilm-l6`), are weighed by softmax and, without any training, by exponential features whose temperatures match the deviations of each layer's queries and
keys (constants fitted for heads of 32), by elu + 1, by relu, and by 1 + cosine. The entropy gap is the mean over rows of the difference to softmax's entropy, in
nats; the cosine is that between outputs. (b) Classifiers of handwritten digits, 64 pixels as tokens (two layers, width 32, two heads, learned positions), are
trained 300 steps on 32 images with elu + 1, with LLN and with LLN and blocks of 16 tokens (the head size). The claim holds if LLN has the smallest entropy gap, and
if on held-out digits LLN with blocks is no worse than LLN and that no worse than elu + 1, by half a point.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx import analysis, linear, pretrained
from attnx.nn import Attention, record
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits, passages
from experiments.tiny import Tiny

FEATURES, HEADS, PASSAGES = 32, 2, 20


def _lln(query, key, seen):
    """Features of one layer; deviations over its tokens that are there."""
    sigmas = (jnp.std(x, where=seen[..., None, None]) for x in (query, key))
    alpha, beta = linear.moment_match(*sigmas, *linear.fit_moment_constants(query.shape[-1]))
    return jnp.exp(alpha * query), jnp.exp(beta * key)


def _both(phi):
    return lambda query, key, seen: (phi(query), phi(key))


MAPS = {"LLN": _lln, "elu + 1": _both(linear.elu_plus_one), "relu": _both(jax.nn.relu),
        "1 + cosine": _both(lambda x: jnp.concatenate([jnp.ones_like(x[..., :1]), linear.unit(x)], -1))}


@jax.jit
def _compare(query, key, value, seen):
    """Of one layer [B, T, N, H]: by name the entropy gap and the cosine of outputs to softmax's."""
    def read(scores):
        weights = jnp.where(seen[:, None, None], scores, 0)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
        return analysis.row_entropy(weights), jnp.einsum("bnts,bsnv->bntv", weights, value)

    s = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    entropy, out = read(jnp.exp(s - s.max(-1, keepdims=True)))
    rows, found = seen[:, None], {}
    for name, features in MAPS.items():
        q, k = features(query, key, seen)
        its, other = read(jnp.einsum("btnh,bsnh->bnts", q, k))
        cosine = jnp.sum(out * other, -1) / jnp.maximum(jnp.linalg.norm(out, axis=-1) * jnp.linalg.norm(other, axis=-1), 1e-9)
        found[f"{name} gap"], found[f"{name} cosine"] = jnp.mean(jnp.abs(its - entropy), where=rows), jnp.mean(cosine, where=rows)
    return found


@functools.cache
def _minilm():
    return pretrained.load("minilm-l6")


def _replaced(trial):
    """Means over layers."""
    model = _minilm()
    tokens, positions = model.encode(passages.texts(trial.seed, trial.scaled(PASSAGES, 2)))
    seen = jnp.broadcast_to(jnp.asarray(positions) >= 0, tokens.shape)
    _, layers = record(model.model, tokens, positions, stage="qkv")
    found = [_compare(*(x[index] for x in layers), seen) for index in range(len(layers[0]))]
    return {name: float(np.mean([layer[name] for layer in found])) for name in found[0]}


def _encoder(mechanism):
    return lambda rngs: Attention(FEATURES, HEADS, mechanism=mechanism, rngs=rngs)


def _digits_lln(mode):
    return lambda rngs: linear.LLNAttention(FEATURES, HEADS, mode=mode, statistics="batch", constants=linear.fit_moment_constants(FEATURES // HEADS), is_causal=False,
                                            rngs=rngs)


ARMS = {"LLN and blocks": _digits_lln("average"), "LLN": _digits_lln(None),
        "elu + 1": _encoder(attnx.recurrent(feature_map=linear.elu_plus_one, normalize=True, is_causal=False))}


def run(trial: Trial):
    """Compares in the encoder, then trains classifiers."""
    measured = _replaced(trial)
    train, held = digits.split(trial.seed)
    for index, (name, attention) in enumerate(ARMS.items()):
        model = Tiny(FEATURES, [attention] * 2, input_size=1, outputs=digits.CLASSES, position="learned", max_length=64, pooled=True, rngs=nnx.Rngs(trial.seed))
        params, apply = functional(model)
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, digits.sequence(batch[0])), batch[1])
        params = fit(loss, params, digits.sampler(train, 32), steps=trial.scaled(300), trial=trial.part(0.1 + 0.3 * index, 0.4 + 0.3 * index), name=name)
        measured[f"{name} accuracy"] = accuracy(jax.jit(apply)(params, digits.sequence(held[0])), held[1])
    return measured


def draw(figure, seeds):
    """Gaps, cosines and accuracies."""
    for axes, names, what, label in zip(figure.subplots(1, 3), (MAPS, MAPS, ARMS), ("gap", "cosine", "accuracy"),
                                        ("entropy gap in MiniLM, nats", "cosine to softmax's outputs", "accuracy, digits")):
        bars(axes, {name: [seed[f"{name} {what}"] for seed in seeds] for name in names}, label)


claim = Claim(
    id="linear-log-normal-attention",
    run=run,
    criteria=(
        Criterion("entropy gap in MiniLM, nats: LLN's below all others", lambda m: min(m[f"{name} gap"] for name in MAPS if name != "LLN") - m["LLN gap"]),
        Criterion("accuracy on digits: with blocks no worse than LLN, by half a point", lambda m: m["LLN and blocks accuracy"] - m["LLN accuracy"] + 0.005),
        Criterion("accuracy on digits: LLN no worse than elu + 1, by half a point", lambda m: m["LLN accuracy"] - m["elu + 1 accuracy"] + 0.005)),
    table=(("", "entropy gap, nats", "cosine of outputs", "accuracy, digits"),
           {name: (f"{name} gap" if name in MAPS else "", f"{name} cosine" if name in MAPS else "", f"{name} accuracy" if name in ARMS else "")
            for name in dict.fromkeys((*MAPS, *ARMS))}),
    draw=draw)
