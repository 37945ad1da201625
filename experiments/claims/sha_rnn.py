"""The paper: an LSTM language model with one head of attention in one layer does nearly as well as with one in each of its four, and better than without attention.

Here: models of bytes with four LSTM layers of width 64 and boom, without attention, with one head in the last layer but one, and with one in all, and a transformer
(two layers, four heads, rotary positions) of about as many parameters as the second, are trained 400 steps on 8 windows of 192 bytes of Python source. The recurrent
ones read a window as three segments of 64 and remember up to 128 tokens of those before; the transformer reads it at once. Half of the windows are 96 bytes and
the same again, so that a memory helps in their second half. Bits per byte are measured on held-out files, in such windows and in plain ones. The claim holds if one head
lowers the bits of plain text by at least 2% and those of repetitions at all, and heads in all layers gain less than half as much again on plain text.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx import masks, training
from attnx.models import ShaRnn
from attnx.nn import Attention
from attnx.positions import Rotary
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import text
from experiments.tiny import Tiny

FEATURES, LAYERS, SEGMENT, SEGMENTS, BATCH, STEPS = 64, 4, 64, 3, 8, 400
LENGTH = SEGMENT * SEGMENTS


class Segments(ShaRnn):
    """The model, reading windows segment by segment."""

    def __call__(self, tokens, **options):
        """Logits [B, T, 256]."""
        def read(state, tokens):
            return self.step(state, tokens)

        parts = jnp.moveaxis(tokens.reshape(len(tokens), -1, SEGMENT), 1, 0)
        logits = jax.lax.scan(read, self.init_state(len(tokens)), parts)[1]
        return jnp.moveaxis(logits, 0, 1).reshape(*tokens.shape, -1)


def _recurrent(layers):
    return lambda rngs: Segments(text.VOCABULARY, FEATURES, LAYERS, attention_layers=layers, memory_size=2 * SEGMENT, rngs=rngs)


def _transformer(rngs):
    attention = lambda rngs: Attention(FEATURES, 4, mechanism=attnx.pairs(mask=masks.causal()), position=Rotary(), rngs=rngs)
    return Tiny(FEATURES, [attention] * 2, inputs=text.VOCABULARY, hidden=480, rngs=rngs)


ARMS = {"no attention": _recurrent(()), "one head": _recurrent((LAYERS - 2,)), "all layers": _recurrent(tuple(range(LAYERS))), "transformer": _transformer}


def _repeated(tokens):
    """Windows [B, LENGTH + 1] whose second half repeats the first."""
    half = LENGTH // 2
    return jnp.concatenate([tokens[:, :half], tokens[:, :half], tokens[:, :1]], axis=1)


def run(trial: Trial):
    """Trains all arms."""
    measured = {}
    sample = text.sampler(LENGTH, BATCH)

    def mixed(key):
        tokens = sample(key)
        return jnp.where((jnp.arange(BATCH) % 2 == 0)[:, None], tokens, _repeated(tokens))

    held = _held(trial.scaled(64, 2), trial.seed)
    for index, (name, make) in enumerate(ARMS.items()):
        params, apply = functional(make(nnx.Rngs(trial.seed)))
        params = fit(text.loss(apply), params, mixed, steps=trial.scaled(STEPS), trial=trial.part(index / 4, (index + 1) / 4), name=name)
        measured |= {name: text.bits(apply, params, LENGTH, count=trial.scaled(96, 2)).mean(), f"{name}, repeated": _second_half(apply, params, _repeated(held)),
                     f"{name}, parameters": sum(x.size for x in jax.tree.leaves(params))}
    return measured


def _held(count, seed):
    """Windows of held-out files, [count, LENGTH + 1]."""
    tokens = training.read().split()[1].tokens
    starts = np.random.default_rng(seed).integers(0, tokens.size - LENGTH - 1, count)
    return jnp.asarray(tokens[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32))


def _second_half(apply, params, tokens):
    """Bits a byte of what has been seen before."""
    logp = jax.nn.log_softmax(jax.jit(apply)(params, tokens[:, :-1]))
    bits = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0] / np.log(2)
    return bits[:, LENGTH // 2:].mean()


def draw(figure, seeds):
    """Bits per byte of plain windows and of repetitions."""
    left, right = figure.subplots(1, 2)
    bars(left, {name: [seed[name] for seed in seeds] for name in ARMS}, "bits per byte")
    bars(right, {name: [seed[f"{name}, repeated"] for seed in seeds] for name in ARMS}, "bits per byte, said again")


claim = Claim(
    id="sha-rnn",
    run=run,
    criteria=(
        Criterion("bits per byte: one head at least 2% better than none", lambda m: 0.98 * m["no attention"] - m["one head"]),
        Criterion("bits per byte: heads in all layers gain less than half as much again",
                  lambda m: (m["no attention"] - m["one head"]) / 2 - (m["one head"] - m["all layers"])),
        Criterion("bits per byte of repetitions: one head better than none", lambda m: m["no attention, repeated"] - m["one head, repeated"])),
    table=(("", "bits per byte", "said again", "parameters"), {name: (name, f"{name}, repeated", f"{name}, parameters") for name in ARMS}),
    draw=draw)
