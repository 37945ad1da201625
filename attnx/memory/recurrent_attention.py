"""Recurrent attention networks: attention within windows of a long text, one vector carrying what was read from window to window.

Li, Li, Luo, Xie, Lee, Zhao, Wang, Li: "Recurrent Attention Networks for Long-text Modeling" (Findings of ACL 2023, arXiv 2306.06843). Of a window X_n of W tokens and the
cell c_(n-1), with s(y) = (y - mean y) / sqrt(mean y^2 + 1e-7) and GLU(z) = (z W_t + b_t) sigmoid(z W_g + b_g),

    z = LN([c_(n-1); X_n]),    u = LN(MHA(z) + GLU(z)),    r_n = s(u_0),    tokens = s(u_1 ..),    c_n = LN(r_n + GLU(r_(n-1)))  (c_1 = r_1)

MHA has rotary positions that begin anew in each window, the cell at 0, and swish after each of its four projections. Then memory is reviewed, by one head from tokens
to all the cells r, which brings what came late to what came early. A last window of fewer than ``min_window`` tokens joins the one before it.

With a causal mask a token sees the cell and what precedes it in its window, and reviews cells of earlier windows alone, so that nothing looks ahead; the cell still reads
its whole window. (The released mask is triangular over cell and window: it lets the cell see nothing of the window, and the review see all cells.)
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import cache, checks
from attnx.core.attention import attention
from attnx.masks.causal import causal
from attnx.masks.prefix import prefix
from attnx.mechanism import pairs
from attnx.nn.attention import Attention
from attnx.nn.common import check_sequence, dropout, refuse
from attnx.nn.embedding import Embedding
from attnx.positions.rotary import Rotary

_glorot = nnx.initializers.glorot_normal()


def document_windows(length: int, window_size: int, min_window: int = 0) -> tuple[tuple[int, int], ...]:
    """Where windows begin and end: each of ``window_size`` tokens, the last of what remains, joined to the one before it if that is fewer than ``min_window``.

    >>> document_windows(9, 4), document_windows(9, 4, min_window=2), document_windows(1, 4, min_window=2)
    (((0, 4), (4, 8), (8, 9)), ((0, 4), (4, 9)), ((0, 1),))
    """
    starts = list(range(0, length, window_size)) or [0]
    if len(starts) > 1 and length - starts[-1] < min_window:
        starts.pop()
    return tuple(zip(starts, [*starts[1:], length]))


def second_moment_norm(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """``(x - mean x) / sqrt(mean x^2 + 1e-7)`` over the last axis: the mean is taken off above, not below; statistics in at least float32.

    >>> bool(jnp.allclose(second_moment_norm(jnp.array([1.0, 3.0])), jnp.array([-1.0, 1.0]) / 5**0.5, atol=1e-6))
    True
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-7)).astype(x.dtype)


