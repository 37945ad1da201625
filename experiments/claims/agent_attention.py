"""The paper: with agents, DeiT-T classifies ImageNet at 74.9% instead of 72.2%, at less cost; and trained diffusion models run faster with agents, without training.

Here: (1) digits, each pixel doubled to 16 by 16 tokens, are classified by two layers (width 32, two heads, learned positions, 250 steps of 16 images) of agent
attention (16 agents, biases, convolution), the same without its convolution, softmax attention, and linear attention of elu(x) + 1. (2) Seconds of a forward and
backward pass of the agent and of the softmax layer on four images of 32 by 32 tokens, the least of several. (3) MiniLM, trained with softmax attention, embeds 24
docstrings with a quarter as many agents (pooled queries) as tokens in all layers, with the paper's constants; the baseline averages keys and values to as many; each
embedding's cosine to the original is measured. Needs `attnx fetch minilm-l6`.
The claim holds if agents are at most 1.5 points below softmax attention and above linear attention, take less than half of softmax attention's time, and their
embeddings are nearer to the original than those of averaged keys.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import linear, pretrained
from attnx.core.linear import elu_plus_one
from attnx.nn import Attention, set_mechanism
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import accuracy, cross_entropy, fit, functional
from experiments.tasks import digits, passages
from experiments.timing import least_seconds
from experiments.tiny import Tiny

SIDE, LARGE, FEATURES, HEADS, AGENTS, STEPS, BATCH, TEXTS = 16, 32, 32, 2, 16, 250, 16, 24


class Linear:
    """Linear attention both ways, as a mechanism."""

    def __call__(self, query, key, value, **positions):
        return attnx.linear_attention(query, key, value, is_causal=False, normalize=True, feature_map=elu_plus_one)

    def init(self, *sizes):
        """There is none."""
        raise NotImplementedError

    step = init


def _agents(side, **options):
    return lambda rngs: linear.AgentAttention(FEATURES, HEADS, grid=(side, side), agents=AGENTS, rngs=rngs, **options)


def _attention(mechanism):
    return lambda rngs: Attention(FEATURES, HEADS, mechanism=mechanism, rngs=rngs)


ARMS = {"agents": _agents(SIDE), "without convolution": _agents(SIDE, kernel_size=None), "softmax": _attention(attnx.pairs()), "elu + 1": _attention(Linear())}
TIMED = {"agents": _agents(LARGE), "softmax": ARMS["softmax"]}


def pixels(images):
    """[B, 8, 8] to [B, 256, 1]."""
    return jnp.repeat(jnp.repeat(images, 2, 1), 2, 2).reshape(len(images), -1, 1)


class Averaged:
    """Softmax attention to means of contiguous keys and values, a quarter as many."""

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, **options):
        seen = jnp.broadcast_to(key_positions, key.shape[:2]) >= 0
        (key, some), (value, _) = (linear.pool_agents(x, max(x.shape[1] // 4, 1), seen=seen) for x in (key, value))
        return attnx.attention(query, key, value, key_positions=jnp.where(some, 0, -1))

    def init(self, *sizes):
        """There is none."""
        raise NotImplementedError

    step = init


PATCHES = {"agents": linear.agent_patch(0.25), "averaged keys": Averaged()}


@functools.cache
def _models():
    models = {name: pretrained.load("minilm-l6") for name in ("original", *PATCHES)}
    for name, mechanism in PATCHES.items():
        set_mechanism(models[name].model, mechanism)
    return models


def cosines(seed, count):
    """Of each text's embedding and the original's, a mean a patch."""
    texts = passages.texts(seed, count, shortest=400, longest=400)
    expected = _models()["original"].embed(texts)
    return {name: jnp.sum(_models()[name].embed(texts) * expected, -1).mean() for name in PATCHES}


def _seconds(name, times):
    params, apply = functional(TIMED[name](nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (4, LARGE**2, FEATURES))
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2), (0, 1)))
    return least_seconds(lambda: gradient(params, x), times)


def run(trial: Trial):
    """Trains all arms, takes the time, and embeds."""
    measured = {f"{name}, cosine": value for name, value in cosines(trial.seed, trial.scaled(TEXTS)).items()}
    train, (images, labels) = digits.split(trial.seed)
    for index, (name, attention) in enumerate(ARMS.items()):
        model = Tiny(FEATURES, [attention] * 2, input_size=1, outputs=digits.CLASSES, position="learned", max_length=SIDE**2, pooled=True, rngs=nnx.Rngs(trial.seed))
        params, apply = functional(model)
        loss = lambda params, batch, key, apply=apply: cross_entropy(apply(params, pixels(batch[0])), batch[1])
        part = trial.part(0.1 + 0.22 * index, 0.32 + 0.22 * index)
        params = fit(loss, params, digits.sampler(train, BATCH), steps=trial.scaled(STEPS), trial=part, name=name)
        measured[name] = 100 * accuracy(jax.jit(apply)(params, pixels(images)), labels)
    for name in TIMED:
        measured[f"{name}, ms"] = 1e3 * _seconds(name, trial.scaled(10, 1))
    return measured


def draw(figure, seeds):
    """Accuracy, time, and embeddings."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 2, 2))
    bars(left, {name: [seed[name] for seed in seeds] for name in ARMS}, "accuracy on digits held out, %")
    left.set_ylim(max(0, min(seed[name] for seed in seeds for name in ARMS) - 5), 100)
    bars(middle, {name: [seed[f"{name}, ms"] for seed in seeds] for name in TIMED}, f"ms, four images of {LARGE} by {LARGE}")
    bars(right, {name: [seed[f"{name}, cosine"] for seed in seeds] for name in PATCHES}, "cosine to the original embedding")


claim = Claim(
    id="agent-attention",
    run=run,
    criteria=(
        Criterion("accuracy, points: agents at most 1.5 below softmax", lambda m: m["agents"] - m["softmax"] + 1.5),
        Criterion("accuracy, points: agents above linear attention", lambda m: m["agents"] - m["elu + 1"]),
        Criterion(f"time on {LARGE} by {LARGE} tokens below half of softmax attention's: 0.5 less the ratio", lambda m: 0.5 - m["agents, ms"] / m["softmax, ms"]),
        Criterion("cosine to the original: agents above averaged keys", lambda m: m["agents, cosine"] - m["averaged keys, cosine"])),
    table=(("", "accuracy, %", "ms", "cosine"),
           {name: (name if name in ARMS else "", f"{name}, ms" if name in TIMED else "", f"{name}, cosine" if name in PATCHES else "")
            for name in (*ARMS, "averaged keys")}),
    draw=draw)
