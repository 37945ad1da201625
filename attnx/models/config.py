"""The sizes and choices that the transformer models share."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.nn import MLP, Attention, TransformerBlock
from attnx.positions import Rotary

_ACTIVATIONS: dict[str, tuple[Callable, bool]] = {
    "swiglu": (jax.nn.silu, True), "geglu": (jax.nn.gelu, True), "gelu": (jax.nn.gelu, False),
    "exact_gelu": (partial(jax.nn.gelu, approximate=False), False), "relu": (jax.nn.relu, False)}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything about a transformer but its mechanisms. A subclass that overrides :meth:`block` builds other layers.

    Example:
      >>> TransformerConfig(features=128, num_heads=8, num_kv_heads=2).hidden
      352
    """

    vocab_size: int = 256
    """Number of tokens; 256 for bytes."""
    features: int = 256
    """Size of the residual stream."""
    num_layers: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; by default as many as query heads."""
    head_size: int | None = None
    """Size of a head; by default features / num_heads."""
    hidden_features: int | None = None
    """Hidden size of the MLPs; by default 8/3 (gated) or 4 (plain) times features, rounded up to a multiple of 32."""
    mlp: Literal["swiglu", "geglu", "gelu", "exact_gelu", "relu"] = "swiglu"
    """Activation of the MLPs; the first two are gated, 'gelu' is the usual approximation by tanh."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation of the residual stream."""
    norm_epsilon: float = 1e-6
    """Added to the variance in the norms of the residual stream."""
    norm_position: Literal["pre", "post"] = "pre"
    """Whether the input of a sub-layer is normalised, or the sum after it."""
    position: Rotary | None = Rotary()
    """How positions enter queries and keys of self-attention; None leaves them to the mechanism."""
    position_embedding: Literal["sinusoidal", "learned"] | None = None
    """Position vectors added to the token vectors."""
    max_length: int | None = None
    """Number of learned position vectors."""
    token_types: int | None = None
    """Number of token types with a vector each, added to the token vectors."""
    embedding_norm: bool = False
    """Whether the embedding is normalised."""
    qk_norm: Literal["rms", "layer"] | None = None
    """Normalisation of each head's queries and keys."""
    output_gate: Literal["head", "channel"] | None = None
    """Sigmoid gates on what the heads found."""
    attention: Callable[..., nnx.Module] | None = None
    """The sub-layer of self-attention, ``(features, num_heads, *, rngs) -> module`` called like :class:`attnx.nn.Attention`; None for that around the mechanism."""
    use_bias: bool = False
    """Whether projections have biases."""
    tie_embedding: bool = True
    """Whether the embedding table is also the output projection."""
    scale_embedding: bool = False
    """Whether token vectors are multiplied by sqrt(features)."""
    dropout_rate: float = 0.0
    """Dropout of the embedding and of what each sub-layer adds."""
    unroll: int | bool = 1
    """Layers written out in each iteration of the compiled scan: 1 compiles fastest, True (all) trains fastest."""
    remat: str | None = None
    """What the backward pass recomputes: a name of jax.checkpoint_policies, or None for nothing."""
    dtype: Any = None
    """Of the computation; by default that of the parameters. Logits are at least float32."""
    param_dtype: Any = jnp.float32
    """Of the parameters."""

    @property
    def hidden(self) -> int:
        """The hidden size of the MLPs."""
        gated = _ACTIVATIONS[self.mlp][1]
        return self.hidden_features or -(-self.features * (8 if gated else 12) // 96) * 32

    def block(self, mechanism, cross_mechanism=None, *, rngs: nnx.Rngs) -> nnx.Module:
        """One :class:`attnx.nn.TransformerBlock` of these sizes around a mechanism, and one for its context if it reads one.

        Raises:
          TypeError: without a mechanism, where ``attention`` does not bring its own, or with both.
        """
        if (mechanism is None) == (self.attention is None):
            raise TypeError(f"mechanism: expected {'None beside' if self.attention else 'one, or'} a config with attention, got {mechanism!r}")
        # Each sub-layer adds to the residual stream; scaled so, the stream's variance does not grow with depth at the start.
        additions = (2 if cross_mechanism is None else 3) * self.num_layers
        common = dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs,
                      out_kernel_init=nnx.initializers.variance_scaling(1 / additions, "fan_in", "truncated_normal"))

        def attention(mechanism, position):
            return Attention(self.features, self.num_heads, mechanism=mechanism, head_size=self.head_size,
                             num_kv_heads=self.num_kv_heads, position=position, qk_norm=self.qk_norm,
                             output_gate=self.output_gate, **common)

        activation, gated = _ACTIVATIONS[self.mlp]
        own = attention(mechanism, self.position) if self.attention is None else self.attention(self.features, self.num_heads, rngs=rngs)
        return TransformerBlock(
            self.features, attention=own,
            cross_attention=None if cross_mechanism is None else attention(cross_mechanism, None),
            mlp=MLP(self.features, self.hidden, activation=activation, gated=gated, **common),
            norm=self.norm, norm_epsilon=self.norm_epsilon, norm_position=self.norm_position, dropout_rate=self.dropout_rate,
            dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs)
