"""Perceiver."""

import functools

import jax.numpy as jnp
from flax import nnx

from attnx import fusion
from attnx.catalogue.entry import SEEN, Entry, Example, Input
from attnx.catalogue.modules import parameters, rebuild


@functools.cache
def maker(implementation=None):
    """Of small ones, whose latents are large enough for finite differences."""
    return lambda rngs: fusion.Perceiver(3, 5, axes=2, num_bands=2, max_frequency=4.0, num_latents=3, features=8, num_blocks=3, num_layers=1, num_heads=2,
                                         latent_init=nnx.initializers.normal(1.0), implementation=implementation, rngs=rngs)


def classify(case, params, x, positions, seen):
    """Inputs at positions to logits."""
    return rebuild(maker(case.implementation), params)(x, positions=positions, mask=seen)


entry = Entry(
    id="perceiver",
    objects=(fusion.Perceiver, fusion.PerceiverBlock, fusion.LatentCrossAttention, fusion.fourier_features, fusion.grid_positions),
    equation="""z <- z + CrossAttention(LN(z), LN([x; Fourier features of positions])),   z <- z + MLP(LN(z)),   then S self-attention layers within z
logits = Linear(LN(mean over latents)),    all blocks after the first share their weights""",
    claim="Reading raw pixels with position features, it classifies as well in a fixed random order of the pixels, where a convolutional network fails, and its "
          "cost is linear in the number of pixels.",
    examples=(Example(classify, {"params": parameters(maker()), "x": "bsc", "positions": Input("sp", jnp.tanh), "seen": SEEN}, "bo",
                      executions=("reference", "blockwise"), mask="seen", empty="finite", linear="s", sizes={"c": 3, "p": 2, "o": 5}),),
    notes="Keys and values of the inputs are projected once for all blocks that share weights. The first block shares nothing, as in the paper.",
)
