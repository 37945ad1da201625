"""Small classifiers of pictures around any mixing of a grid's tokens, for experiments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx import masks, scores
from attnx.core.axes import window_partition, window_regions, window_reverse
from attnx.models.nat import ConvDownsampler
from attnx.nn import make_norm
from attnx.vision import NATBlock


class TinyGrid(nnx.Module):
    """Patches of 2 x 2 pixels, stages of blocks between which sides are halved and features doubled, the mean, logits.

    Args:
      channels: of the pictures.
      features: D of the first stage.
      mixers: for each stage, for each block a constructor ``(features, rngs) -> module`` [B, h, w, D] -> the same.
      outputs: number of logits.
      rngs: the generator of initial values.

    >>> conv = lambda features, rngs: DepthwiseConv(features, 3, rngs=rngs)
    >>> TinyGrid(1, 8, [[conv], [conv]], 10, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 1))).shape
    (2, 10)
    """

    def __init__(self, channels: int, features: int, mixers: Sequence[Sequence[Callable]], outputs: int, *, rngs: nnx.Rngs):
        sizes = [features * 2**index for index in range(len(mixers))]
        self.embed = nnx.Conv(channels, features, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.stages = nnx.List([nnx.List([NATBlock(size, make(size, rngs), 2 * size, rngs=rngs) for make in stage]) for size, stage in zip(sizes, mixers)])
        self.reduce = nnx.List([ConvDownsampler(size, rngs=rngs) for size in sizes[:-1]])
        self.norm, self.head = make_norm("layer", sizes[-1], rngs=rngs), nnx.Linear(sizes[-1], outputs, rngs=rngs)

    def tokens(self, x):
        """[B, h, w, D] of the last stage."""
        x = self.embed(x)
        for index, blocks in enumerate(self.stages):
            for block in blocks:
                x = block(x)
            x = self.reduce[index](x) if index < len(self.reduce) else x
        return self.norm(x)

    def __call__(self, x) -> jax.Array:
        """[B, h, w, C] to [B, outputs]."""
        return self.head(self.tokens(x).mean((1, 2)))


class DepthwiseConv(nnx.Module):
    """A convolution of each channel, and a projection."""

    def __init__(self, features: int, window: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (window, window, features)) / window)
        self.out = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x):
        kernel = self.kernel[...]
        window, (height, width) = kernel.shape[0], x.shape[1:3]
        padded = jnp.pad(x, [(0, 0)] + [(window // 2, (window - 1) // 2)] * 2 + [(0, 0)])
        # A sum of shifts: on a CPU the gradient of a convolution by groups takes a hundred times as long.
        return self.out(sum(kernel[i, j] * padded[:, i:i + height, j:j + width] for i in range(window) for j in range(window)))


class ShiftedWindows(nnx.Module):
    """Attention within windows that tile the grid, shifted by half of one or not, with relative biases."""

    def __init__(self, features: int, num_heads: int, window: int, shifted: bool, *, rngs: nnx.Rngs):
        self.num_heads, self.window, self.shift = num_heads, (window, window), window // 2 if shifted else 0
        self.project, self.out = nnx.Linear(features, 3 * features, rngs=rngs), nnx.Linear(features, features, rngs=rngs)
        self.bias = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_heads, 2 * window - 1, 2 * window - 1)))

    def __call__(self, x):
        place = np.stack(np.unravel_index(np.arange(self.window[0] ** 2), self.window), -1)
        down, right = np.moveaxis(place - place[:, None], -1, 0) + self.window[0] - 1
        windows = window_partition(self.project(x), self.window, shift=self.shift)
        regions = window_regions(x.shape[1:3], self.window, shift=self.shift)
        ids = jnp.tile(regions, (len(windows) // len(regions), 1))
        query, key, value = (y.reshape(*windows.shape[:2], self.num_heads, -1) for y in jnp.split(windows, 3, axis=-1))
        out = attnx.attention(query, key, value, scores=scores.bias(self.bias[...][:, down, right][None]), mask=masks.documents(ids), implementation="reference")
        return self.out(window_reverse(out.reshape(*windows.shape[:2], -1), self.window, x.shape[1:3], shift=self.shift))


def train(name: str, model: nnx.Module, loss: Callable, sample: Callable, **options: Any):
    """:func:`experiments.fit.fit` of a model by ``loss(logits, batch)``; returns ``(params, apply)``."""
    from experiments.fit import fit, functional

    params, apply = functional(model)
    return fit(lambda params, batch, key: loss(apply(params, batch[0]), batch), params, sample, name=name, **options), apply
