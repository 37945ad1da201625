"""Global and local attention of a recurrent decoder: each target state looks at all source states, or at a window whose centre it chooses.

Luong, Pham, Manning: "Effective Approaches to Attention-based Neural Machine Translation" (EMNLP 2015, arXiv 1508.04025). The decoder's current top
state h_t scores the source states h_s, and what it finds is joined to it:

    a_t(s) = softmax_s(score(h_t, h_s)) [times exp(-(s - p_t)^2 / (2 sigma^2))],    c_t = sum_s a_t(s) h_s,    h~_t = tanh(W_c [c_t; h_t])

Local attention sees only |s - round(p_t)| <= D around a centre p_t: the target's own position (local-m), or one that it predicts and whose gradient comes through
the Gaussian, which is therefore not normalised again (local-p). Good where source and target advance together; a step's cost does not depend on the source's length.
With input feeding h~_t is also part of the next step's input, so that the decoder knows what it has read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks
from attnx.core.halves import attend_scores
from attnx.nn.embedding import Embedding
from attnx.nn.lstm import LSTMState, StackedLSTM

KINDS = ("dot", "general", "concat", "location")
MODES = ("global", "local-m", "local-p")


def _wide(*arrays):
    """In at least float32."""
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays)


def luong_scores(query: Float[Array, "... T D"], key: Float[Array, "... S E"], *, kind: str = "dot", kernel: Float[Array, "..."] | None = None,
                 vector: Float[Array, " A"] | None = None) -> Float[Array, "... T S"]:
    """Scores of source states by target states, not scaled.

    ::

        dot        q . k                            D = E
        general    q^T W k                          W [D, E]
        concat     v . tanh([q; k] W)               W [D + E, A],  v [A]
        location   (q W)_s                          W [D, L], the first S <= L columns: the keys' contents do not count

    Args:
      query: [..., T, D], the decoder's current top states.
      key: [..., S, E], the source states.
      kind: "dot", "general", "concat" or "location".
      kernel: W; none for "dot".
      vector: v of "concat".

    Returns:
      [..., T, S] in at least float32.

    Raises:
      ValueError: a parameter that is missing, or of a shape that does not fit.

    Cost: O(T S D); "concat" O(T S A) memory too; "location" O(T L D).

    >>> import jax.numpy as jnp
    >>> q, k = jnp.ones((1, 2, 3)), jnp.ones((1, 5, 3))
    >>> luong_scores(q, k, kind="general", kernel=2 * jnp.eye(3)).tolist()[0][0]
    [6.0, 6.0, 6.0, 6.0, 6.0]
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    query, key = _wide(checks.check_real("query", query), checks.check_real("key", key))
    d, (s, e) = query.shape[-1], key.shape[-2:]
    if kind == "dot":
        if d != e:
            raise ValueError(f"key: expected states of size {d} as in query for kind='dot', got {checks.describe(key)}")
        return jnp.einsum("...td,...sd->...ts", query, key)
    shape = {"general": (d, e), "concat": (d + e, None), "location": (d, None)}[kind]
    if kernel is None or jnp.ndim(kernel) != 2 or kernel.shape[0] != shape[0] or shape[1] not in (None, kernel.shape[1]):
        raise ValueError(f"kernel: expected shape [{shape[0]}, {shape[1] or 'any'}] for kind={kind!r}, got {checks.describe(kernel)}")
    (kernel,) = _wide(kernel)
    if kind == "general":
        return jnp.einsum("...td,de,...se->...ts", query, kernel, key)
    if kind == "location":
        if s > kernel.shape[1]:
            raise ValueError(f"kernel: expected at least {s} columns, one a source position, got {checks.describe(kernel)}")
        return jnp.broadcast_to(query @ kernel[:, :s], (*jnp.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], s))
    if vector is None or jnp.shape(vector) != kernel.shape[1:]:
        raise ValueError(f"vector: expected shape {list(kernel.shape[1:])} as kernel has columns, got {checks.describe(vector)}")
    hidden = jnp.tanh((query @ kernel[:d])[..., :, None, :] + (key @ kernel[d:])[..., None, :, :])
    return hidden @ vector.astype(hidden.dtype)


