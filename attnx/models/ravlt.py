"""RAVLT: an image classifier of four stages, linear attention of augmented rank in the first and softmax attention in the last.

Fan, Huang, He: "Breaking the Low-Rank Dilemma of Linear Attention" (CVPR 2025, arXiv 2411.07635). Convolutions make an image a quarter as high and wide; each stage is
some blocks (:class:`attnx.linear.RavltBlock`), and between stages a convolution halves both sides again.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnx.linear.rank_augmented import RALA2d, RavltBlock, SoftmaxModulated2d


class Stage(NamedTuple):
    """Some blocks of one resolution.

    Attributes:
      features: D.
      depth: how many blocks.
      num_heads: N.
      softmax: whether its attention is softmax attention.
    """

    features: int
    depth: int
    num_heads: int
    softmax: bool = False


@dataclasses.dataclass(frozen=True)
class RAVLTConfig:
    """The sizes of a RAVLT.

    >>> [stage.features for stage in RAVLTConfig.tiny().stages]
    [64, 128, 256, 512]
    """

    stages: tuple[Stage, ...]
    """From fine to coarse."""
    classes: int = 1000
    """Size of the output."""
    channels: int = 3
    """Of the image."""
    mlp_ratio: float = 3.5
    """Hidden size of the feed-forward networks over D."""
    drop_rate: float = 0.1
    """Stochastic depth of the last block; it rises linearly from 0."""
    layer_scale: float | None = 1.0
    """What the scales of residual branches start at; None for none."""
    projection: int = 1024
    """Size of the pooled features."""

    @classmethod
    def tiny(cls, **options) -> "RAVLTConfig":
        """RAVLT-T: 15 million parameters."""
        return cls((Stage(64, 2, 1), Stage(128, 2, 2), Stage(256, 6, 4, softmax=True), Stage(512, 2, 8, softmax=True)), **options)


class _Reduce(nnx.Module):
    """A convolution of stride 2 or 1 and a batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.convolution = nnx.Conv(inputs, outputs, (3, 3), strides=(stride, stride), padding=((1, 1), (1, 1)), rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.convolution(x))


class RAVLT(nnx.Module):
    """The Rank-Augmented Vision Linear Transformer.

    Args:
      config: its sizes.
      rngs: the generator of initial values.

    Its batch norms follow ``model.train()`` and ``model.eval()``.

    >>> config = RAVLTConfig((Stage(8, 1, 1), Stage(16, 1, 2, softmax=True)), classes=10, projection=32)
    >>> model = RAVLT(config, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 16, 24, 3))).shape
    (2, 10)
    """

    def __init__(self, config: RAVLTConfig, *, rngs: nnx.Rngs):
        self.config = config
        first = config.stages[0].features
        half = first // 2
        self.embed = nnx.List([_Reduce(config.channels, half, 2, rngs=rngs), _Reduce(half, half, 1, rngs=rngs), _Reduce(half, half, 1, rngs=rngs),
                               _Reduce(half, first, 2, rngs=rngs)])
        rates = iter(np.linspace(0, config.drop_rate, sum(stage.depth for stage in config.stages)).tolist())

        def block(stage):
            attention = (SoftmaxModulated2d if stage.softmax else RALA2d)(stage.features, stage.num_heads, rngs=rngs)
            return RavltBlock(stage.features, attention, int(config.mlp_ratio * stage.features), drop_rate=next(rates), layer_scale=config.layer_scale, rngs=rngs)

        self.stages = nnx.List([nnx.List([block(stage) for _ in range(stage.depth)]) for stage in config.stages])
        self.reduce = nnx.List([_Reduce(a.features, b.features, 2, rngs=rngs) for a, b in zip(config.stages, config.stages[1:])])
        self.project = nnx.Linear(config.stages[-1].features, config.projection, rngs=rngs)
        self.norm = nnx.BatchNorm(config.projection, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(config.projection, config.classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"], *, dropout_key: Array | None = None) -> Float[Array, "B K"]:
        """Images [B, h, w, C] of any size to logits [B, classes].

        Args:
          x: the images.
          dropout_key: for stochastic depth; None for none.
        """
        if x.ndim != 4 or x.shape[-1] != self.config.channels:
            raise ValueError(f"x: expected shape [B, h, w, {self.config.channels}], got {x.shape}")
        for index, layer in enumerate(self.embed):
            x = layer(x)
            x = x if index == len(self.embed) - 1 else jax.nn.gelu(x, approximate=False)
        count = sum(len(blocks) for blocks in self.stages)
        keys = iter([None] * count if dropout_key is None else jax.random.split(dropout_key, count))
        for index, blocks in enumerate(self.stages):
            for layer in blocks:
                x = layer(x, dropout_key=next(keys))
            x = self.reduce[index](x) if index < len(self.reduce) else x
        x = jax.nn.silu(self.norm(self.project(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))
