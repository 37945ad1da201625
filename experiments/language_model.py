"""A byte-level decoder around a mechanism: its sizes, its loss, its evaluation and its use as a generator."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnx.mechanism import Mechanism
from attnx.models import Decoder, TransformerConfig, generate
from attnx.training import Spans
from experiments.mechanisms import Layer

_POLICIES = {"none": None, "dots": "dots_saveable", "all": "nothing_saveable"}
_EVALUATED = 8192  # tokens in a batch of the evaluation


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Sizes of the decoder."""

    features: int = 128
    """Size of the residual stream."""
    layers: int = 2
    """Number of blocks."""
    heads: int = 4
    """Number of heads; divides the features."""
    kv_heads: int | None = None
    """Key and value heads, a divisor of the heads; as many by default."""
    hidden: int | None = None
    """Hidden size of the (gated) MLPs; 8/3 of the features by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32."""
    remat: Literal["none", "dots", "all"] = "dots"
    """What the backward pass recomputes: nothing, all but matrix products (less memory and traffic: the fastest on CPUs), or whole blocks."""


class LanguageModel:
    """A :class:`attnx.models.Decoder` of bytes as functions of its parameters.

    Args:
      options: its sizes.
      mechanism: of every layer; or what makes the attention of a block, see :class:`attnx.models.TransformerConfig`.
      seed: of the initial parameters.

    Attributes:
      init: a function that makes the initial parameters.
      abstract: their shapes.
    """

    def __init__(self, options: ModelOptions, mechanism: Mechanism | Layer, seed: int = 0):
        layer, mechanism = (None, mechanism) if hasattr(mechanism, "step") else (mechanism, None)
        config = TransformerConfig(vocab_size=256, features=options.features, num_layers=options.layers, num_heads=options.heads,
                                   num_kv_heads=options.kv_heads, hidden_features=options.hidden, qk_norm="rms", attention=layer,
                                   remat=_POLICIES[options.remat], dtype=jnp.dtype(options.dtype))

        def make():
            return nnx.split(Decoder(config, mechanism, rngs=nnx.Rngs(seed)), nnx.Param, ...)

        self.init = lambda: make()[1]
        self._graph, self.abstract, _ = jax.eval_shape(make)
        self._rest = jax.jit(lambda: make()[2])()

    def decoder(self, params) -> Decoder:
        """The module with these parameters."""
        return nnx.merge(self._graph, params, self._rest)

    def nats(self, params, tokens, segment_ids=None):
        """The cost of each token but the first, given those before it: [B, T + 1] -> float32 [B, T]."""
        segments = None if segment_ids is None else segment_ids[:, :-1]
        logits = self.decoder(params)(tokens[:, :-1], segment_ids=segments)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def loss(self, params, batch, key):
        """Total cost and number of predictions, for :func:`attnx.training.make_train_step`."""
        del key
        nats = self.nats(params, batch["tokens"], batch.get("segment_ids"))
        return nats.sum(), nats.size

    def evaluate(self, params, spans: Spans) -> np.ndarray:
        """Bits of each predicted token of the windows: [n, T]."""
        count, length = spans.valid.shape
        size = min(count, max(1, _EVALUATED // length))
        rows = np.pad(spans.tokens, ((0, -count % size), (0, 0)))
        bits = [self._nats(params, batch) for batch in np.split(rows, len(rows) // size)]
        return np.concatenate([np.asarray(x) for x in bits])[:count] / math.log(2)

    def reads(self, length: int) -> bool:
        """Whether it can read that many tokens; not where it has weights for each position of fewer."""
        reach = self.decoder(self.abstract).reach
        return reach is None or length <= reach

    def state_bytes(self, length: int) -> int:
        """Bytes of the state from which the model goes on after up to ``length`` tokens."""
        state = jax.eval_shape(lambda params: self.decoder(params).init_state(1, length), self.abstract)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    def stream(self, params, prompt: bytes, length: int, *, temperature: float = 1.0, top_k: int | None = None,
               seed: int = 0) -> Iterator[int]:
        """Continues a prompt, byte by byte.

        Args:
          params: the parameters.
          prompt: what comes before; possibly nothing.
          length: how many bytes to yield.
          temperature: divides the logits; 0 always takes the likeliest byte.
          top_k: among how many of the likeliest bytes to choose; all by default.
          seed: of the choices.

        Yields:
          The bytes.
        """
        tokens = np.frombuffer(b"\0" + prompt, np.uint8).astype(np.int32)[None]
        for token in generate(self.decoder(params), tokens, length, temperature=temperature, top_k=top_k, key=jax.random.key(seed)):
            yield int(token[0])

    @functools.cached_property
    def _nats(self):
        return jax.jit(self.nats)
