"""Tokens to vectors and back."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float, Int

from attnx.nn.common import constrain, logical_axes
from attnx.positions import learned, sinusoidal

_unit_vectors = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)  # on average; as in nnx.Embed


class Embedding(nnx.Module):
    """A table of token vectors, optionally with vectors of positions and token types added, and its use as an output projection.

        e_t = [sqrt(D)] table[token_t] + position vector of p_t + vector of type_t,        logits(x) = x table^T  (tied)  or  x W_out

    Args:
      vocab_size: V, number of tokens.
      features: D, size of a vector.
      tied: whether logits come from the table itself; otherwise from a projection of its own.
      scaled: whether token vectors are multiplied by sqrt(D).
      position: 'sinusoidal', 'learned', or None for no position vectors.
      max_length: number of positions that 'learned' tells apart.
      token_types: number of token types (segments, as of a question and its answer) with a vector each; None for no types. Source: Jacob Devlin et
        al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018, arXiv:1810.04805.
      dtype, param_dtype: as in ``nnx.Embed``.
      embedding_init: initialiser of the tables and of the output projection.
      rngs: the generator of initial values.

    Raises:
      ValueError: for an unknown position, or 'learned' without ``max_length``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> embedding = Embedding(256, 8, rngs=nnx.Rngs(0))
      >>> x = embedding(jnp.zeros((1, 3), int))
      >>> x.shape, embedding.logits(x).shape
      ((1, 3, 8), (1, 3, 256))
    """

    def __init__(self, vocab_size: int, features: int, *, tied: bool = True, scaled: bool = False, position: str | None = None,
                 max_length: int | None = None, token_types: int | None = None, dtype=None, param_dtype=jnp.float32, embedding_init=_unit_vectors, rngs: nnx.Rngs):
        if position not in (None, "sinusoidal", "learned"):
            raise ValueError(f"position: expected 'sinusoidal', 'learned' or None, got {position!r}")
        if position == "learned" and max_length is None:
            raise ValueError("max_length: expected the number of learned positions, got None")

        def table(rows, axis):
            return nnx.Param(embedding_init(rngs.params(), (rows, features), param_dtype), **logical_axes(axis, "embed"))

        self.features, self.scaled, self.position, self.dtype = features, scaled, position, dtype
        self.table = table(vocab_size, "vocab")
        self.output = nnx.data(None) if tied else table(vocab_size, "vocab")
        self.positions = table(max_length, None) if position == "learned" else nnx.data(None)
        self.types = nnx.data(None) if token_types is None else table(token_types, None)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"] | None = None,
                 token_types: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """tokens [B, T] -> [B, T, D]; ``positions`` [T] or [B, T], by default 0 .. T-1; ``token_types`` [B, T], by default all 0."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens: expected integers of shape [B, T], got {tokens.dtype} {tokens.shape}")
        table, = promote_dtype((self.table[...],), dtype=self.dtype)
        x = table[tokens]
        if self.scaled:
            x = x * math.sqrt(self.features)
        if self.types is not None:
            x = x + self.types[...].astype(x.dtype)[jnp.zeros_like(tokens) if token_types is None else token_types]
        elif token_types is not None:
            raise ValueError("token_types: expected None, the embedding has no token types")
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        if self.position == "learned":
            x = x + learned(positions, self.positions[...]).astype(x.dtype)
        elif self.position == "sinusoidal":
            x = x + sinusoidal(positions, self.features, dtype=x.dtype)
        return constrain(x, "batch", "sequence", None)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """x [B, T, D] -> [B, T, V], accumulated and returned in at least float32."""
        table = self.table if self.output is None else self.output
        x, table = promote_dtype((x, table[...]), dtype=self.dtype)
        logits = jax.lax.dot_general(x, table, (((2,), (1,)), ((), ())),
                                     preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        return constrain(logits, "batch", "sequence", "vocab")