def luong_global_attention(query: Float[Array, "B T D"], source: Float[Array, "B S E"], *, mask: Bool[Array, "B S"] | None = None,
                           return_weights: bool = False, **score):
    """Attention of target states to all source states: ``c_t = sum_s softmax_s(score(h_t, h_s)) h_s``.

    Args:
      query: [B, T, D], the decoder's current top states.
      source: [B, S, E], keys and values alike.
      mask: booleans [B, S], which source states there are.
      return_weights: also return the weights [B, T, S].
      **score: kind, kernel, vector as in :func:`luong_scores`.

    Returns:
      Contexts [B, T, E] in the query's dtype; zeros where there is no source.

    Cost: O(T S D).

    >>> import jax.numpy as jnp
    >>> luong_global_attention(jnp.zeros((1, 1, 2)), jnp.array([[[1.0, 0.0], [3.0, 0.0]]])).tolist()
    [[[2.0, 0.0]]]
    """
    query, source, mask = _states(query, source, mask)
    out, weights = attend_scores(luong_scores(query, source, **score), source, mask=mask[:, None], return_weights=True)
    out = out.astype(query.dtype)
    return (out, weights) if return_weights else out


def predicted_centre(query: Float[Array, "B T D"], kernel: Float[Array, "D A"], vector: Float[Array, " A"], lengths: Int[Array, " B"]) -> Float[Array, "B T"]:
    """Where in the source each target state looks (local-p): ``p_t = S sigmoid(v . tanh(h_t W))``, a real number in (0, S).

    Args:
      query: [B, T, D], the decoder's current top states.
      kernel: W [D, A].
      vector: v [A].
      lengths: S, the true numbers of source states [B], padding not counted.

    Returns:
      [B, T] in at least float32.

    >>> import jax.numpy as jnp
    >>> predicted_centre(jnp.ones((1, 2, 3)), jnp.zeros((3, 4)), jnp.ones(4), jnp.array([10])).tolist()
    [[5.0, 5.0]]
    """
    query, kernel, vector = _wide(query, kernel, vector)
    return lengths[:, None].astype(query.dtype) * jax.nn.sigmoid(jnp.tanh(query @ kernel) @ vector)


def luong_local_attention(query: Float[Array, "B T D"], source: Float[Array, "B S E"], centre: Float[Array, "*B T"], *, reach: int = 10,
                          sigma: float | None = None, mask: Bool[Array, "B S"] | None = None, implementation: str | None = None,
                          return_weights: bool = False, **score):
    """Attention of target states to the source states near a centre.

    ::

        a_t(s) = softmax over |s - round(p_t)| <= D of score(h_t, h_s),  times exp(-(s - p_t)^2 / (2 sigma^2))

    Args:
      query: [B, T, D], the decoder's current top states.
      source: [B, S, E], keys and values alike.
      centre: p_t, [T] or [B, T]: ``arange(T)`` (local-m), or :func:`predicted_centre` (local-p).
      reach: D.
      sigma: of the Gaussian, D / 2 in the paper's local-p: weights then sum to less than one, and the centre has a gradient. None for no Gaussian (local-m).
      mask: booleans [B, S], which source states there are.
      implementation: "gathered" copies each window, "reference" masks the scores of all pairs; None takes the smaller.
      return_weights: also return the weights [B, T, S].
      **score: kind, kernel, vector as in :func:`luong_scores`; not "location", which has no window.

    Returns:
      Contexts [B, T, E] in the query's dtype; zeros where a window holds no source state.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or kind, named.

    Cost: "gathered" O(T D E), whatever S; "reference" O(T S E).

    >>> import jax.numpy as jnp
    >>> source = jnp.arange(6.0).reshape(1, 6, 1)
    >>> luong_local_attention(jnp.zeros((1, 3, 1)), source, jnp.array([0.0, 3.0, 4.4]), reach=1)[0, :, 0]
    Array([0.5, 3. , 4. ], dtype=float32)
    """
    query, source, mask = _states(query, source, mask)
    reach = checks.check_integer("reach", reach, least=0)
    checks.check_choice("implementation", implementation, ("reference", "gathered"))
    if score.get("kind") == "location":
        raise ValueError("kind: expected 'dot', 'general' or 'concat', got 'location', which is defined for global attention only")
    batch, targets, sources = *query.shape[:2], source.shape[1]
    if jnp.shape(centre) not in ((targets,), (batch, targets)):
        raise ValueError(f"centre: expected shape [{targets}] or [{batch}, {targets}], got {checks.describe(centre)}")
    centre = jnp.broadcast_to(centre, (batch, targets)).astype(jnp.promote_types(jnp.result_type(centre), jnp.float32))
    if implementation is None:
        implementation = "gathered" if 2 * reach + 1 < sources else "reference"
    middle = jnp.round(jax.lax.stop_gradient(centre)).astype(jnp.int32)[..., None]
    if implementation == "reference":
        places, values = jnp.arange(sources), source
        seen = mask[:, None] & (jnp.abs(places - middle) <= reach)
        scores = luong_scores(query, source, **score)
    else:
        places = middle + jnp.arange(-reach, reach + 1)
        row = jnp.arange(batch)[:, None, None]
        slot = jnp.where((places < 0) | (places >= sources), sources, places)  # past the end: read as zero, never written
        seen, values = mask.at[row, slot].get(mode="fill", fill_value=False), source.at[row, slot].get(mode="fill", fill_value=0)
        scores = luong_scores(query[:, :, None], values, **score)[:, :, 0]
    nothing = jnp.zeros((scores.shape[-1], 0), scores.dtype)
    _, weights = attend_scores(scores, nothing, mask=seen, return_weights=True)
    if sigma is not None:
        weights = weights * jnp.exp(-jnp.square(places - centre[..., None]) / (2 * sigma**2)).astype(weights.dtype)
    out = jnp.einsum("btw,bwe->bte" if values.ndim == 3 else "btw,btwe->bte", weights, values.astype(weights.dtype)).astype(query.dtype)
    if not return_weights:
        return out
    if implementation == "gathered":
        weights = jnp.zeros((batch, targets, sources), weights.dtype).at[row, jnp.arange(targets)[:, None], slot].add(weights, mode="drop")
    return out, weights


