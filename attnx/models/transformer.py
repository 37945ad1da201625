"""The trunk that encoders and decoders share: tokens to vectors, at once or step by step."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.mechanism import Mechanism
from attnx.models.config import TransformerConfig
from attnx.nn import Embedding, Stack, make_norm
from attnx.nn.common import dropout
from attnx.nn.hooks import Hooks


class TransformerState(NamedTuple):
    """What a model remembers between steps; constant in shape."""

    position: jax.Array  # int32 [], how many tokens it has seen
    layers: Any


class Transformer(nnx.Module):
    """Embedding (normalised where the config says so), blocks, and a last norm (after pre-norm blocks).

    Args:
      config: its sizes and choices.
      mechanism: the mechanism of every layer (see :class:`attnx.nn.Attention`), or a sequence of mechanisms that alternate; None where
        ``config.attention`` makes the layers. What a token may see is the mechanism's to say.
      cross_mechanism: the mechanism by which every layer also reads a context; None for layers that read none.
      embedding: an :class:`attnx.nn.Embedding` to share; by default one of its own.
      rngs: the generator of initial values.
    """

    def __init__(self, config: TransformerConfig, mechanism: Mechanism | Sequence[Mechanism] | None, *, cross_mechanism: Mechanism | None = None,
                 embedding: Embedding | None = None, rngs: nnx.Rngs):
        mechanisms = mechanism if isinstance(mechanism, (tuple, list)) else (mechanism,)
        dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        self.config = config
        self.embedding = embedding or Embedding(
            config.vocab_size, config.features, tied=config.tie_embedding, scaled=config.scale_embedding,
            position=config.position_embedding, max_length=config.max_length, token_types=config.token_types, **dtypes)
        self.layers = Stack([functools.partial(config.block, m, cross_mechanism) for m in mechanisms], config.num_layers,
                            unroll=config.unroll, remat=config.remat, rngs=rngs)

        def norm(wanted):
            return make_norm(config.norm, config.features, epsilon=config.norm_epsilon, **dtypes) if wanted else nnx.data(None)

        self.embedding_norm, self.norm = norm(config.embedding_norm), norm(config.norm_position == "pre")

    @property
    def reach(self) -> int | None:
        """The most tokens it can read; None for any number. Learned positions end, and so do layers with weights for each position, which have a ``reach`` too."""
        ends = [getattr(block.attention, "reach", None) for block in self.layers.blocks]
        ends.append(None if self.embedding.positions is None else self.config.max_length)
        return min((end for end in ends if end is not None), default=None)

    def hidden(self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, *,
               token_types: Int[Array, "B T"] | None = None, context: Float[Array, "B S D"] | None = None, context_positions: Int[Array, "*B S"] | None = None,
               dropout_key: Array | None = None, hooks: Hooks | None = None) -> Float[Array, "B T D"]:
        """The vectors of the last layer.

        Args:
          tokens: integers [B, T].
          positions: int32 [T] or [B, T], logical positions (-1 marks padding); None for 0 .. T-1.
          segment_ids: int32 [B, T], documents that do not see each other.
          token_types: integers [B, T], for an embedding that has types; by default all 0.
          context: [B, S, D], what cross-attention reads.
          context_positions: int32 [S] or [B, S], logical positions of the context.
          dropout_key: the key of all dropout; None for none.
          hooks: ``{stage: hook}``, see :mod:`attnx.nn.hooks`.

        Returns:
          [B, T, D].
        """
        x = self._embed(tokens, positions, token_types)
        if dropout_key is not None:
            dropout_key, first = jax.random.split(dropout_key)
            x = dropout(x, self.config.dropout_rate, first)
        x = self.layers(x, positions=positions, segment_ids=segment_ids, context=context, context_positions=context_positions,
                        dropout_key=dropout_key, hooks=hooks)
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the vocabulary from the vectors of the last layer: [B, T, D] -> [B, T, V], at least float32."""
        return self.embedding.logits(hidden)

    def init_state(self, batch: int, max_length: int, *, context: Float[Array, "B S D"] | None = None,
                   context_positions: Int[Array, "*B S"] | None = None, dtype=None) -> TransformerState:
        """The state of a model that has seen nothing.

        Args:
          batch: B.
          max_length: the most tokens that will be seen.
          context, context_positions: what cross-attention reads, projected here, once.
          dtype: of the cached keys and values; by default that of the computation.

        Returns:
          A :class:`TransformerState`, of constant shape.
        """
        return TransformerState(jnp.zeros((), jnp.int32), self.layers.init_state(
            batch, max_length, context=context, context_positions=context_positions, dtype=dtype))

    def hidden_step(self, state: TransformerState, tokens: Int[Array, "B t"], *,
                    hooks: Hooks | None = None) -> tuple[TransformerState, Float[Array, "B t D"]]:
        """The vectors of the last layer for the next tokens [B, t]: ``(state, [B, t, D])``."""
        positions = state.position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        layers, x = self.layers.step(state.layers, self._embed(tokens, positions), hooks=hooks)
        return TransformerState(state.position + tokens.shape[1], layers), x if self.norm is None else self.norm(x)

    def _embed(self, tokens, positions, token_types=None):
        x = self.embedding(tokens, positions, token_types)
        return x if self.embedding_norm is None else self.embedding_norm(x)
