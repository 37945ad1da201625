"""A small text-to-image diffusion model of :mod:`experiments.tasks.shapes`, made of attnx.nn blocks: the given model of experiments that steer attention.

Pictures of 12 x 12 become 36 tokens of 2 x 2 pixels, which pass three blocks of a convolution, self-attention (layers 0 to 2, hooks ``qkv``, ``scores``, ...),
cross-attention to the four words of the prompt (hooks ``cross_qkv``, ...) and an MLP. As in the U-Nets that are steered in practice, tokens have no vectors of their
positions: only the convolutions and their padded borders know where a token is. The model predicts the picture without noise. Its trained weights come
with the package, in half precision; this trains them again:

    python -m experiments.denoiser

Sources: noise schedule, Alex Nichol, Prafulla Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, arXiv:2102.09672; deterministic sampling and its
inversion, Jiaming Song, Chenlin Meng, Stefano Ermon, "Denoising Diffusion Implicit Models", 2020, arXiv:2010.02502; norms, William Peebles, Saining Xie, "Scalable
Diffusion Models with Transformers", 2022, arXiv:2212.09748; prompts dropped for guidance, Jonathan Ho, Tim Salimans, "Classifier-Free Diffusion
Guidance", 2022, arXiv:2207.12598.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import attnx
from attnx.nn import MLP, Attention, Stack
from attnx.nn.hooks import Hooks, split_hooks
from experiments.evidence import Trial
from experiments.fit import fit, functional
from experiments.tasks import shapes

FILE = Path(__file__).parent / "denoiser.npz"
PATCH, FEATURES, HEADS, LAYERS, STEPS = 2, 64, 4, 3, 25
GRID = shapes.SIDE // PATCH
"""Tokens on a side."""
CLEAN, NOISE = 0.01, 0.98
"""The times of what counts as a picture and as pure noise."""


def signal(time):
    """The share ``a(t)`` of the variance of x_t = sqrt(a) x_0 + sqrt(1 - a) noise that is signal, t from 0 to 1: a cosine schedule."""
    return jnp.cos((time + 0.008) / 1.008 * jnp.pi / 2) ** 2


def patches(pictures: Float[Array, "*B h w c"], size: int = PATCH) -> Float[Array, "*B T P"]:
    """Pictures as tokens of ``size`` x ``size`` pixels, row by row."""
    *lead, h, w, c = pictures.shape
    x = pictures.reshape(*lead, h // size, size, w // size, size, c)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, (h // size) * (w // size), size * size * c)


def unpatch(tokens: Float[Array, "*B T P"], grid: int = GRID, size: int = PATCH) -> Float[Array, "*B h w c"]:
    """The pictures of tokens, ``grid`` of them in a row."""
    *lead, count, features = tokens.shape
    x = tokens.reshape(*lead, count // grid, grid, size, size, features // size**2)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, count // grid * size, grid * size, features // size**2)


def neighbours(x: Float[Array, "B T D"]) -> Float[Array, "B T 9*D"]:
    """Each token and the eight around it, zeros beyond the border: a linear map of them is a 3 x 3 convolution (and, in a compiled loop, much faster on CPUs)."""
    padded = jnp.pad(x.reshape(-1, GRID, GRID, x.shape[-1]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i:i + GRID, j:j + GRID] for i in range(3) for j in range(3)], axis=-1).reshape(*x.shape[:2], -1)


class Block(nnx.Module):
    """A convolution, self-attention, cross-attention and an MLP around a residual stream; the level of noise scales, shifts and gates all but the first."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.mix = nnx.Linear(9 * FEATURES, FEATURES, rngs=rngs)
        self.attention = Attention(FEATURES, HEADS, mechanism=attnx.pairs(), rngs=rngs)
        self.cross_attention = Attention(FEATURES, HEADS, mechanism=attnx.pairs(), rngs=rngs)
        self.mlp = MLP(FEATURES, 2 * FEATURES, activation=jax.nn.gelu, gated=False, rngs=rngs)
        self.modulation = nnx.Linear(FEATURES, 9 * FEATURES, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, use_bias=False, use_scale=False, rngs=rngs)

    def __call__(self, x, *, context, level, hooks: Hooks | None = None, layer=0, dropout_key=None):
        """[B, T, D] -> [B, T, D]; context [B, 4, D], level [B, D]."""
        own, cross = split_hooks(hooks)
        x = x + self.mix(neighbours(jax.nn.silu(self.norm(x))))
        change = jnp.split(self.modulation(jax.nn.silu(level))[:, None], 9, axis=-1)
        steps = (lambda y: self.attention(y, hooks=own, layer=layer), lambda y: self.cross_attention(y, context, hooks=cross, layer=layer), self.mlp)
        for f, scale, shift, gate in zip(steps, change[0::3], change[1::3], change[2::3]):
            x = x + gate * f(self.norm(x) * (1 + scale) + shift)
        return x