def _states(query, source, mask):
    """Checked [B, T, D], [B, S, E] and [B, S]."""
    query, source = checks.check_real("query", query, ranks=(3,)), checks.check_real("source", source, ranks=(3,))
    if source.shape[0] != query.shape[0]:
        raise ValueError(f"source: expected batch size {query.shape[0]} as in query, got {checks.describe(source)}")
    if mask is None:
        return query, source, jnp.ones(source.shape[:2], bool)
    mask = checks.as_array("mask", mask, "booleans")
    if mask.dtype != bool or mask.shape != source.shape[:2]:
        raise ValueError(f"mask: expected booleans {list(source.shape[:2])} ([B, S]), got {checks.describe(mask)}")
    return query, source, mask


def attentional_hidden(context: Float[Array, "... E"], query: Float[Array, "... D"], kernel: Float[Array, "E+D F"]) -> Float[Array, "... F"]:
    """What a decoder predicts from: ``tanh([c_t; h_t] W_c)``.

    Args:
      context: [..., E], what attention found.
      query: [..., D], the decoder's current top state.
      kernel: W_c [E + D, F].

    >>> import jax.numpy as jnp
    >>> attentional_hidden(jnp.ones(2), jnp.ones(3), jnp.zeros((5, 4))).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    return jnp.tanh(jnp.concatenate([context, query], axis=-1) @ kernel.astype(query.dtype))


def _uniform(key, shape, dtype=jnp.float32):
    """The paper's initial values."""
    return jax.random.uniform(key, shape, dtype, -0.1, 0.1)


