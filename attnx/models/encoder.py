"""A transformer encoder around any mechanism."""

from jaxtyping import Array, Float, Int

from attnx.models.transformer import Transformer


class Encoder(Transformer):
    """Tokens to vectors. Constructed like :class:`attnx.models.Transformer`, usually with a mechanism that is not causal.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx import pairs
      >>> from attnx.models import TransformerConfig
      >>> model = Encoder(TransformerConfig(features=32, num_layers=2), pairs(), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), int), positions=jnp.array([0, 1, 2, -1, -1])).shape  # two tokens of padding
      (1, 5, 32)
    """

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"] | None = None,
                 segment_ids: Int[Array, "B T"] | None = None, **inputs) -> Float[Array, "B T D"]:
        """[B, T] -> [B, T, D]; arguments as in :meth:`Transformer.hidden`."""
        return self.hidden(tokens, positions, segment_ids, **inputs)
