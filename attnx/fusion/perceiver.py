"""Perceiver: a few learned latents read a very long input by cross-attention, again and again, and think about it in between.

Jaegle, Gimeno, Brock, Zisserman, Vinyals, Carreira: "Perceiver: General Perception with Iterative Attention" (ICML 2021, arXiv 2103.03206). Each block is

    z <- z + CrossAttention(LN(z), LN(x)),    z <- z + MLP(LN(z)),    then S layers of self-attention and MLP within z

for inputs x: raw channels, with Fourier features of their positions concatenated. N latents read M inputs in O(N M), so depth does not pay for M. All
blocks after the first share their weights, as an unrolled recurrent network. It knows nothing of grids beyond the features: pixels, sound, point
clouds and mixtures of them are all bytes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnx.core import checks
from attnx.mechanism import pairs
from attnx.nn import MLP, Attention, CrossState, Stack, TransformerBlock, make_norm
from attnx.nn.common import check_sequence

_gelu = partial(jax.nn.gelu, approximate=False)


def grid_positions(shape: Sequence[int]) -> Float[Array, "M d"]:
    """The positions of a grid's cells, from -1 to 1 along each axis, in raster order.

    Args:
      shape: lengths of the d axes.

    Returns:
      [prod(shape), d].

    >>> grid_positions((2, 3)).tolist()
    [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    axes = jnp.meshgrid(*(jnp.linspace(-1.0, 1.0, n) for n in shape), indexing="ij")
    return jnp.stack(axes, axis=-1).reshape(math.prod(shape), len(shape))


def fourier_features(positions: Float[Array, "*any d"], num_bands: int, max_frequency: float | Sequence[float], *,
                     concat_positions: bool = True) -> Float[Array, "*any F"]:
    """Sines and cosines of positions at evenly spaced frequencies, and the positions themselves.

    ::

        [sin(pi f_1 p), .., sin(pi f_K p), cos(pi f_1 p), .., cos(pi f_K p), p]  for each axis,      f_k evenly from 1 to mu / 2

    Args:
      positions: [..., d], from -1 to 1.
      num_bands: K.
      max_frequency: mu, twice the highest frequency, such as the number of cells along the axis (its Nyquist frequency is half that); or one an axis.
      concat_positions: whether the positions are part of it.

    Returns:
      [..., d (2K + 1)], axis after axis, in at least float32.

    >>> fourier_features(grid_positions((224, 224)), 64, 224).shape
    (50176, 258)
    """
    positions = checks.check_real("positions", positions)
    num_bands = checks.check_integer("num_bands", num_bands, least=0)
    positions = positions.astype(jnp.promote_types(positions.dtype, jnp.float32))
    axes = positions.shape[-1]
    highest = [max_frequency] * axes if isinstance(max_frequency, (int, float)) else list(max_frequency)
    if len(highest) != axes:
        raise ValueError(f"max_frequency: expected a number or {axes} of them, one an axis of positions, got {max_frequency}")
    frequencies = jnp.stack([jnp.linspace(1.0, mu / 2, num_bands, dtype=positions.dtype) for mu in highest])
    angles = jnp.pi * positions[..., None] * frequencies
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles), *([positions[..., None]] if concat_positions else [])], axis=-1)
    return features.reshape(*positions.shape[:-1], -1)


