"""Blocks one after another that may differ, and a scanned stack made into them."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from attnx.nn.stack import Stack


class Layers(nnx.Module):
    """Blocks in sequence, each with parameters and a structure of its own; used like :class:`attnx.nn.Stack`, which compiles faster where all are equal.

    Args:
      blocks: modules called like :class:`attnx.nn.TransformerBlock`.
      round_length: how many blocks share a key of dropout, told apart by their place in the round.

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from attnx.nn import Attention, TransformerBlock
      >>> block = lambda heads, rngs: TransformerBlock(8, attention=Attention(8, heads, mechanism=attnx.pairs(), rngs=rngs), rngs=rngs)
      >>> Layers([block(2, nnx.Rngs(0)), block(4, nnx.Rngs(1))])(jnp.ones((1, 3, 8))).shape
      (1, 3, 8)
    """

    def __init__(self, blocks: Sequence[nnx.Module], round_length: int = 1):
        self.blocks, self.round_length = nnx.List(blocks), round_length

    def __call__(self, x: Float[Array, "B T D"], *, dropout_key: Array | None = None, **inputs) -> Float[Array, "B T D"]:
        """As :meth:`Stack.__call__`."""
        keys = None if dropout_key is None else jax.random.split(dropout_key, -(-len(self.blocks) // self.round_length))
        for index, block in enumerate(self.blocks):
            key = None if keys is None else jax.random.fold_in(keys[index // self.round_length], index % self.round_length)
            x = block(x, dropout_key=key, layer=index, **inputs)
        return x

    def init_state(self, batch: int, max_length: int, **inputs) -> tuple[Any, ...]:
        """The states of all blocks; ``inputs`` as for a block's ``init_state``."""
        return tuple(block.init_state(batch, max_length, **inputs) for block in self.blocks)

    def step(self, state, x: Float[Array, "B t D"], **inputs) -> tuple[tuple[Any, ...], Float[Array, "B t D"]]:
        """Runs the next tokens x [B, t, D] through all blocks: ``(state, [B, t, D])``."""
        after = []
        for index, (block, own) in enumerate(zip(self.blocks, state, strict=True)):
            own, x = block.step(own, x, layer=index, **inputs)
            after.append(own)
        return tuple(after), x


def unstack(module: nnx.Module) -> nnx.Module:
    """A model whose blocks can be changed one by one: every :class:`attnx.nn.Stack` becomes :class:`Layers` with the same parameters and outputs.

    Args:
      module: a stack, or any module that holds some as attributes, changed in place.

    Returns:
      The module, or what takes the place of a stack.

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from attnx.models import Decoder, TransformerConfig
      >>> model = Decoder(TransformerConfig(features=32, num_layers=2), attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0))
      >>> before = model(jnp.zeros((1, 5), int))
      >>> bool(jnp.allclose(unstack(model)(jnp.zeros((1, 5), int)), before, atol=1e-5)), len(model.layers.blocks)
      (True, 2)
    """
    if isinstance(module, Stack):
        return _layers(module)
    for _, parent in list(nnx.iter_modules(module)):
        for name, child in list(vars(parent).items()):
            if isinstance(child, Stack):
                setattr(parent, name, _layers(child))
    return module


def _layers(stack):
    graphdef, params = nnx.split(stack.blocks)
    groups = [nnx.merge(graphdef, jax.tree.map(lambda x: x[index], params)) for index in range(stack.num_groups)]
    for group in groups:
        for _, variable in nnx.iter_graph(group):
            if isinstance(variable, nnx.Variable) and variable.get_metadata().get("out_sharding"):
                variable.set_metadata("out_sharding", variable.get_metadata()["out_sharding"][1:])  # the axis of layers is gone
    return Layers([block for group in groups for block in group], len(groups[0]))
