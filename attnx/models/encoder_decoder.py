"""A sequence-to-sequence transformer around any mechanisms."""

import dataclasses
from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.mechanism import Mechanism
from attnx.models.config import TransformerConfig
from attnx.models.decoder import Decoder
from attnx.models.encoder import Encoder
from attnx.models.transformer import TransformerState
from attnx.nn.hooks import Hooks


class EncoderDecoder(nnx.Module):
    """An encoder of source tokens and a decoder of target tokens that reads the encoder's vectors.

    Source: Ashish Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.

    Args:
      config: sizes and choices of both halves.
      mechanism: of the decoder's self-attention, causal; or a sequence that alternates.
      encoder_mechanism: of the encoder's self-attention; or a sequence that alternates.
      cross_mechanism: of the decoder's attention to the encoder's vectors.
      num_encoder_layers: by default ``config.num_layers``.
      share_embedding: whether both halves use one embedding table.
      rngs: the generator of initial values.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx import masks, pairs
      >>> from attnx.models import TransformerConfig
      >>> everything = pairs()
      >>> model = EncoderDecoder(TransformerConfig(features=32, num_layers=2), pairs(mask=masks.causal()), encoder_mechanism=everything,
      ...                        cross_mechanism=everything, rngs=nnx.Rngs(0))
      >>> source, target = jnp.zeros((1, 7), int), jnp.zeros((1, 5), int)
      >>> model(source, target).shape
      (1, 5, 256)
      >>> state = model.init_state(source, max_length=5)
      >>> state, logits = model.step(state, target[:, :1])
    """

    def __init__(self, config: TransformerConfig, mechanism: Mechanism | Sequence[Mechanism], *, encoder_mechanism: Mechanism | Sequence[Mechanism],
                 cross_mechanism: Mechanism, num_encoder_layers: int | None = None, share_embedding: bool = True, rngs: nnx.Rngs):
        encoder_config = dataclasses.replace(config, num_layers=num_encoder_layers or config.num_layers)
        self.encoder = Encoder(encoder_config, encoder_mechanism, rngs=rngs)
        self.decoder = Decoder(config, mechanism, cross_mechanism=cross_mechanism,
                               embedding=self.encoder.embedding if share_embedding else None, rngs=rngs)

    def __call__(self, source: Int[Array, "B S"], target: Int[Array, "B T"], *, source_positions: Int[Array, "*B S"] | None = None,
                 target_positions: Int[Array, "*B T"] | None = None, dropout_key: Array | None = None,
                 hooks: Hooks | None = None) -> Float[Array, "B T V"]:
        """Logits of the token after each target token, given all before it and the source.

        Args:
          source: integers [B, S].
          target: integers [B, T].
          source_positions, target_positions: int32 [S] or [B, S], [T] or [B, T], logical positions (-1 marks padding); None for 0, 1, ...
          dropout_key: the key of all dropout; None for none.
          hooks: of the decoder, see :mod:`attnx.nn.hooks` and :class:`attnx.nn.TransformerBlock`.

        Returns:
          [B, T, V], at least float32.
        """
        first, second = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        context = self.encoder(source, source_positions, dropout_key=first)
        return self.decoder(target, target_positions, context=context, context_positions=source_positions, dropout_key=second,
                            hooks=hooks)

    def init_state(self, source: Int[Array, "B S"], max_length: int, *, source_positions: Int[Array, "*B S"] | None = None,
                   dtype=None) -> TransformerState:
        """Encodes the source and returns the state of a decoder that has seen no target token.

        Args:
          source: integers [B, S].
          max_length: the most target tokens that will be seen.
          source_positions: int32 [S] or [B, S].
          dtype: of the cached keys and values.
        """
        return self.decoder.init_state(source.shape[0], max_length, context=self.encoder(source, source_positions),
                                       context_positions=source_positions, dtype=dtype)

    def step(self, state: TransformerState, target: Int[Array, "B t"], *,
             hooks: Hooks | None = None) -> tuple[TransformerState, Float[Array, "B t V"]]:
        """Reads the next target tokens [B, t]: ``(state, logits [B, t, V])``."""
        return self.decoder.step(state, target, hooks=hooks)