class LuongAttention(nnx.Module):
    """Attention of a decoder's top states with its parameters, from states to :func:`attentional_hidden`.

    Args:
      features: D, size of the decoder's states.
      source_features: E, size of the source states; by default D.
      out_features: F, size of the result; by default D.
      kind: of the scores, see :func:`luong_scores`.
      mode: "global", "local-m" or "local-p".
      reach: D of the local modes; local-p has sigma = reach / 2.
      max_length: the most source states, for kind="location".
      implementation: as in :func:`luong_local_attention`.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> layer = LuongAttention(8, kind="general", mode="local-p", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 3, 8)), jnp.ones((1, 50, 8))).shape
    (1, 3, 8)
    """

    def __init__(self, features: int, *, source_features: int | None = None, out_features: int | None = None, kind: str = "general", mode: str = "global",
                 reach: int = 10, max_length: int | None = None, implementation: str | None = None, rngs: nnx.Rngs):
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if kind == "location" and (mode != "global" or max_length is None):
            raise ValueError(f"kind: expected mode='global' and a max_length with kind='location', got mode={mode!r} and max_length={max_length}")
        source = source_features or features
        param = lambda *shape: nnx.Param(_uniform(rngs.params(), shape))
        shapes = {"dot": (), "general": (features, source), "concat": (features + source, features), "location": (features, max_length)}
        self.kind, self.mode, self.reach, self.implementation = kind, mode, reach, implementation
        self.score_kernel = nnx.data(None) if kind == "dot" else param(*shapes[kind])
        self.score_vector = param(features) if kind == "concat" else nnx.data(None)
        self.centre_kernel, self.centre_vector = (param(features, features), param(features)) if mode == "local-p" else (nnx.data(None), nnx.data(None))
        self.out_kernel = param(source + features, out_features or features)

    def __call__(self, query: Float[Array, "B T D"], source: Float[Array, "B S E"], *, mask: Bool[Array, "B S"] | None = None,
                 positions: Int[Array, "*B T"] | None = None, return_weights: bool = False):
        """[B, T, D] and [B, S, E] to [B, T, F].

        Args:
          query: the decoder's current top states.
          source: the source states.
          mask: booleans [B, S], true for the first S_b of a sentence of that length.
          positions: of the targets, [T] or [B, T], the centres of local-m; None for 0 .. T-1.
          return_weights: also return the weights [B, T, S].
        """
        score = {name: param[...] for name, param in (("kernel", self.score_kernel), ("vector", self.score_vector)) if param is not None}
        options: dict[str, Any] = dict(kind=self.kind, mask=mask, return_weights=True, **score)
        if self.mode == "global":
            context, weights = luong_global_attention(query, source, **options)
        else:
            centre, sigma = jnp.arange(query.shape[1]) if positions is None else positions, None
            if self.mode == "local-p":
                lengths = jnp.full(source.shape[0], source.shape[1]) if mask is None else jnp.sum(mask, axis=1)
                centre, sigma = predicted_centre(query, self.centre_kernel[...], self.centre_vector[...], lengths), self.reach / 2
            context, weights = luong_local_attention(query, source, centre, reach=self.reach, sigma=sigma, implementation=self.implementation, **options)
        out = attentional_hidden(context, query, self.out_kernel[...])
        return (out, weights) if return_weights else out


class LuongState(NamedTuple):
    """What a decoder remembers between steps; constant in shape."""

    position: Int[Array, ""]
    lstm: LSTMState
    fed: Float[Array, "B F"]  # h~ of the step before
    source: Float[Array, "B S E"]
    mask: Bool[Array, "B S"]


