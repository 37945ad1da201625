"""Generation: a decoder's own continuation of tokens, one by one, with a cache."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from attnx.models.decoder import Decoder
from attnx.nn.hooks import Hooks

# Few sizes, so that few programs are compiled for prompts and continuations of all lengths:
_READ_AT_ONCE = 128, 16, 1  # tokens of a prompt
_ROOM = 256  # of whose multiples is the cache's length


def generate(model: Decoder, tokens: Int[Array, "B t"], length: int, *, temperature: float = 1.0, top_k: int | None = None, key: Array | None = None,
             hooks: Hooks | None = None) -> Iterator[Int[Array, " B"]]:
    """Continues tokens, one by one.

    ::

        token ~ softmax(logits / temperature) over the top_k likeliest

    Args:
      model: a decoder.
      tokens: integers [B, t], what comes before, at least one.
      length: how many tokens to yield.
      temperature: below 1 likely tokens become likelier; 0 always takes the likeliest.
      top_k: among how many of the likeliest tokens to choose; all by default.
      key: of the choices; by default ``jax.random.key(0)``.
      hooks: ``{stage: hook}``, see :mod:`attnx.nn.hooks`. A function that is handed over again is not compiled again.

    Yields:
      Integers [B], the next token of each row.

    Raises:
      ValueError: for no tokens, a length that is negative or more than the model can read, a negative temperature, or a ``top_k`` that is no number of tokens.

    Cost: the tokens before are read at once, up to 128 at a time; then each costs a step over the model's state.

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.models import TransformerConfig
      >>> model = Decoder(TransformerConfig(features=32, num_layers=2), attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0))
      >>> [token.shape for token in generate(model, jnp.zeros((2, 3), int), length=2)]
      [(2,), (2,)]
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: expected integers of shape [B, t], t at least 1, got {tokens.dtype} {tokens.shape}")
    if length < 0:
        raise ValueError(f"length: expected 0 or more, got {length}")
    if model.reach is not None and tokens.shape[1] + length > model.reach + 1:
        raise ValueError(f"length: expected at most {model.reach + 1 - tokens.shape[1]} after {tokens.shape[1]} tokens, for the model reads {model.reach}, got {length}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(f"top_k: expected 1 to {model.config.vocab_size}, got {top_k}")
    return _generate(model, tokens.astype(jnp.int32), length, temperature, top_k, jax.random.key(0) if key is None else key, tuple((hooks or {}).items()))


def _generate(model, tokens, length, temperature, top_k, key, hooks):
    graph, params = nnx.split(model)
    read = functools.partial(_step, graph, hooks, top_k)
    start, end = 0, tokens.shape[1]
    room = -(-(end + length) // _ROOM) * _ROOM
    state = model.init_state(tokens.shape[0], room if model.reach is None else min(room, model.reach))
    while start < end and length:
        size = next(size for size in _READ_AT_ONCE if size <= end - start)
        state, chosen = read(params, state, tokens[:, start:start + size], temperature, key)
        start += size
    for remaining in reversed(range(length)):
        yield chosen
        if remaining:
            state, chosen = read(params, state, chosen[:, None], temperature, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _step(graph, hooks, top_k, params, state, tokens, temperature, key):
    state, logits = nnx.merge(graph, params).step(state, tokens, hooks=dict(hooks) or None)
    logits = logits[:, -1]
    if top_k is not None:
        logits = jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][:, -1:], logits, -jnp.inf)
    drawn = jax.random.categorical(jax.random.fold_in(key, state.position), logits / jnp.maximum(temperature, 1e-6))
    return state, jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)
