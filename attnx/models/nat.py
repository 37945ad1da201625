"""NAT and DiNAT: image classifiers of four stages of neighbourhood attention, plain or dilated in every second block.

Hassani, Walton, Li, Li, Shi: "Neighborhood Attention Transformer" (CVPR 2023, arXiv 2204.07143); Hassani, Shi: "Dilated Neighborhood Attention Transformer" (2022, arXiv
2209.15001). Two convolutions of stride 2 make an image a quarter as high and wide (in DiNAT_s, patches of 4 by 4 do); each stage is some blocks
(:class:`attnx.vision.NATBlock`), and between stages a convolution of stride 2 (there, 2 by 2 tokens joined) halves both sides and doubles the features.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.nn import make_norm
from attnx.vision.neighborhood_attention import NATBlock, NeighborhoodAttention


@dataclasses.dataclass(frozen=True)
class NATConfig:
    """The sizes of a NAT; those of the paper are class methods.

    >>> NATConfig.tiny().depths, DiNATConfig.tiny().dilations
    ((3, 4, 18, 5), (8, 4, 2, 1))
    """

    features: int
    """D of the first stage; each next one has twice as many."""
    num_heads: tuple[int, ...]
    """A number a stage."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    window: int = 7
    """Tokens a side of a neighbourhood."""
    dilations: tuple[int, ...] = ()
    """Of every second block of each stage, from the second on; none by default."""
    mlp_ratio: float = 3.0
    """Hidden size of the feed-forward networks over features."""
    drop_rate: float = 0.2
    """Stochastic depth of the last block; it rises linearly from 0."""
    layer_scale: float | None = None
    """What the scales of residual branches start at; None for none."""
    patches: bool = False
    """Whether tokens are patches, joined between stages, rather than made by convolutions."""
    classes: int = 1000
    """Size of the output."""
    channels: int = 3
    """Of the image."""

    def __post_init__(self):
        if not self.depths or len(self.num_heads) != len(self.depths) or len(self.dilations) not in (0, len(self.depths)):
            raise ValueError(f"num_heads, dilations: expected a number for each of {len(self.depths)} stages (or no dilations), got {self.num_heads}, {self.dilations}")
        checks.check_dropout_rate(self.drop_rate)

    @classmethod
    def mini(cls, **options) -> "NATConfig":
        """NAT-Mini: 20 million parameters."""
        return cls(64, (2, 4, 8, 16), (3, 4, 6, 5), **options)

    @classmethod
    def tiny(cls, **options) -> "NATConfig":
        """NAT-Tiny: 28 million parameters."""
        return cls(64, (2, 4, 8, 16), (3, 4, 18, 5), **options)

    @classmethod
    def small(cls, **options) -> "NATConfig":
        """NAT-Small: 51 million parameters."""
        return cls(96, (3, 6, 12, 24), (3, 4, 18, 5), **{"mlp_ratio": 2.0, "drop_rate": 0.3, "layer_scale": 1e-5, **options})

    @classmethod
    def base(cls, **options) -> "NATConfig":
        """NAT-Base: 90 million parameters."""
        return cls(128, (4, 8, 16, 32), (3, 4, 18, 5), **{"mlp_ratio": 2.0, "drop_rate": 0.5, "layer_scale": 1e-5, **options})


@dataclasses.dataclass(frozen=True)
class DiNATConfig(NATConfig):
    """The sizes of a DiNAT: those of NAT and a larger one, with dilations for images of 224 by 224 (for 384 by 384: 13, 6, 3, 1)."""

    dilations: tuple[int, ...] = (8, 4, 2, 1)

    @classmethod
    def large(cls, **options) -> "DiNATConfig":
        """DiNAT-Large: 200 million parameters."""
        return cls(192, (6, 12, 24, 48), (3, 4, 18, 5), **{"mlp_ratio": 2.0, "drop_rate": 0.35, "layer_scale": 1e-5, **options})

    @classmethod
    def swin(cls, size: str, **options) -> "DiNATConfig":
        """DiNAT_s 'tiny', 'small', 'base' or 'large': the sizes of a Swin transformer, tokens of 4 by 4 pixels."""
        sizes = {"tiny": (96, (3, 6, 12, 24), (2, 2, 6, 2), 0.2), "small": (96, (3, 6, 12, 24), (2, 2, 18, 2), 0.3), "base": (128, (4, 8, 16, 32), (2, 2, 18, 2), 0.5),
                 "large": (192, (6, 12, 24, 48), (2, 2, 18, 2), 0.35)}
        checks.check_choice("size", size, tuple(sizes))
        features, num_heads, depths, drop_rate = sizes[size]
        return cls(features, num_heads, depths, **{"mlp_ratio": 4.0, "drop_rate": drop_rate, "patches": True, **options})