class LatentCrossAttention(nnx.Module):
    """Latents read inputs: ``z <- z + Attention(LN(z), LN(x))``, then ``z <- z + MLP(LN(z))``.

    Args:
      features: size of a latent.
      in_features: size of an input.
      num_heads, head_size, implementation: of the attention.
      mlp_ratio, gated: hidden size of the MLP over features, and whether it is gated (GEGLU) or plain (GELU).
      norm: see :func:`attnx.nn.make_norm`.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> read = LatentCrossAttention(16, 5, rngs=nnx.Rngs(0))
    >>> read(jnp.ones((1, 4, 16)), read.project(jnp.ones((1, 1000, 5)))).shape
    (1, 4, 16)
    """

    def __init__(self, features: int, in_features: int, *, num_heads: int = 1, head_size: int | None = None, mlp_ratio: float = 1.0, gated: bool = False,
                 norm: str | Callable[..., nnx.Module] = "layer", implementation: str | None = None, rngs: nnx.Rngs):
        self.attention = Attention(features, num_heads, mechanism=pairs(implementation=implementation), head_size=head_size,
                                   context_features=in_features, use_bias=True, rngs=rngs)
        self.mlp = MLP(features, int(mlp_ratio * features), activation=_gelu, gated=gated, use_bias=True, rngs=rngs)
        self.norm, self.mlp_norm = make_norm(norm, features, rngs=rngs), make_norm(norm, features, rngs=rngs)
        self.input_norm = make_norm(norm, in_features, rngs=rngs)

    def project(self, inputs: Float[Array, "B M C"], mask: Bool[Array, "B M"] | None = None) -> CrossState:
        """Keys and values of the inputs, once for all times that these weights read them; ``mask`` [B, M] says which there are."""
        positions = None if mask is None else jnp.where(mask, jnp.arange(inputs.shape[1], dtype=jnp.int32), -1)
        return self.attention.init_state(inputs.shape[0], 0, context=self.input_norm(inputs), context_positions=positions)

    def __call__(self, latents: Float[Array, "B N D"], inputs: CrossState) -> Float[Array, "B N D"]:
        """[B, N, features] and what :meth:`project` made of the inputs to [B, N, features]; costs O(N M)."""
        latents = latents + self.attention.step(inputs, self.norm(latents))[1]
        return latents + self.mlp(self.mlp_norm(latents))


class PerceiverBlock(nnx.Module):
    """A :class:`LatentCrossAttention` and a tower of pre-norm self-attention layers within the latents.

    Args:
      features, in_features, mlp_ratio, gated, norm, implementation: as there.
      num_layers: S, of the tower.
      cross_heads, cross_head_size: of the cross-attention.
      num_heads, head_size: of the tower.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> block = PerceiverBlock(16, 5, num_layers=2, num_heads=4, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 4, 16)), block.project(jnp.ones((1, 1000, 5)))).shape
    (1, 4, 16)
    """

    def __init__(self, features: int, in_features: int, *, num_layers: int = 6, cross_heads: int = 1, num_heads: int = 8, cross_head_size: int | None = None,
                 head_size: int | None = None, mlp_ratio: float = 1.0, gated: bool = False, norm: str | Callable[..., nnx.Module] = "layer",
                 implementation: str | None = None, rngs: nnx.Rngs):
        def layer(*, rngs):
            attention = Attention(features, num_heads, mechanism=pairs(implementation=implementation), head_size=head_size, use_bias=True, rngs=rngs)
            mlp = MLP(features, int(mlp_ratio * features), activation=_gelu, gated=gated, use_bias=True, rngs=rngs)
            return TransformerBlock(features, attention=attention, mlp=mlp, norm=norm, rngs=rngs)

        self.cross = LatentCrossAttention(features, in_features, num_heads=cross_heads, head_size=cross_head_size, mlp_ratio=mlp_ratio, gated=gated,
                                          norm=norm, implementation=implementation, rngs=rngs)
        self.tower = Stack(layer, num_layers, rngs=rngs)

    def project(self, inputs: Float[Array, "B M C"], mask: Bool[Array, "B M"] | None = None) -> CrossState:
        """See :meth:`LatentCrossAttention.project`."""
        return self.cross.project(inputs, mask)

    def __call__(self, latents: Float[Array, "B N D"], inputs: CrossState) -> Float[Array, "B N D"]:
        """[B, N, features] and projected inputs to [B, N, features]; costs O(N M + S N^2)."""
        return self.tower(self.cross(latents, inputs))


