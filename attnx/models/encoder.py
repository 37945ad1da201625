"""A transformer encoder around any mechanism."""

from attnx.models.transformer import Transformer


class Encoder(Transformer):
    """Tokens to vectors. Constructed like :class:`attnx.models.Transformer`, usually with a mechanism that is not causal.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx import masks, pairs
      >>> model = Encoder(TransformerConfig(features=32, num_layers=2), pairs(), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), int), positions=jnp.array([0, 1, 2, -1, -1])).shape  # two tokens of padding
      (1, 5, 32)
    """

    def __call__(self, tokens, positions=None, segment_ids=None, **inputs):
        """[B, T] -> [B, T, D]; arguments as in :meth:`Transformer.hidden`."""
        return self.hidden(tokens, positions, segment_ids, **inputs)
