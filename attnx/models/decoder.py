"""A decoder language model around any mechanism."""

from jaxtyping import Array, Float, Int

from attnx.models.transformer import Transformer, TransformerState
from attnx.nn.hooks import Hooks


class Decoder(Transformer):
    """Tokens to logits of the next token. Constructed like :class:`attnx.models.Transformer`, with a causal mechanism.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx import masks, pairs
      >>> from attnx.models import TransformerConfig
      >>> model = Decoder(TransformerConfig(features=32, num_layers=2), pairs(mask=masks.causal()), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), int)).shape
      (1, 5, 256)
      >>> state = model.init_state(batch=1, max_length=5)
      >>> state, logits = model.step(state, jnp.zeros((1, 3), int))  # prefill
      >>> state, logits = model.step(state, jnp.zeros((1, 1), int))  # decode
      >>> logits.shape, int(state.position)
      ((1, 1, 256), 4)
    """

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"] | None = None,
                 segment_ids: Int[Array, "B T"] | None = None, **inputs) -> Float[Array, "B T V"]:
        """[B, T] -> logits [B, T, V], at least float32; arguments as in :meth:`Transformer.hidden`."""
        return self.logits(self.hidden(tokens, positions, segment_ids, **inputs))

    def step(self, state: TransformerState, tokens: Int[Array, "B t"], *,
             hooks: Hooks | None = None) -> tuple[TransformerState, Float[Array, "B t V"]]:
        """Reads the next tokens.

        Args:
          state: from :meth:`init_state` or the step before.
          tokens: integers [B, t]: one to decode, several to prefill.
          hooks: ``{stage: hook}``, see :mod:`attnx.nn.hooks`.

        Returns:
          ``(state, logits [B, t, V])``.
        """
        state, hidden = self.hidden_step(state, tokens, hooks=hooks)
        return state, self.logits(hidden)
