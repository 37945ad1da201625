"""A pretrained model: text in, text or vectors out."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.models import Decoder, Encoder, TransformerConfig, generate
from attnx.nn.hooks import Hooks


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with its tokenizer, as :func:`attnx.pretrained.load` reads it."""

    model: Decoder | Encoder
    """Tokens to logits, or to vectors; an ``nnx.Module`` like any other."""
    tokenizer: Any
    """A ``tokenizers.Tokenizer``."""
    config: TransformerConfig
    """Of the model."""
    max_length: int
    """The most tokens that the model was trained to read."""
    stop: frozenset[int] = frozenset()
    """Tokens by which the model says that it is done."""

    def encode(self, texts: str | Sequence[str]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Texts as what the model is called with, shorter ones padded.

        Args:
          texts: a text, or B of them.

        Returns:
          ``(tokens [B, T], positions [B, T])``, int32; the positions of padding are -1.

        Raises:
          ValueError: for no text, or one of more tokens than ``max_length``.
        """
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch([texts] if isinstance(texts, str) else list(texts))]
        longest = max(map(len, rows), default=0)
        if not 0 < longest <= self.max_length:
            raise ValueError(f"texts: expected 1 to {self.max_length} tokens, got {longest}")
        tokens, positions = np.zeros((len(rows), longest), np.int32), np.full((len(rows), longest), -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, :len(row)], positions[i, :len(row)] = row, range(len(row))
        return jnp.asarray(tokens), jnp.asarray(positions)

    def generate(self, prompt: str, max_tokens: int, *, temperature: float = 0.0, top_k: int | None = None, key: Array | None = None,
                 hooks: Hooks | None = None) -> Iterator[str]:
        """Continues a prompt until the model says that it is done.

        Args:
          prompt: what comes before. Control tokens are recognised by their names, as ``<|im_start|>user`` in a chat.
          max_tokens: the most tokens to write.
          temperature, top_k, key, hooks: as in :func:`attnx.models.generate`; by default always the likeliest token.

        Yields:
          Pieces of text, as soon as their characters are complete.

        Raises:
          TypeError: for a model that is no decoder.
          ValueError: for a prompt without tokens, or more tokens in all than ``max_length``.
        """
        if not isinstance(self.model, Decoder):
            raise TypeError(f"generate: expected a decoder, the model is an {type(self.model).__name__}")
        tokens, _ = self.encode(prompt)
        if tokens.shape[1] + max_tokens > self.max_length:
            raise ValueError(f"max_tokens: expected at most {self.max_length - tokens.shape[1]} after {tokens.shape[1]} of the prompt, got {max_tokens}")
        return self._pieces(generate(self.model, tokens, max_tokens, temperature=temperature, top_k=top_k, key=key, hooks=hooks))

    def embed(self, texts: str | Sequence[str]) -> Float[Array, "B D"]:
        """One unit vector for each text: the mean of its tokens' vectors, normalised. Their products are cosines.

        Source: Nils Reimers, Iryna Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", 2019, arXiv:1908.10084.

        Args:
          texts: a text, or B of them.

        Returns:
          [B, D].

        Raises:
          TypeError: for a model that is no encoder.
          ValueError: as :meth:`encode`.
        """
        if not isinstance(self.model, Encoder):
            raise TypeError(f"embed: expected an encoder, the model is a {type(self.model).__name__}")
        graph, params = nnx.split(self.model)
        return _embed(graph, params, *self.encode(texts))

    def _pieces(self, tokens: Iterator) -> Iterator[str]:
        pending: list[int] = []
        for token in (int(row[0]) for row in tokens):
            if token in self.stop:
                break
            pending.append(token)
            text = self.tokenizer.decode(pending, skip_special_tokens=False)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # as the first bytes of a character do
                pending = []
                yield text
        if pending:
            yield self.tokenizer.decode(pending, skip_special_tokens=False)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph, params, tokens, positions):
    vectors = nnx.merge(graph, params)(tokens, positions)
    total = jnp.where(positions[..., None] >= 0, vectors, 0).sum(1, dtype=jnp.float32)
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)