class ConvTokenizer(nnx.Module):
    """Two convolutions 3 by 3 of stride 2 and a norm: [B, h, w, C] to [B, h / 4, w / 4, D], rounded up."""

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs):
        halve = lambda inputs, outputs: nnx.Conv(inputs, outputs, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), rngs=rngs)
        self.first, self.second, self.norm = halve(channels, features // 2), halve(features // 2, features), make_norm("layer", features, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Images to tokens."""
        return self.norm(self.second(self.first(x)))


class ConvDownsampler(nnx.Module):
    """A convolution 3 by 3 of stride 2 without bias and a norm: [B, h, w, D] to [B, h / 2, w / 2, 2 D], rounded up."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.reduce = nnx.Conv(features, 2 * features, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), use_bias=False, rngs=rngs)
        self.norm = make_norm("layer", 2 * features, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B H W E"]:
        """Fewer, larger tokens."""
        return self.norm(self.reduce(x))


class PatchTokenizer(nnx.Module):
    """Patches of 4 by 4 pixels, projected, and a norm; sides are multiples of 4."""

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs):
        self.project, self.norm = nnx.Conv(channels, features, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs), make_norm("layer", features, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        """Images to tokens."""
        if x.shape[1] % 4 or x.shape[2] % 4:
            raise ValueError(f"x: expected sides that are multiples of 4, got {x.shape[1:3]}")
        return self.norm(self.project(x))


class PatchMerging(nnx.Module):
    """Two by two tokens joined, a norm, and a projection without bias to half; odd sides are filled up with zeros."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norm, self.project = make_norm("layer", 4 * features, rngs=rngs), nnx.Linear(4 * features, 2 * features, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B H W E"]:
        """Fewer, larger tokens."""
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        batch, high, wide, size = x.shape
        x = x.reshape(batch, high // 2, 2, wide // 2, 2, size).transpose(0, 1, 3, 4, 2, 5).reshape(batch, high // 2, wide // 2, 4 * size)
        return self.project(self.norm(x))


class NAT(nnx.Module):
    """The Neighborhood Attention Transformer, dilated or not.

    Args:
      config: its sizes.
      rngs: the generator of initial values.

    >>> config = DiNATConfig(8, (1, 2), (1, 2), window=3, dilations=(2, 1), classes=10)
    >>> model = NAT(config, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 24, 28, 3))).shape
    (2, 10)
    """

    def __init__(self, config: NATConfig, *, rngs: nnx.Rngs):
        self.config = config
        sizes = [config.features * 2**index for index in range(len(config.depths))]
        rates = iter(np.linspace(0, config.drop_rate, sum(config.depths)).tolist())

        def block(stage, index):
            dilation = config.dilations[stage] if config.dilations and index % 2 else 1
            attention = NeighborhoodAttention(sizes[stage], config.num_heads[stage], config.window, dilation=dilation, rngs=rngs)
            return NATBlock(sizes[stage], attention, int(config.mlp_ratio * sizes[stage]), drop_rate=next(rates), layer_scale=config.layer_scale, rngs=rngs)

        self.embed = (PatchTokenizer if config.patches else ConvTokenizer)(config.channels, sizes[0], rngs=rngs)
        self.stages = nnx.List([nnx.List([block(stage, index) for index in range(depth)]) for stage, depth in enumerate(config.depths)])
        self.reduce = nnx.List([(PatchMerging if config.patches else ConvDownsampler)(size, rngs=rngs) for size in sizes[:-1]])
        self.norm, self.head = make_norm("layer", sizes[-1], rngs=rngs), nnx.Linear(sizes[-1], config.classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"], *, dropout_key: Array | None = None) -> Float[Array, "B K"]:
        """Images [B, h, w, C] to logits [B, classes].

        Args:
          x: the images, so large that each stage's grid holds window times dilation.
          dropout_key: for stochastic depth; None for none.
        """
        if x.ndim != 4 or x.shape[-1] != self.config.channels:
            raise ValueError(f"x: expected shape [B, h, w, {self.config.channels}], got {x.shape}")
        count = sum(self.config.depths)
        keys = iter([None] * count if dropout_key is None else jax.random.split(dropout_key, count))
        x = self.embed(x)
        for index, blocks in enumerate(self.stages):
            for layer in blocks:
                x = layer(x, dropout_key=next(keys))
            x = self.reduce[index](x) if index < len(self.reduce) else x
        return self.head(jnp.mean(self.norm(x), axis=(1, 2)))