class Denoiser(nnx.Module):
    """``model(x_t [B, 12, 12, 3], time [B], words int32 [B, 4], hooks=None) -> x_0 [B, 12, 12, 3]``."""

    def __init__(self, *, rngs: nnx.Rngs):
        size = PATCH**2 * 3
        self.inputs, self.outputs = nnx.Linear(size, FEATURES, rngs=rngs), nnx.Linear(FEATURES, size, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.words = nnx.Param(jax.random.normal(rngs.params(), (len(shapes.WORDS), FEATURES)))
        self.order = nnx.Param(jax.random.normal(rngs.params(), (4, FEATURES)))
        self.level = nnx.Sequential(nnx.Linear(FEATURES, FEATURES, rngs=rngs), jax.nn.silu, nnx.Linear(FEATURES, FEATURES, rngs=rngs))
        self.stack = Stack(Block, LAYERS, unroll=True, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)

    def __call__(self, x: Float[Array, "B 12 12 3"], time: Float[Array, " B"], words: Int[Array, "B 4"], hooks: Hooks | None = None) -> Float[Array, "B 12 12 3"]:
        """The picture without noise."""
        angles = time[:, None] * 100 * jnp.exp(-jnp.linspace(0, jnp.log(1000.0), FEATURES // 2))
        level = self.level(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        context = self.words[...][words] + self.order[...]
        tokens = self.inputs(patches(x)) + level[:, None]
        tokens = self.stack(tokens, context=context, level=level, hooks=hooks)
        return unpatch(self.outputs(self.norm(tokens)))


def times(steps: int = STEPS) -> Float[Array, " steps+1"]:
    """From noise to picture; reversed, from picture to noise."""
    return jnp.linspace(NOISE, CLEAN, steps + 1)


def noise_of(x, clean, time):
    """The noise that is in x_t if ``clean`` is its picture."""
    a = signal(time)
    return (x - jnp.sqrt(a) * clean) / jnp.sqrt(1 - a)


def move(clean, noise, time):
    """x_t of a picture and noise."""
    a = signal(time)
    return jnp.sqrt(a) * clean + jnp.sqrt(1 - a) * noise


def ddim(predict: Callable, x: Float[Array, "B h w c"], times: Float[Array, " n+1"], adjust: Callable = lambda x, index: x) -> Float[Array, "n+1 B h w c"]:
    """Deterministic sampling, or its inversion if the times rise.

    ::

        x_(i+1) = sqrt(a_(i+1)) x0 + sqrt(1 - a_(i+1)) noise,        x0 = predict(x_i, t_i, i), noise = (x_i - sqrt(a_i) x0) / sqrt(1 - a_i)

    Args:
      predict: ``predict(x, time, index) -> picture without noise``, the index traced.
      x: at ``times[0]``.
      times: see :func:`times`.
      adjust: ``adjust(x, index)`` of x at ``times[index]``, after each step.

    Returns:
      x at all times, the first one first.
    """
    def step(x, index):
        clean = predict(x, times[index], index)
        following = adjust(move(clean, noise_of(x, clean, times[index]), times[index + 1]), index + 1)
        return following, following

    _, path = jax.lax.scan(step, x, jnp.arange(times.size - 1))
    return jnp.concatenate([x[None], path])


def predictor(apply: Callable, words: Int[Array, "B 4"], *, guidance: float = 1.0, hooks: Callable | None = None) -> Callable:
    """``predict`` for :func:`ddim`, of a model and a prompt.

    Args:
      apply: ``apply(x, time [B], words, hooks=...)``, see :func:`load`.
      words: the prompts.
      guidance: w in ``empty + w (prompted - empty)``, of what is predicted with the prompt and with the one that says nothing.
      hooks: ``hooks(index) -> hooks`` of a step.
    """
    def predict(x, time, index):
        call = functools.partial(apply, x, jnp.full(x.shape[:1], time), hooks=None if hooks is None else hooks(index))
        prompted = call(words)
        if guidance == 1.0:
            return prompted
        empty = call(jnp.zeros_like(words))
        return empty + guidance * (prompted - empty)

    return predict


def loss(apply: Callable) -> Callable:
    """The training loss ``(params, (pictures, words), key)``: squared errors of the picture, weighted by 1 + min(signal-to-noise, 5)."""
    def cost(params, batch, key):
        pictures, words = batch
        time, noise = jax.random.split(key)
        time = jax.random.uniform(time, pictures.shape[:1], minval=CLEAN, maxval=NOISE)
        a = signal(time)[:, None, None, None]
        x = jnp.sqrt(a) * pictures + jnp.sqrt(1 - a) * jax.random.normal(noise, pictures.shape)
        return jnp.mean((1 + jnp.minimum(a / (1 - a), 5)) * jnp.square(apply(params, x, time, words) - pictures))

    return cost


def train(trial: Trial, steps: int = 3000, batch: int = 64) -> Any:
    """The parameters of a trained model."""
    params, apply = functional(Denoiser(rngs=nnx.Rngs(trial.seed)))
    return fit(loss(apply), params, shapes.sampler(batch), steps=trial.scaled(steps), trial=trial, learning_rate=2e-3, name="denoiser")


def save(params: Any, file: Path = FILE) -> None:
    """Writes parameters in half precision."""
    np.savez_compressed(file, *(np.asarray(x, np.float16) for x in jax.tree.leaves(params)))


@functools.cache
def load(file: Path = FILE) -> Callable:
    """The trained model: ``apply(x [B, 12, 12, 3], time [B], words [B, 4], hooks=None) -> picture [B, 12, 12, 3]``."""
    params, apply = functional(nnx.eval_shape(lambda: Denoiser(rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(params)
    with np.load(file, allow_pickle=False) as arrays:
        stored = [arrays[f"arr_{i}"] for i in range(len(leaves))]
    if [x.shape for x in stored] != [x.shape for x in leaves]:
        raise ValueError(f"{file}: expected the weights of this model; python -m experiments.denoiser writes them")
    with jax.ensure_compile_time_eval():  # what is kept must not belong to whoever is tracing the first call
        return functools.partial(apply, jax.tree.unflatten(structure, [jnp.asarray(x, jnp.float32) for x in stored]))


if __name__ == "__main__":
    save(train(Trial(0, report=lambda share, text: print(f"{share:4.0%}  {text}", flush=True))))
