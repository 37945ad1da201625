"""Finding likely sequences with any model that predicts the next token: greedily, or with a beam.

A model is a function ``step(state, tokens [R]) -> (state, logits [R, V])`` over rows that do not depend on each other; every array of its state has
the rows as its first axis. :func:`rows_of` makes that of a model with a batched ``init_state`` and ``step``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnx.core import checks


class Hypotheses(NamedTuple):
    """Sequences that were found, the best first."""

    tokens: Int[Array, "B W L"]  # without the start, with the end if it was reached; then padding
    lengths: Int[Array, "B W"]  # how many of the tokens count
    scores: Float[Array, "B W"]  # log probability over length penalty; -inf where fewer were found


def length_penalty(length: Int[Array, "*any"], alpha: float) -> Float[Array, "*any"]:
    """By what log probabilities are divided so that long sequences can compete: ``((5 + length) / 6)^alpha``.

    Source: Yonghui Wu et al., "Google's Neural Machine Translation System: Bridging the Gap between Human and Machine Translation", 2016, arXiv:1609.08144.

    Example:
      >>> length_penalty(jnp.array([1, 7]), 0.5).tolist()
      [1.0, 1.4142135381698608]
    """
    return ((5.0 + length) / 6.0) ** alpha


def rows_of(init_state: Callable, step: Callable, *inputs: Array) -> tuple[Callable, Any]:
    """A model for the searches: ``(step, state)`` over rows.

    Args:
      init_state: ``init_state(*inputs)`` of a batch of one.
      step: ``step(state, tokens [1, 1]) -> (state, logits [1, 1, V])`` of that state.
      *inputs: [R, ...] each, such as source sentences.

    Example:
      >>> step, state = rows_of(lambda x: x, lambda state, token: (state + token, jnp.eye(3)[state + token]), jnp.zeros((4, 1), int))
      >>> step(state, jnp.array([0, 1, 2, 0]))[1].argmax(-1)
      Array([0, 1, 2, 0], dtype=int32)
    """
    def row(state, token):
        state, logits = step(state, token[None, None])
        return state, logits[0, 0]

    return jax.vmap(row), jax.vmap(lambda *row: init_state(*(x[None] for x in row)))(*inputs)


def greedy_search(step: Callable, state: Any, start: Int[Array, " B"], *, end: int, max_length: int, limits: Int[Array, " B"] | None = None,
                  padding: int = 0) -> Hypotheses:
    """Takes the likeliest token each time, until all sequences have ended: :func:`beam_search` of width 1.

    Args and result: as there, with scores that are log probabilities.

    Example:
      >>> chain = jnp.log(jnp.array([[0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]))
      >>> greedy_search(lambda state, token: (state, chain[token]), jnp.zeros((1, 0)), jnp.array([0]), end=2, max_length=5).tokens.tolist()
      [[[1, 2, 0, 0, 0]]]
    """
    batch = start.shape[0]
    limits = _limits(limits, batch, max_length)

    def body(carry):
        t, state, last, tokens, lengths, score = carry
        state, logits = step(state, last)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), best[:, None], axis=-1)[:, 0]
        open = _open(last, lengths, t, limits, end)
        tokens = tokens.at[:, t].set(jnp.where(open, best, padding))
        return t + 1, state, jnp.where(open, best, end), tokens, lengths + open, score + jnp.where(open, logp, 0)

    def going(carry):
        t, _, last, _, lengths, _ = carry
        return (t < max_length) & jnp.any(_open(last, lengths, t, limits, end))

    dtype = jax.eval_shape(step, state, start)[1].dtype
    first = (jnp.int32(0), state, start.astype(jnp.int32), jnp.full((batch, max_length), padding, jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, dtype))
    *_, tokens, lengths, score = jax.lax.while_loop(going, body, first)
    return Hypotheses(tokens[:, None], lengths[:, None], score[:, None])


def _open(last, lengths, t, limits, end):
    """Which rows go on: those that have not ended (a start token may be the end token's id) nor reached their limit."""
    return ((t == 0) | (last != end)) & (lengths == t) & (t < limits)


def _limits(limits, batch, max_length):
    """Per row, the most tokens."""
    if limits is None:
        return jnp.full(batch, max_length, jnp.int32)
    return jnp.minimum(checks.check_integers("limits", limits, ranks=(1,)), max_length)


def beam_search(step: Callable, state: Any, start: Int[Array, " B"], *, end: int, max_length: int, width: int = 4, alpha: float = 0.6,
                limits: Int[Array, " B"] | None = None, padding: int = 0) -> Hypotheses:
    """Keeps the ``width`` likeliest beginnings at each step, and of the sequences that have ended those of the highest

        score(y) = log P(y) / ((5 + |y|) / 6)^alpha

    until no beginning can still become better than them. A sequence that reaches its limit counts as it stands.

    Args:
      step: ``step(state, tokens [R]) -> (state, logits [R, V])``, rows independent of each other, V at least 2.
      state: of B rows.
      start: the first token that each row reads, integers [B].
      end: the token that ends a sequence.
      max_length: L, the most tokens of a sequence, its end included.
      width: W, of the beam (the paper: 4).
      alpha: of the length penalty (the paper: 0.6); 0 for none, negative for one on length.
      limits: integers [B], a smaller L for each row.
      padding: the token that fills what follows the end.

    Returns:
      :class:`Hypotheses`.

    Cost: at most L steps of B W rows, and copies of their states.

    Example:
      >>> chain = jnp.log(jnp.array([[0.1, 0.5, 0.4], [0.4, 0.3, 0.3], [1.0, 0.0, 0.0]]))
      >>> found = beam_search(lambda state, token: (state, chain[token]), jnp.zeros((1, 0)), jnp.array([0]), end=2, max_length=5, alpha=0.0)
      >>> found.tokens[0, 0].tolist(), round(float(jnp.exp(found.scores[0, 0])), 3)  # greedily it would go by 1, for 0.15
      ([2, 0, 0, 0, 0], 0.4)
    """
    width, batch = checks.check_integer("width", width, least=1), start.shape[0]
    limits = _limits(limits, batch, max_length)
    wide = lambda rows: rows.reshape(batch, width, *rows.shape[1:])
    flat = lambda beams: beams.reshape(batch * width, *beams.shape[2:])
    pick = lambda beams, index: jnp.take_along_axis(beams, index.reshape(*index.shape, *[1] * (beams.ndim - 2)), axis=1)

    def body(carry):
        t, state, last, live, logp, done = carry
        state, logits = step(state, flat(last))
        total = logp[..., None] + wide(jax.nn.log_softmax(logits))
        vocabulary = total.shape[-1]
        # Each beginning can end in one way, so among twice as many there are enough that go on.
        total, index = jax.lax.top_k(total.reshape(batch, -1), min(2 * width, width * vocabulary))
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        tokens = pick(live, parent).at[:, :, t].set(token)
        over = (token == end) | (t + 1 >= limits)[:, None]

        scores = jnp.where(over, total / length_penalty(t + 1, alpha), -jnp.inf)
        joined = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), done, Hypotheses(tokens, jnp.full(token.shape, t + 1), scores))
        best = jax.lax.top_k(joined.scores, width)[1]
        done = jax.tree.map(lambda x: pick(x, best), joined)

        logp, going = jax.lax.top_k(jnp.where(over, -jnp.inf, total), width)
        parent = pick(parent, going)
        state = jax.tree.map(lambda x: flat(pick(wide(x), parent)), state)
        return t + 1, state, pick(token, going), pick(tokens, going), logp, done

    def open(carry):
        t, _, _, _, logp, done = carry
        attainable = logp[:, 0] / jnp.maximum(length_penalty(t + 1, alpha), length_penalty(limits, alpha))
        return (t < max_length) & jnp.any(attainable > done.scores[:, -1])

    dtype = jax.eval_shape(step, state, start)[1].dtype
    nothing = jnp.full((batch, width, max_length), padding, jnp.int32)
    logp = jnp.full((batch, width), -jnp.inf, dtype).at[:, 0].set(0)
    done = Hypotheses(nothing, jnp.zeros((batch, width), jnp.int32), jnp.full((batch, width), -jnp.inf, dtype))
    state = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), state)
    last = jnp.broadcast_to(start[:, None], (batch, width)).astype(jnp.int32)
    return jax.lax.while_loop(open, body, (jnp.int32(0), state, last, nothing, logp, done))[-1]