class GatedUnit(nnx.Module):
    """``(z W_t + b_t) sigmoid(z W_g + b_g)``, [..., D] to [..., outputs].

    >>> GatedUnit(3, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 3))).shape
    (2, 3)
    """

    def __init__(self, features: int, outputs: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.value, self.gate = (nnx.Linear(features, outputs, kernel_init=_glorot, dtype=dtype, param_dtype=param_dtype, rngs=rngs) for _ in range(2))

    def __call__(self, z):
        return self.value(z) * jax.nn.sigmoid(self.gate(z))


class SwishAttention(Attention):
    """Attention with biases and swish after each projection, its residual through a gated unit, and a norm: ``LN(swish(.. W_o + b_o) + GLU(z))``.

    Args:
      features, num_heads, head_size: as in :class:`attnx.nn.Attention`.
      gated_size: size of what the gated unit is given.
      rotary: whether queries and keys are turned by their positions.
      **options: dtype, param_dtype, rngs.
    """

    def __init__(self, features: int, num_heads: int, head_size: int, gated_size: int, *, rotary: bool, **options):
        super().__init__(features, num_heads, head_size=head_size, mechanism=pairs(), use_bias=True, kernel_init=_glorot, **options,
                         position=Rotary(interleaved=True) if rotary else None)
        self.unit = GatedUnit(gated_size, features, **options)
        self.norm = nnx.LayerNorm(features, epsilon=1e-6, **options)

    def _heads(self, project, x, axis):
        return jax.nn.silu(super()._heads(project, x, axis))

    def turned(self, x, positions):
        """Queries, keys and values [B, T, N, H] of tokens [B, T, D]; positions int32 [T]."""
        return self._prepare({}, self._query(x), *self._key_value(x), positions, positions)[:3]

    def close(self, found, residual, rate=0.0, key=None):
        """What heads found [B, T, N, H] and what goes around them as the output [B, T, D]."""
        out = jax.nn.silu(self._finish({}, found, None, residual, None))
        return self.norm(dropout(out, rate, key) + self.unit(residual))


class RANCarry(NamedTuple):
    """What is handed from window to window: the cell c, the cell r of the window before [B, 1, D], and how many windows there were [B]."""

    cell: Float[Array, "B 1 D"]
    previous: Float[Array, "B 1 D"]
    count: Int[Array, " B"]


class RANOutput(NamedTuple):
    """What a text was found to be.

    Attributes:
      tokens: [B, T, D], reviewed.
      found: [B, T, D], before the review.
      cells: r of each window, [B, windows, D].
      seen: booleans [B, windows]: which windows hold a token that is not padding.
      carry: what the next window of the same text needs; ``carry.cell`` is the last cell.
      pooled: [B, D], the text's vector.
    """

    tokens: Float[Array, "B T D"]
    found: Float[Array, "B T D"]
    cells: Float[Array, "B n D"]
    seen: Bool[Array, "B n"]
    carry: RANCarry
    pooled: Float[Array, "B D"]


class RANState(NamedTuple):
    """What a causal layer remembers between tokens: the next position, the carry, keys and values of the window so far, and the cells for the review (None without)."""

    position: Int[Array, ""]
    carry: RANCarry
    window: cache.KVCache
    cells: Float[Array, "B C D"] | None


class RAN(nnx.Module):
    """A recurrent attention layer; called like :class:`attnx.nn.Attention`, or :meth:`read` for all that it finds.

    Args:
      features: D.
      num_heads, head_size: of the attention within windows.
      window_size: W.
      min_window: the least size of a last window of its own; below W.
      attn_mask: what a token sees of its window: 'none' for all, 'causal' for what precedes it, 'prefix' for that and the first tokens of the text.
      review: whether tokens look at the cells at the end; otherwise they are normalised alone.
      pooling: the text's vector: 'last' (c of the last window), 'mean' or 'max' (of r over windows).
      cell_init: initialiser of the first cell, [D].
      dropout_rate: of what windows are made of and of what attention finds, where a dropout_key is given.
      implementation: as in :func:`attnx.attention`.
      rngs: the generator of initial values.

    Cost: O(T W) pairs in T / W steps, O(T^2 / W) pairs of the review; memory O(T), O(W + T / W) in a stream.

    >>> layer = RAN(8, 2, head_size=4, window_size=4, min_window=0, attn_mask="causal", rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 10, 8))
    >>> state, first = layer.step(layer.init_state(1, 10), x[:, :7])
    >>> state, last = layer.step(state, x[:, 7:])
    >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), layer(x), atol=1e-5))
    True
    """

    def __init__(self, features: int, num_heads: int = 8, *, head_size: int = 128, window_size: int = 256, min_window: int = 16,
                 attn_mask: Literal["none", "causal", "prefix"] = "none", review: bool = True, pooling: Literal["last", "mean", "max"] = "last",
                 cell_init=nnx.initializers.zeros_init(), dropout_rate: float = 0.1, implementation: str | None = None, dtype=None, param_dtype=jnp.float32,
                 rngs: nnx.Rngs):
        for name, given, known in (("attn_mask", attn_mask, ("none", "causal", "prefix")), ("pooling", pooling, ("last", "mean", "max"))):
            if given not in known:
                raise ValueError(f"{name}: expected one of {known}, got {given!r}")
        self.window_size = checks.check_integer("window_size", window_size, least=1)
        self.min_window = checks.check_integer("min_window", min_window, least=0, most=window_size - 1)
        self.features, self.attn_mask, self.pooling, self.implementation = features, attn_mask, pooling, implementation
        self.dropout_rate = checks.check_dropout_rate(dropout_rate)
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = lambda: nnx.LayerNorm(features, epsilon=1e-6, **options)
        self.first_cell = nnx.Param(cell_init(rngs.params(), (features,), param_dtype))
        self.input_norm, self.cell_norm, self.cell_unit = norm(), norm(), GatedUnit(features, features, **options)
        self.attention = SwishAttention(features, num_heads, head_size, features, rotary=True, **options)
        self.reviewer = SwishAttention(features, 1, features, features, rotary=False, **options) if review else nnx.data(None)
        self.output_norm = nnx.data(None) if review else norm()

    # Windows --------------------------------------------------------------------------------------------------------

    def carry(self, batch: int, cell: Float[Array, "B D"] | None = None, dtype=None) -> RANCarry:
        """What is carried into the first window: ``cell`` [B, D], or the learned one."""
        cell = jnp.broadcast_to(self.first_cell[...], (batch, self.features)) if cell is None else cell
        cell = cell[:, None].astype(dtype or cell.dtype)
        return RANCarry(cell, jnp.zeros_like(cell), jnp.zeros(batch, jnp.int32))

    def window(self, cell: Float[Array, "B 1 D"], window: Float[Array, "B w D"], *, real: Bool[Array, "B w"] | None = None, known=None,
               dropout_key: Array | None = None) -> tuple[Float[Array, "B 1 D"], Float[Array, "B w D"]]:
        """One window: ``(r, tokens)`` from the cell and the tokens.

        Args:
          cell: c, [B, 1, D].
          window: [B, w, D].
          real: booleans [B, w], which tokens are no padding.
          known: with attn_mask='prefix', how many of the window's tokens all see; an integer or [B].
          dropout_key: the key of dropout; None for none.
        """
        keys = (None,) * 2 if dropout_key is None else jax.random.split(dropout_key)
        z = dropout(self._normed(jnp.concatenate([cell.astype(window.dtype), window], axis=1)), self.dropout_rate, keys[0])
        places = jnp.arange(z.shape[1], dtype=jnp.int32)
        seen = places if real is None else jnp.where(jnp.pad(real, ((0, 0), (1, 0)), constant_values=True), places, -1)
        mask = None if self.attn_mask == "none" else causal()
        if self.attn_mask == "prefix":
            mask |= prefix(jnp.maximum(jnp.asarray(known), 0) + 1)
        found = attention(*self.attention.turned(z, places), mask=mask, query_positions=places.at[0].set(len(places)), key_positions=seen,  # the cell reads at the end
                          implementation=self.implementation)
        out = second_moment_norm(self.attention.close(found, z, self.dropout_rate, keys[1]).astype(window.dtype))
        return out[:, :1], out[:, 1:]

    def advance(self, carry: RANCarry, window: Float[Array, "B w D"], *, real: Bool[Array, "B w"] | None = None, known=None, dropout_key: Array | None = None
                ) -> tuple[RANCarry, Float[Array, "B 1 D"], Float[Array, "B w D"]]:
        """Reads the next window of a text: ``(carry, r, tokens)``; where all is padding nothing is carried on but what was."""
        cell, tokens = self.window(carry.cell, window, real=real, known=known, dropout_key=dropout_key)
        after = self._after(carry, cell)
        if real is not None:
            alive = real.any(axis=1)
            after = jax.tree.map(lambda new, old: jnp.where(alive.reshape(-1, *(1,) * (new.ndim - 1)), new, old), after, carry)
        return after, cell, tokens

    def _after(self, carry, cell):
        joined = self.cell_norm(cell + self.cell_unit(carry.previous.astype(cell.dtype)))
        new = jnp.where((carry.count > 0)[:, None, None], joined, cell)
        return RANCarry(new.astype(carry.cell.dtype), cell.astype(carry.cell.dtype), carry.count + 1)

    def _normed(self, x):
        return self.input_norm(x).astype(x.dtype)

    # Texts ----------------------------------------------------------------------------------------------------------

    def read(self, x: Float[Array, "B T D"], *, carry: RANCarry | None = None, positions: Int[Array, "*B T"] | None = None,
             prefix_length: Int[Array, "*B"] | int = 0, dropout_key: Array | None = None) -> RANOutput:
        """Reads a text, or the rest of one.

        Args:
          x: [B, T, D].
          carry: of what was read before, whole windows; None for nothing. The review is of this call's cells alone.
          positions: int32 [T] or [B, T]; -1 is padding, which no token sees and no cell reads. Else only the order matters.
          prefix_length: with attn_mask='prefix', how many tokens of x all see; an integer or [B].
          dropout_key: the key of dropout; None for none.

        Returns:
          A :class:`RANOutput`.
        """
        check_sequence("x", x, self.features)
        batch, length, features = x.shape
        carry = self.carry(batch, dtype=x.dtype) if carry is None else carry
        bounds = document_windows(length, self.window_size, self.min_window)
        real = None if positions is None else jnp.broadcast_to(checks.check_positions("positions", positions, batch, length) >= 0, (batch, length))
        count, start = len(bounds) - 1, bounds[-1][0]
        keys = None if dropout_key is None else jax.random.split(dropout_key, count + 1)
        split = lambda a: None if a is None else jnp.moveaxis(a[:, :start].reshape(batch, count, self.window_size, *a.shape[2:]), 1, 0)

        def body(carry, at):
            window, real, begin, key = at
            carry, cell, tokens = self.advance(carry, window, real=real, known=jnp.asarray(prefix_length) - begin, dropout_key=key)
            return carry, (cell[:, 0], tokens)

        cells, found = [], []
        if count:
            rows = split(x), split(real), jnp.arange(count) * self.window_size, None if keys is None else keys[:-1]
            carry, (cell, tokens) = jax.lax.scan(body, carry, rows)
            cells, found = [jnp.moveaxis(cell, 0, 1)], [jnp.moveaxis(tokens, 0, 1).reshape(batch, start, features)]
        carry, (cell, tokens) = body(carry, (x[:, start:], None if real is None else real[:, start:], start, None if keys is None else keys[-1]))
        cells, found = jnp.concatenate([*cells, cell[:, None]], axis=1), jnp.concatenate([*found, tokens], axis=1)
        seen = jnp.ones(cells.shape[:2], bool) if real is None else jnp.stack([real[:, low:high].any(axis=1) for low, high in bounds], axis=1)
        home = jnp.minimum(jnp.arange(length) // self.window_size, count)
        whole = jnp.sum(jnp.asarray([high for _, high in bounds]) <= jnp.asarray(prefix_length)[..., None], axis=-1)  # windows of the prefix alone
        return RANOutput(self.review(found, cells, seen=seen, home=home, whole=whole), found, cells, seen, carry, self._pool(cells, seen, carry))

    def review(self, tokens: Float[Array, "B T D"], cells: Float[Array, "B n D"] | None, *, seen: Bool[Array, "*B n"] | None = None,
               home: Int[Array, " T"] | None = None, whole: Int[Array, "*B"] | int = 0) -> Float[Array, "B T D"]:
        """Memory review: one head from tokens to cells, its residual the gated unit of the queries; without it a norm.

        Args:
          tokens: [B, T, D].
          cells: [B, n, D].
          seen: booleans [n] or [B, n], which cells there are.
          home: the window of each token, [T]: with a causal or prefix mask it reviews earlier windows.
          whole: with a prefix mask, how many windows at the beginning all tokens review.
        """
        if self.reviewer is None:
            return self.output_norm(tokens).astype(tokens.dtype)
        places = 1 + jnp.arange(cells.shape[1], dtype=jnp.int32)
        places = places if seen is None else jnp.where(seen, places, -1)
        mask, at = None, None
        if self.attn_mask != "none":
            mask, at = causal(), home.astype(jnp.int32)
        if self.attn_mask == "prefix":
            mask |= prefix(jnp.asarray(whole) + 1)
        query = self.reviewer._query(tokens)
        found = attention(query, *self.reviewer._key_value(cells), mask=mask, query_positions=at, key_positions=places, implementation=self.implementation)
        return self.reviewer.close(found, query[:, :, 0]).astype(tokens.dtype)

    def _pool(self, cells, seen, carry):
        if self.pooling == "last":
            return carry.cell[:, 0].astype(cells.dtype)
        there = seen[..., None]
        if self.pooling == "mean":
            return jnp.sum(jnp.where(there, cells, 0), axis=1) / jnp.maximum(there.sum(axis=1), 1).astype(cells.dtype)
        return jnp.where(there.any(axis=1), jnp.max(jnp.where(there, cells, -jnp.inf), axis=1), 0)

    def __call__(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids=None, dropout_key: Array | None = None, hooks=None,
                 layer=0) -> Float[Array, "B T D"]:
        """The reviewed tokens of a text, [B, T, D] to the same; positions as in :meth:`read`."""
        refuse("a recurrent attention layer reads one text at a time and shows no scores", segment_ids=segment_ids, hooks=hooks)
        return self.read(x, positions=positions, dropout_key=dropout_key).tokens

    # Tokens ---------------------------------------------------------------------------------------------------------

    def init_state(self, batch: int, max_length: int, *, dtype=None) -> RANState:
        """The state before the first token: W + 1 keys and values, and with the review a cell for each window of ``max_length`` tokens."""
        if self.attn_mask != "causal" or self.min_window > 1:
            raise NotImplementedError("attn_mask, min_window: token by token only a causal layer can be read whose last windows never grow; expected 'causal' and at "
                                      f"most 1, got {self.attn_mask!r} and {self.min_window}; read() streams window by window")
        dtype = dtype or self.first_cell.dtype
        slots = cache.init(batch, self.window_size + 1, self.attention.num_heads, self.attention.head_size, dtype=dtype)
        cells = None if self.reviewer is None else jnp.zeros((batch, max(math.ceil(max_length / self.window_size), 1), self.features), dtype)
        return RANState(jnp.zeros((), jnp.int32), self.carry(batch, dtype=dtype), slots, cells)

    def step(self, state: RANState, x: Float[Array, "B t D"], *, hooks=None, layer=0) -> tuple[RANState, Float[Array, "B t D"]]:
        """The next t tokens, one after another: ``(state, [B, t, D])``."""
        check_sequence("x", x, self.features)
        refuse("a recurrent attention layer shows no scores", hooks=hooks)
        state, out = jax.lax.scan(lambda state, token: self._token(state, token[:, None]), state, jnp.moveaxis(x, 1, 0))
        return state, jnp.moveaxis(out[:, :, 0], 0, 1)

    def _token(self, state, x):
        place = state.position % self.window_size
        state = jax.lax.cond(place == 0, self._open, lambda state: state, state)
        z = self._normed(x)
        at = (place + 1)[None]
        query, key, value = self.attention.turned(z, at)
        window = cache.append(state.window, key, value)
        found = attention(query, window.key.astype(query.dtype), window.value.astype(query.dtype), mask=causal(), query_positions=at, key_positions=window.positions)
        token = second_moment_norm(self.attention.close(found, z).astype(x.dtype))
        home = state.position // self.window_size
        out = self.review(token, None if state.cells is None else state.cells.astype(x.dtype), home=home[None])
        state = state._replace(position=state.position + 1, window=window)
        return jax.lax.cond(place == self.window_size - 1, self._close, lambda state, home: state, state, home), out

    def _open(self, state):
        """Begins a window with the cell."""
        _, key, value = self.attention.turned(self._normed(state.carry.cell), jnp.zeros(1, jnp.int32))
        empty = state.window._replace(positions=jnp.full_like(state.window.positions, -1), next=jnp.zeros_like(state.window.next))
        return state._replace(window=cache.append(empty, key, value))

    def _close(self, state, home):
        """Ends a window: the cell reads it."""
        z = self._normed(state.carry.cell)
        query = self.attention.turned(z, jnp.zeros(1, jnp.int32))[0]
        found = attention(query, state.window.key.astype(query.dtype), state.window.value.astype(query.dtype), key_positions=state.window.positions)
        cell = second_moment_norm(self.attention.close(found, z).astype(state.carry.cell.dtype))
        cells = None if state.cells is None else jax.lax.dynamic_update_slice_in_dim(state.cells, cell.astype(state.cells.dtype), home, axis=1)
        return state._replace(carry=self._after(state.carry, cell), cells=cells)


class RanNet(nnx.Module):
    """Tokens in, numbers for each or for the text out: an embedding, recurrent attention layers, a linear map.

    Args:
      vocab_size: V.
      features: D.
      num_layers: how many layers; each reads the tokens of the one before it.
      outputs: numbers that come out; V by default, by the embedding's table.
      pooled: whether they are of the text (its last layer's vector) rather than of each token.
      rngs: the generator of initial values.
      **options: of :class:`RAN`.

    >>> model = RanNet(11, 8, outputs=3, pooled=True, num_heads=2, head_size=4, window_size=4, min_window=2, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 9), int)).shape
    (2, 3)
    """

    def __init__(self, vocab_size: int, features: int, *, num_layers: int = 1, outputs: int | None = None, pooled: bool = False, rngs: nnx.Rngs, **options):
        self.embedding = Embedding(vocab_size, features, rngs=rngs)
        self.layers = nnx.List([RAN(features, rngs=rngs, **options) for _ in range(num_layers)])
        if pooled and outputs is None:
            raise ValueError("outputs: expected a number of classes with pooled=True, got None")
        self.head, self.pooled = nnx.data(None) if outputs is None else nnx.Linear(features, outputs, rngs=rngs), pooled

    def read(self, tokens: Int[Array, "B T"], *, positions: Int[Array, "*B T"] | None = None, dropout_key: Array | None = None, **options) -> RANOutput:
        """All that the last layer finds; options as of :meth:`RAN.read`."""
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            out = layer.read(x, positions=positions, dropout_key=key, **options)
            x = out.tokens
        return out

    def __call__(self, tokens: Int[Array, "B T"], **inputs) -> Float[Array, "..."]:
        """[B, T, outputs], or [B, outputs] if pooled; inputs as of :meth:`read`."""
        out = self.read(tokens, **inputs)
        if self.head is None:
            return self.embedding.logits(out.tokens)
        return self.head(out.pooled if self.pooled else out.tokens)
