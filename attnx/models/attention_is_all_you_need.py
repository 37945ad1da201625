"""The original transformer: the exact model of the paper as a configuration, with its schedule, its loss and its decoding.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin: "Attention Is All You Need" (NeurIPS 2017, arXiv 1706.03762):

    x <- LayerNorm(x + dropout(f(x)))        f: attention of 8 heads, softmax(q k^T / sqrt(d)) v; attention to the encoder; max(0, x W_1 + b_1) W_2 + b_2

Embeddings of source, target and output are one table, multiplied by sqrt(features) where tokens come in; sines and cosines of the position, interleaved, are
added. The norm follows each residual sum, so there is none at the end. Recurrence is gone: all positions are read at once, and decoding keeps keys and values.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks
from attnx.masks.causal import causal
from attnx.mechanism import pairs
from attnx.models.config import TransformerConfig
from attnx.models.encoder_decoder import EncoderDecoder
from attnx.models.search import Hypotheses, beam_search, greedy_search, rows_of

_SIZES = {"base": dict(features=512, hidden_features=2048, num_heads=8, dropout_rate=0.1),
          "big": dict(features=1024, hidden_features=4096, num_heads=16, dropout_rate=0.3)}


def original_config(size: Literal["base", "big"] = "base", **changes) -> TransformerConfig:
    """The paper's choices as a :class:`TransformerConfig`.

    Args:
      size: "base" (512 features, 8 heads, dropout 0.1) or "big" (1024, 16, 0.3); both have 6 layers.
      **changes: fields of the configuration that differ, such as vocab_size; ``norm_position="pre"`` for the variant that trains without warm-up.

    Example:
      >>> config = original_config(vocab_size=37000)
      >>> config.features, config.norm_position, config.scale_embedding
      (512, 'post', True)
    """
    if size not in _SIZES:
        raise ValueError(f"size: expected 'base' or 'big', got {size!r}")
    paper: dict[str, Any] = dict(num_layers=6, mlp="relu", norm="layer", norm_position="post", position=None, position_embedding="sinusoidal", tie_embedding=True,
                 scale_embedding=True, use_bias=True)
    return TransformerConfig(**paper | _SIZES[size] | changes)


class OriginalTransformer(EncoderDecoder):
    """The paper's encoder and decoder.

    Args:
      size, **changes: as in :func:`original_config`.
      num_encoder_layers: by default as many as decoder layers.
      attention_dropout_rate: of the attention weights; the paper has none, its released code as much as elsewhere.
      share_embedding: whether source and target have one table.
      implementation: of all attention, see :func:`attnx.attention`.
      rngs: the generator of initial values.

    Example:
      >>> model = OriginalTransformer(vocab_size=20, features=32, num_layers=2, rngs=nnx.Rngs(0))
      >>> source, target = jnp.zeros((1, 7), int), jnp.zeros((1, 5), int)
      >>> model(source, target).shape
      (1, 5, 20)
      >>> model.translate(source, start=1, end=2, max_length=6).tokens.shape
      (1, 4, 6)
    """

    def __init__(self, size: Literal["base", "big"] = "base", *, num_encoder_layers: int | None = None, attention_dropout_rate: float = 0.0,
                 share_embedding: bool = True, implementation: str | None = None, rngs: nnx.Rngs, **changes):
        options: dict[str, Any] = dict(dropout_rate=attention_dropout_rate, implementation=implementation)
        everything = pairs(**options)
        super().__init__(original_config(size, **changes), pairs(mask=causal(), **options), encoder_mechanism=everything, cross_mechanism=everything,
                         num_encoder_layers=num_encoder_layers, share_embedding=share_embedding, rngs=rngs)

    def translate(self, source: Int[Array, "B S"], *, start: int, end: int, source_positions: Int[Array, "*B S"] | None = None,
                  max_length: int | None = None, extra: int = 50, width: int = 4, alpha: float = 0.6, padding: int = 0) -> Hypotheses:
        """Decodes sentences with a beam.

        Args:
          source: integers [B, S].
          start, end: tokens that begin (never written) and end a target.
          source_positions: int32 [S] or [B, S], -1 for padding.
          max_length: the most tokens of a target; by default S + extra.
          extra: how many more tokens a target may have than its source (padding not counted).
          width, alpha, padding: as in :func:`beam_search`; width 1 is greedy.

        Returns:
          :class:`Hypotheses` of ``width`` sequences for each sentence.
        """
        batch, length = source.shape
        max_length = length + extra if max_length is None else max_length
        positions = jnp.arange(length, dtype=jnp.int32) if source_positions is None else checks.check_positions("source_positions", source_positions, batch, length)
        positions = jnp.broadcast_to(positions, source.shape)
        step, state = rows_of(lambda source, positions: self.init_state(source, max_length, source_positions=positions), self.step, source, positions)
        options: dict[str, Any] = dict(end=end, max_length=max_length, limits=jnp.sum(positions >= 0, axis=1) + extra, padding=padding)
        first = jnp.full(batch, start, jnp.int32)
        return greedy_search(step, state, first, **options) if width == 1 else beam_search(step, state, first, width=width, alpha=alpha, **options)


def noam_schedule(features: int, *, warmup: int = 4000, scale: float = 1.0) -> optax.Schedule:
    """The paper's learning rate: ``scale features^-1/2 min(step^-1/2, step warmup^-3/2)``, highest at ``step = warmup``.

    It goes with ``optax.adam(schedule, b1=0.9, b2=0.98, eps=1e-9)``.

    Args:
      features: size of the residual stream.
      warmup: steps until the peak ``scale (features warmup)^-1/2``.
      scale: a factor.

    Returns:
      A function of the step, counted from 1; at 0 the rate is 0.

    Example:
      >>> float(noam_schedule(16, warmup=4)(4))
      0.125
    """
    warmup = checks.check_integer("warmup", warmup, least=1)

    def schedule(step):
        step = jnp.asarray(step, float)
        return scale * features**-0.5 * jnp.minimum(jnp.maximum(step, 1) ** -0.5, step * warmup**-1.5)

    return schedule


def label_smoothed_cross_entropy(logits: Float[Array, "*any V"], labels: Int[Array, "*any"], *, smoothing: float = 0.1,
                                 mask: Bool[Array, "*any"] | None = None) -> Float[Array, ""]:
    """Mean cross-entropy to labels of which a share is spread evenly over the vocabulary.

    ::

        -sum_v q_v log p_v,        q = (1 - smoothing) onehot(label) + smoothing / V

    Its least value is the entropy of q, not 0. Source: Christian Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, arXiv:1512.00567.

    Args:
      logits: [..., V].
      labels: integers [...].
      smoothing: the share, in [0, 1).
      mask: booleans [...], which labels count; the mean over none is 0.

    Returns:
      A number in at least float32.

    Example:
      >>> round(float(label_smoothed_cross_entropy(jnp.zeros((3, 8)), jnp.array([0, 1, 2]))), 4)  # log 8
      2.0794
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a share in [0, 1), got {smoothing}")
    logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    label = jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing) * label - smoothing * jnp.mean(logp, axis=-1)
    if mask is None:
        return jnp.mean(loss)
    return jnp.sum(jnp.where(mask, loss, 0)) / jnp.maximum(jnp.sum(mask), 1)
