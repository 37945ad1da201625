"""The paper: latent attention models language about as well as softmax attention, while the next token takes the same time after any number of others.

Here: a two-layer decoder of bytes (width 64, four heads) is trained 250 steps on eight windows of 128 bytes of Python source with softmax attention and rotary positions,
with Latte of 16 and of 64 latents, with 64 latents and a window of 32 tokens, and with linear attention of elu(x) + 1; bits per byte are measured on held-out
files. Besides, the time of 32 decoding steps of one layer of this width (eight sequences) after 256 and after 8192 tokens, by Latte of 64 latents and by softmax
attention from its cache, the least of several.
The claim holds if Latte of 64 latents has fewer bits than linear attention, with the window at most 3% more than softmax attention, and its time at 8192 is at most
1.2 times that at 256.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import attnx
from attnx import linear, masks
from attnx.core.linear import elu_plus_one
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.timing import least_seconds
from experiments.tiny import Tiny

FEATURES, HEADS, LENGTH, CONTEXTS, DECODED = 64, 4, 128, (256, 8192), 32


def _attention(mechanism, **options):
    return lambda rngs: Attention(FEATURES, HEADS, mechanism=mechanism, rngs=rngs, **options)


def _latte(latents):
    return lambda rngs: linear.LatteAttention(FEATURES, HEADS, latents=latents, rngs=rngs)


ARMS = {"softmax": _attention(attnx.pairs(mask=masks.causal()), position=Rotary()), "Latte, 16": _latte(16), "Latte, 64": _latte(64),
        "Latte, 64, window": lambda rngs: linear.LatteWindowAttention(FEATURES, HEADS, latents=64, window=32, rngs=rngs),
        "elu + 1": _attention(attnx.recurrent(feature_map=elu_plus_one, normalize=True))}
DECODERS = ("Latte, 64", "softmax")


def _milliseconds(name, context, times):
    """Of decoding tokens after as many as ``context`` others."""
    layer = ARMS[name](nnx.Rngs(0))
    graph, params = nnx.split(layer)
    tokens = jax.random.normal(jax.random.key(0), (8, context + DECODED, FEATURES))
    state, _ = jax.jit(lambda state, x: nnx.merge(graph, params).step(state, x))(layer.init_state(8, context + DECODED), tokens[:, :context])

    @jax.jit
    def decode(state, rest):
        return jax.lax.scan(lambda state, x: nnx.merge(graph, params).step(state, x[:, None]), state, rest)[1]

    return 1e3 * least_seconds(lambda: decode(state, jnp.moveaxis(tokens[:, context:], 1, 0)), times) / DECODED


def run(trial: Trial):
    """Trains all arms, and times decoding."""
    measured = {}
    for index, (name, attention) in enumerate(ARMS.items()):
        params, apply = functional(Tiny(FEATURES, [attention] * 2, inputs=text.VOCABULARY, rngs=nnx.Rngs(trial.seed)))
        params = fit(text.loss(apply), params, text.sampler(LENGTH, 8), steps=trial.scaled(250), trial=trial.part(0.19 * index, 0.19 * (index + 1)), name=name)
        measured[name] = text.bits(apply, params, LENGTH, count=trial.scaled(96, 2)).mean()
    for name in DECODERS:
        for context in CONTEXTS:
            measured[f"{name}, ms at {context}"] = _milliseconds(name, context, trial.scaled(20, 2))
    return measured


def draw(figure, seeds):
    """Bits per byte, and the time of a token."""
    left, right = figure.subplots(1, 2)
    bars(left, {name: [seed[name] for seed in seeds] for name in ARMS}, f"bits per byte at {LENGTH}")
    left.set_ylim(min(seed[name] for seed in seeds for name in ARMS) - 0.2)
    bars(right, {f"{name}, after {context}": [seed[f"{name}, ms at {context}"] for seed in seeds] for name in DECODERS for context in CONTEXTS},
         "milliseconds a token")


claim = Claim(
    id="latte-latent-attention",
    run=run,
    criteria=(
        Criterion("bits per byte: Latte of 64 latents below linear attention", lambda m: m["elu + 1"] - m["Latte, 64"]),
        Criterion("bits per byte: Latte with a window at most 3% above softmax", lambda m: 1.03 * m["softmax"] - m["Latte, 64, window"]),
        Criterion("time of a token after 8192 at most 1.2 times that after 256: 1.2 less the ratio",
                  lambda m: 1.2 - m[f"Latte, 64, ms at {CONTEXTS[1]}"] / m[f"Latte, 64, ms at {CONTEXTS[0]}"])),
    table=(("", "bits per byte", *(f"ms after {context}" for context in CONTEXTS)),
           {name: (name, *(f"{name}, ms at {context}" if name in DECODERS else "" for context in CONTEXTS)) for name in ARMS}),
    draw=draw)