class Perceiver(nnx.Module):
    """A classifier of anything that is channels at positions.

    Args:
      channels: size of an input without its position.
      num_classes: size of the output.
      axes: d, of positions.
      num_bands, max_frequency: K and mu of :func:`fourier_features` (the paper on ImageNet: 64 and 224); no bands leave the positions alone.
      num_latents: N.
      features: D, size of a latent.
      num_blocks: how often the inputs are read.
      num_layers: S, self-attention layers in each block.
      share_weights: whether all blocks but the first are one.
      latent_init: initialiser of the latents, in the paper normal of standard deviation 0.02, cut at two of them.
      cross_heads, num_heads, cross_head_size, head_size, mlp_ratio, gated, norm, implementation: as in :class:`PerceiverBlock`. The paper's MLP is plain with a
        hidden layer of D; a widespread port has a gated one of 4 D.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> model = Perceiver(3, 10, axes=2, num_bands=4, max_frequency=32, num_latents=8, features=16, num_heads=4, num_layers=1, num_blocks=3, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((1, 32, 32, 3))).shape
    (1, 10)
    """

    def __init__(self, channels: int, num_classes: int, *, axes: int = 2, num_bands: int = 64, max_frequency: float | Sequence[float] = 224.0,
                 num_latents: int = 512, features: int = 1024, num_blocks: int = 8, num_layers: int = 6, share_weights: bool = True,
                 latent_init=nnx.initializers.truncated_normal(0.02), cross_heads: int = 1, num_heads: int = 8, cross_head_size: int | None = None,
                 head_size: int | None = None, mlp_ratio: float = 1.0, gated: bool = False, norm: str | Callable[..., nnx.Module] = "layer",
                 implementation: str | None = None, rngs: nnx.Rngs):
        num_blocks = checks.check_integer("num_blocks", num_blocks, least=1)
        self.channels, self.axes, self.num_bands = channels, axes, num_bands
        self.max_frequency = max_frequency if isinstance(max_frequency, (int, float)) else tuple(max_frequency)
        self.in_features, self.features = channels + axes * (2 * num_bands + 1), features
        block = partial(PerceiverBlock, features, self.in_features, num_layers=num_layers, cross_heads=cross_heads, num_heads=num_heads,
                        cross_head_size=cross_head_size, head_size=head_size, mlp_ratio=mlp_ratio, gated=gated, norm=norm,
                        implementation=implementation, rngs=rngs)
        self.latents = nnx.Param(latent_init(rngs.params(), (num_latents, features)))
        self.blocks = nnx.List([block() for _ in range(min(num_blocks, 2) if share_weights else num_blocks)])
        self.repeats = num_blocks - 1 if share_weights and num_blocks > 1 else 1
        self.norm = make_norm(norm, features, rngs=rngs)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def hidden(self, x: Float[Array, "..."], *, positions: Float[Array, "*B M d"] | None = None, mask: Bool[Array, "B M"] | None = None) -> Float[Array, "B N D"]:
        """The latents after all blocks; arguments as in the call."""
        inputs = self._inputs(x, positions)
        if mask is not None and (jnp.result_type(mask) != jnp.bool_ or jnp.shape(mask) != inputs.shape[:2]):
            raise ValueError(f"mask: expected booleans {list(inputs.shape[:2])} ([B, M]), got {checks.describe(mask)}")
        latents = jnp.broadcast_to(self.latents[...].astype(x.dtype), (x.shape[0], *self.latents.shape))
        first, *others = self.blocks
        latents = first(latents, first.project(inputs, mask))
        for block in others:
            projected = block.project(inputs, mask)
            if self.repeats == 1:
                latents = block(latents, projected)
            else:
                latents, _ = jax.lax.scan(lambda z, _, block=block, projected=projected: (block(z, projected), None), latents, None, length=self.repeats)
        return latents

    def __call__(self, x: Float[Array, "..."], *, positions: Float[Array, "*B M d"] | None = None, mask: Bool[Array, "B M"] | None = None) -> Float[Array, "B L"]:
        """Logits of the classes, from the mean of the latents.

        Args:
          x: [B, M, channels] with ``positions``; or a grid [B, ..., channels] of ``axes`` axes.
          positions: [M, d] or [B, M, d], from -1 to 1.
          mask: booleans [B, M], which inputs there are; where there are none the latents find nothing, and the output is what they are.

        Returns:
          [B, num_classes].
        """
        return self.head(self.norm(jnp.mean(self.hidden(x, positions=positions, mask=mask), axis=1)))

    def _inputs(self, x, positions):
        """Channels and features of positions, [B, M, in_features]."""
        if positions is None:
            if x.ndim != self.axes + 2 or x.shape[-1] != self.channels:
                raise ValueError(f"x: expected a batch of grids of {self.axes} axes with {self.channels} channels, or positions, got {checks.describe(x)}")
            positions = grid_positions(x.shape[1:-1])
            x = x.reshape(x.shape[0], -1, self.channels)
        check_sequence("x", x, self.channels)
        if jnp.shape(positions) not in ((x.shape[1], self.axes), (*x.shape[:2], self.axes)):
            raise ValueError(f"positions: expected shape {[x.shape[1], self.axes]} or {[*x.shape[:2], self.axes]}, got {checks.describe(positions)}")
        features = fourier_features(positions, self.num_bands, self.max_frequency).astype(x.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(features, (*x.shape[:2], features.shape[-1]))], axis=-1)
