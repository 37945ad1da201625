"""A small transformer around any attention layers, for experiments."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.nn import MLP, Embedding, TransformerBlock, make_norm


class Tiny(nnx.Module):
    """Tokens or vectors in, numbers for each token or for all out.

    Args:
      features: D.
      attention: for each block a constructor ``(rngs) -> module`` of its attention, called like :class:`attnx.nn.Attention`.
      inputs: number of tokens, or None for inputs that are vectors of ``input_size``.
      outputs: size of the output; by default logits of the tokens, by the embedding's table.
      input_size: size of input vectors.
      hidden: hidden size of the MLPs, gated by default; 8/3 D, rounded up to 16.
      position: 'learned' or 'sinusoidal' vectors added to the inputs, or None.
      max_length: of learned positions.
      pooled: whether outputs are of the mean over tokens rather than of each.
      norm, norm_position: of the residual stream, see :class:`attnx.nn.TransformerBlock`.

    >>> import attnx
    >>> model = Tiny(16, [lambda rngs: attnx.nn.Attention(16, 2, mechanism=attnx.pairs(), rngs=rngs)] * 2, inputs=10, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 5), int)).shape
    (1, 5, 10)
    """

    def __init__(self, features: int, attention: Sequence[Callable], *, inputs: int | None = None, outputs: int | None = None, input_size: int | None = None,
                 hidden: int | None = None, position: str | None = None, max_length: int | None = None, pooled: bool = False, norm: str = "rms",
                 norm_position: str = "pre", rngs: nnx.Rngs):
        hidden = hidden or -(-features * 8 // 48) * 16
        scaled = nnx.initializers.variance_scaling(1 / (2 * max(len(attention), 1)), "fan_in", "truncated_normal")
        if inputs is None:
            self.linear, self.embedding = nnx.Linear(input_size, features, rngs=rngs), nnx.data(None)
            self.places = nnx.data(None) if position is None else Embedding(1, features, position=position, max_length=max_length, rngs=rngs)
        else:
            self.embedding = Embedding(inputs, features, position=position, max_length=max_length, rngs=rngs)
        self.blocks = nnx.List([TransformerBlock(features, attention=make(rngs), mlp=MLP(features, hidden, out_kernel_init=scaled, rngs=rngs), norm=norm,
                                                 norm_position=norm_position, rngs=rngs) for make in attention])
        self.norm = make_norm(norm, features, rngs=rngs)
        self.head = nnx.data(None) if outputs is None else nnx.Linear(features, outputs, rngs=rngs)
        self.pooled = pooled

    def states(self, x, **options) -> list[jax.Array]:
        """[B, T, D] after each block; options as of :class:`attnx.nn.TransformerBlock` (positions, segment_ids, hooks, ...)."""
        if self.embedding is not None:
            x = self.embedding(x, options.get("positions"))
        else:
            x = self.linear(x)
            if self.places is not None:
                x = x + self.places(jnp.zeros(x.shape[:2], jnp.int32)) - self.places.table[...][0]
        states = []
        for index, block in enumerate(self.blocks):
            x = block(x, layer=index, **options)
            states.append(x)
        return states

    def hidden(self, x, **options):
        """[B, T, D], normalised; options as of :meth:`states`."""
        return self.norm(self.states(x, **options)[-1])

    def __call__(self, x, **options) -> jax.Array:
        """[B, T, outputs], or [B, outputs] if pooled."""
        x = self.hidden(x, **options)
        x = x.mean(axis=1) if self.pooled else x
        return self.embedding.logits(x) if self.head is None else self.head(x)