class LuongDecoder(nnx.Module):
    """A stacked LSTM over target tokens that attends to source states, and predicts the next token from what it found.

    ::

        x_t = [embedding(y_t); h~_(t-1)]  (input feeding)  or  embedding(y_t),     h_t = LSTM(x_t),     p(y_(t+1)) = softmax(h~_t W_s)

    Args:
      vocab_size: V, number of target tokens.
      features: F, size of embeddings and states (the paper: 1000).
      num_layers: of the LSTM (the paper: 4).
      input_feeding: whether h~ of a step is part of the next one's input. Without it all steps attend at once.
      rngs: the generator of initial values.
      **attention: source_features, kind, mode, reach, max_length, implementation as in :class:`LuongAttention`.

    >>> import jax.numpy as jnp
    >>> decoder = LuongDecoder(20, 8, num_layers=2, mode="local-p", rngs=nnx.Rngs(0))
    >>> source, tokens = jnp.ones((1, 30, 8)), jnp.zeros((1, 4), int)
    >>> state, logits = decoder.step(decoder.init_state(source), tokens)
    >>> logits.shape, bool(jnp.allclose(logits, decoder(tokens, source), atol=1e-6))
    ((1, 4, 20), True)
    """

    def __init__(self, vocab_size: int, features: int, *, num_layers: int = 4, input_feeding: bool = True, rngs: nnx.Rngs, **attention):
        self.features, self.input_feeding = features, input_feeding
        self.embedding = Embedding(vocab_size, features, tied=False, embedding_init=_uniform, rngs=rngs)
        self.lstm = StackedLSTM(features * (1 + input_feeding), features, num_layers, kernel_init=_uniform, rngs=rngs)
        self.attention = LuongAttention(features, rngs=rngs, **attention)

    def __call__(self, tokens: Int[Array, "B T"], source: Float[Array, "B S E"], *, mask: Bool[Array, "B S"] | None = None, lstm: LSTMState | None = None,
                 implementation: str | None = None) -> Float[Array, "B T V"]:
        """Logits of the token after each of ``tokens`` (teacher forcing).

        Args:
          tokens: integers [B, T].
          source, mask, lstm: as in :meth:`init_state`.
          implementation: "parallel" (all steps attend at once) or "recurrent" (token by token); None for the first where it exists.

        Raises:
          NotImplementedError: "parallel" with input feeding, where each step waits for the one before.
        """
        return self.embedding.logits(self.hidden(tokens, source, mask=mask, lstm=lstm, implementation=implementation))

    def hidden(self, tokens: Int[Array, "B T"], source: Float[Array, "B S E"], *, mask=None, lstm=None, implementation: str | None = None):
        """The attentional hidden states [B, T, F] that logits are made of; arguments as in the call."""
        checks.check_choice("implementation", implementation, ("parallel", "recurrent"))
        if implementation == "parallel" and self.input_feeding:
            raise NotImplementedError("implementation='parallel' needs input_feeding=False: a step's input holds what the step before found; use 'recurrent'")
        state = self.init_state(source, mask=mask, lstm=lstm)
        if implementation == "recurrent":
            return self._one_by_one(state, tokens)[1]
        return self.hidden_step(state, tokens)[1]

    def init_state(self, source: Float[Array, "B S E"], *, mask: Bool[Array, "B S"] | None = None, lstm: LSTMState | None = None) -> LuongState:
        """The state of a decoder that has read no target token.

        Args:
          source: [B, S, E], the source states, in the order of target words if attention is local-m.
          mask: booleans [B, S], true for the first S_b of a sentence of that length.
          lstm: where the decoder's LSTM starts, such as the encoder's last state; None for zeros.
        """
        mask = jnp.ones(source.shape[:2], bool) if mask is None else mask
        lstm = self.lstm.init_state(source.shape[0], source.dtype) if lstm is None else lstm
        return LuongState(jnp.zeros((), jnp.int32), lstm, jnp.zeros((source.shape[0], self.features), lstm.hidden.dtype), source, mask)

    def step(self, state: LuongState, tokens: Int[Array, "B t"]) -> tuple[LuongState, Float[Array, "B t V"]]:
        """Reads the next target tokens [B, t]: ``(state, logits [B, t, V])``."""
        state, hidden = self.hidden_step(state, tokens)
        return state, self.embedding.logits(hidden)

    def hidden_step(self, state: LuongState, tokens: Int[Array, "B t"]) -> tuple[LuongState, Float[Array, "B t F"]]:
        """As :meth:`step`, to the attentional hidden states [B, t, F]."""
        if self.input_feeding and tokens.shape[1] != 1:
            return self._one_by_one(state, tokens)
        x = self.embedding(tokens)
        if self.input_feeding:
            x = jnp.concatenate([x, state.fed[:, None].astype(x.dtype)], axis=-1)
        lstm, query = self.lstm(x, state.lstm)
        positions = state.position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        hidden = self.attention(query, state.source.astype(query.dtype), mask=state.mask, positions=positions)
        fed = hidden[:, -1].astype(state.fed.dtype) if tokens.shape[1] else state.fed
        return state._replace(position=state.position + tokens.shape[1], lstm=lstm, fed=fed), hidden

    def _one_by_one(self, state, tokens):
        state, hidden = jax.lax.scan(lambda state, token: self.hidden_step(state, token[:, None]), state, tokens.T)
        return state, jnp.swapaxes(hidden[:, :, 0], 0, 1)
