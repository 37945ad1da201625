"""Multi-token attention: scores that look at those of neighbouring queries, keys and heads, so that a match of several tokens at once is told from matches of each.

Golovneva, Wang, Weston, Sukhbaatar: "Multi-Token Attention" (2025, arXiv 2504.00927). Before and after the softmax, scores [T, S] of each head may be convolved over
queries (causally) and keys (on both sides), and heads be mixed within groups:

    S'_ij = sum over a, b of  theta[c_q - 1 - a, h + b] S_(i-a, j+b),        0 <= a < c_q,  |b| <= h = (c_k - 1) / 2

What a query does not see counts 0, in the future as in other documents, which keeps this causal though keys to the right of j enter. The convolution after the
softmax may leave rows whose weights do not sum to 1. A head's output passes an RMS norm and, if wanted, a gate of its own. A fold over key blocks cannot look across
rows, so rows are made in blocks of queries, with the few rows before (the halo) made again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import cache, checks
from attnx.core.halves import attend_scores, attention_scores
from attnx.core.row_blocks import IMPLEMENTATIONS, pad_rows, rows_at_once, scan_rows
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.nn.attention import Attention


def key_query_conv(scores: Float[Array, "B N T S"], kernel: Float[Array, "N cq ck"], visible: Bool[Array, "#B #N T S"] | None = None, *,
                   segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B N T S"]:
    """Convolves each head's scores over this and earlier queries, and over keys on both sides.

    ::

        out_ij = sum over a, b of  kernel[c_q - 1 - a, h + b] s_(i-a, j+b) where visible,        0 <= a < c_q,  |b| <= h = (c_k - 1) / 2

    Args:
      scores: [B, N, T, S], scores or weights.
      kernel: [N, c_q, c_k], c_k odd; its last row meets the query itself (a correlation, as deep learning's convolutions are).
      visible: booleans that broadcast to [B, N, T, S]; scores elsewhere count 0. Causal by default, the T queries being the last of the S tokens.
      segment_ids: int32 [B, T]: rows of other documents count 0 too.

    Returns:
      [B, N, T, S], also where nothing is visible.

    Raises:
      ValueError: a kernel of another shape.

    Cost: O(T S N c_q c_k).

    >>> shift = jnp.zeros((1, 2, 3)).at[0, 0, 1].set(1.0)  # the query before
    >>> key_query_conv(jnp.arange(9.0).reshape(1, 1, 3, 3), shift)[0, 0]
    Array([[0., 0., 0.],
           [0., 0., 0.],
           [3., 4., 0.]], dtype=float32)
    """
    kernel = _check_kernel("kernel", kernel, scores.shape[1])
    t, s = scores.shape[2:]
    visible = jnp.tril(jnp.ones((t, s), bool), s - t) if visible is None else visible
    before = kernel.shape[1] - 1
    seen = jnp.pad(jnp.where(visible, scores, 0), ((0, 0), (0, 0), (before, 0), (0, 0)))
    return _convolve(seen, kernel, None if segment_ids is None else pad_rows(segment_ids, before))


def _convolve(scores, kernel, ids):
    """Rows from c_q - 1 on of the convolution of [B, N, T, S]; ``ids`` [B, T] or None, of the rows' documents."""
    before, half = kernel.shape[1] - 1, kernel.shape[2] // 2
    t, s = scores.shape[2] - before, scores.shape[3]
    wide = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (half, half)))
    kernel, out = kernel.astype(scores.dtype), jnp.zeros_like(scores[:, :, before:])
    for row in range(before + 1):
        earlier = wide[:, :, row:row + t]
        if ids is not None and row < before:
            same = ids[:, before:] == ids[:, row:row + t]
            earlier = jnp.where(same[:, None, :, None], earlier, 0)
        for column in range(2 * half + 1):  # written out: the compiler makes one loop of all taps
            out += kernel[:, row, column, None, None] * earlier[..., column:column + s]
    return out


def head_mix(weights: Float[Array, "B N T S"], mix: Float[Array, "g c c"]) -> Float[Array, "B N T S"]:
    """Mixes heads within groups of c that follow each other: ``out[g c + o] = sum over i of mix[g, i, o] weights[g c + i]``.

    Args:
      weights: [B, N, T, S], weights or scores.
      mix: [N / c, c, c], from a group's heads (rows) to its new ones.

    Returns:
      [B, N, T, S].

    >>> swap = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
    >>> head_mix(jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1), swap).ravel().tolist()
    [2.0, 1.0]
    """
    mix = _check_mix("mix", mix, weights.shape[1])
    grouped = weights.reshape(weights.shape[0], mix.shape[0], mix.shape[1], *weights.shape[2:])
    return jnp.einsum("bgits,gio->bgots", grouped, mix.astype(weights.dtype)).reshape(weights.shape)


def _check_kernel(name, kernel, heads):
    kernel = checks.check_real(name, kernel, ranks=(3,))
    if kernel.shape[0] != heads or not kernel.shape[1] or not kernel.shape[2] % 2:
        raise ValueError(f"{name}: expected shape [{heads}, c_q, c_k] with c_k odd, so that a key is in the middle, got {checks.describe(kernel)}")
    return kernel


def _check_mix(name, mix, heads):
    mix = checks.check_real(name, mix, ranks=(3,))
    groups, size = mix.shape[:2]
    if groups * size != heads or mix.shape[2] != size:
        raise ValueError(f"{name}: expected shape [{heads} / c, c, c], got {checks.describe(mix)}")
    return mix


class Mixing(NamedTuple):
    """How multi-token attention mixes scores and weights; None leaves a step out.

    Attributes:
      score_kernel: [N, c_q, c_k], convolves scores before the softmax.
      score_mix: [N / c, c, c], mixes heads then.
      weight_kernel: [N, c_q, c_k], convolves weights after the softmax.
      weight_mix: [N / c, c, c], mixes heads then.
    """

    score_kernel: Any = None
    score_mix: Any = None
    weight_kernel: Any = None
    weight_mix: Any = None

    @property
    def halo(self) -> int:
        """How many earlier rows of scores a row depends on."""
        return sum(kernel.shape[1] - 1 for kernel in (self.score_kernel, self.weight_kernel) if kernel is not None)

    def check(self, heads: int) -> "Mixing":
        """Itself, with arrays of the right shapes."""
        given = {name: x for name, x in self._asdict().items() if x is not None}
        return Mixing(**{name: (_check_kernel if name.endswith("kernel") else _check_mix)(name, x, heads) for name, x in given.items()})


def multi_token_attention(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], mixing: Mixing = Mixing(), *,
                          scale: float | None = None, segment_ids: Int[Array, "B T"] | None = None, positions: Int[Array, "*B T"] | None = None,
                          implementation: str | None = None, block_size: int | None = None) -> Float[Array, "B T N Hv"]:
    """Causal self-attention whose scores and weights are convolved over queries and keys and mixed over heads.

    ::

        S = scale q . k where seen, else 0;      S <- mix(conv(S));      A = softmax(S where seen);      A <- mix(conv(A) where seen);      out = A v

    Args:
      query: [B, T, N, H], in the order of their positions.
      key: [B, T, K, H], N a multiple of K.
      value: [B, T, K, Hv].
      mixing: the kernels, see :class:`Mixing`; with none this is softmax attention.
      scale: of the dot products; 1 / sqrt(H) by default.
      segment_ids: int32 [B, T], documents that neither see nor enter the convolutions of each other.
      positions: int32 [T] or [B, T]; -1 is padding, which counts 0. 0, 1, 2, ... by default.
      implementation: "reference" (all rows at once), "blockwise" (blocks of queries), None for the latter.
      block_size: queries of a block; chosen by default.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(T^2 N (H + c_q c_k + c)) time; memory O(T) and N (block + halo) T scores, forward and backward.

    >>> import attnx
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> mixing = Mixing(identity_kernel(2, 3, 5), identity_mix(2, 2))
    >>> bool(jnp.allclose(multi_token_attention(q, k, v, mixing), attnx.attention(q, k, v, mask=attnx.masks.causal()), atol=1e-6))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    batch, length, heads, _ = query.shape
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    if block_size is not None:
        block_size = checks.check_integer("block_size", block_size, least=1)
    if key.shape[1] != length:
        raise ValueError(f"key: expected the query's {length} tokens, for rows of scores follow each other as tokens do, got {checks.describe(key)}")
    if segment_ids is not None and (segment_ids := checks.check_integers("segment_ids", segment_ids, ranks=(2,))).shape != (batch, length):
        raise ValueError(f"segment_ids: expected shape {[batch, length]} ([B, T]), got {checks.describe(segment_ids)}")
    places = jnp.arange(length, dtype=jnp.int32) if positions is None else checks.check_positions("positions", positions, batch, length)
    places = jnp.broadcast_to(places, (batch, length))
    mixing = mixing.check(heads)
    body = partial(_attend_rows, key, value, places, segment_ids, mixing, scale)
    rows = pad_rows((query, places, segment_ids), mixing.halo)
    return scan_rows(body, None, rows, block_size=rows_at_once(implementation, block_size, length), halo=mixing.halo)[1]


def _attend_rows(key, value, key_positions, segment_ids, mixing, scale, carry, rows):
    """Outputs of all but the first ``mixing.halo`` rows: queries, positions and documents, [B, halo + t, ...]."""
    query, positions, ids = rows
    mask = causal() if ids is None else causal() & documents(ids, segment_ids)
    s, seen = attention_scores(query, key, scale=scale, mask=mask, query_positions=positions, key_positions=key_positions)

    def convolve(x, kernel, ids):
        before = kernel.shape[1] - 1
        return _convolve(jnp.where(seen, x, 0), kernel, ids), seen[:, :, before:], None if ids is None else ids[:, before:]

    if mixing.score_kernel is not None:
        s, seen, ids = convolve(s, mixing.score_kernel, ids)
    if mixing.score_mix is not None:
        s = head_mix(s, mixing.score_mix)
    w = attend_scores(s, jnp.zeros((s.shape[-1], 0), s.dtype), mask=seen, return_weights=True)[1]
    if mixing.weight_kernel is not None:
        w, seen, ids = convolve(w, mixing.weight_kernel, ids)
        w = jnp.where(seen, w, 0)
    if mixing.weight_mix is not None:
        w = head_mix(w, mixing.weight_mix)
    batch, heads, length, _ = w.shape
    grouped = w.reshape(batch, key.shape[2], heads // key.shape[2], *w.shape[2:]).astype(value.dtype)
    out = jnp.einsum("bkgts,bskv->btkgv", grouped, value, preferred_element_type=w.dtype)
    return carry, out.reshape(batch, length, heads, -1).astype(query.dtype)


def identity_kernel(heads: int, queries: int, keys: int) -> Float[Array, "N cq ck"]:
    """The kernel [N, c_q, c_k] that changes nothing: where training starts.

    >>> identity_kernel(1, 2, 3)[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    return jnp.zeros((heads, queries, keys)).at[:, -1, keys // 2].set(1)


def identity_mix(heads: int, group: int) -> Float[Array, "g c c"]:
    """The matrices [N / c, c, c] that leave heads as they are."""
    if heads % group:
        raise ValueError(f"group: expected a divisor of the {heads} heads, got {group}")
    return jnp.broadcast_to(jnp.eye(group), (heads // group, group, group))


class MultiTokenState(NamedTuple):
    """A key-value cache, and the last queries, whose scores enter the next tokens' convolutions."""

    cache: cache.KVCache
    queries: Float[Array, "B halo N H"]


class MultiTokenMechanism(nnx.Module):
    """:func:`multi_token_attention` as an :class:`attnx.Mechanism` that owns its kernels; they start as the identity.

    Args:
      num_heads: N.
      score_kernel, weight_kernel: (c_q, c_k), or None for no convolution.
      score_mix, weight_mix: heads of a group that are mixed, or None for none.
      scale, implementation: as in :func:`multi_token_attention`.
      rngs: not used.
    """

    def __init__(self, num_heads: int, *, score_kernel: tuple[int, int] | None = (6, 11), weight_kernel: tuple[int, int] | None = None,
                 score_mix: int | None = None, weight_mix: int | None = None, scale: float | None = None, implementation: str | None = None,
                 rngs: nnx.Rngs | None = None):
        del rngs
        kernel = lambda size: nnx.data(None) if size is None else nnx.Param(identity_kernel(num_heads, *size))
        mix = lambda size: nnx.data(None) if size is None else nnx.Param(identity_mix(num_heads, size))
        self.score_kernel, self.weight_kernel = kernel(score_kernel), kernel(weight_kernel)
        self.score_mix, self.weight_mix = mix(score_mix), mix(weight_mix)
        self.num_heads, self.scale, self.implementation = num_heads, scale, implementation
        self.mixing()  # raises for sizes that do not fit

    def mixing(self) -> Mixing:
        """The kernels as arrays."""
        array = lambda x: None if x is None else x[...]
        return Mixing(*map(array, (self.score_kernel, self.score_mix, self.weight_kernel, self.weight_mix))).check(self.num_heads)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        """The parallel form; ``key_positions`` are the query's."""
        return multi_token_attention(query, key, value, self.mixing(), scale=self.scale, segment_ids=segment_ids, positions=query_positions,
                                     implementation=self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        """The state before the first token."""
        queries = jnp.zeros((batch, self.mixing().halo, self.num_heads, key_size), dtype)
        return MultiTokenState(cache.init(batch, max_length, kv_heads, key_size, value_size, dtype), queries)

    def step(self, state, query, key, value):
        """The next t tokens."""
        mixing, length = self.mixing(), query.shape[1]
        kept = cache.append(state.cache, key, value)
        dtype = cache.computation_dtype(query, kept.key, kept.value)
        queries = jnp.concatenate([state.queries.astype(dtype), query.astype(dtype)], axis=1)
        places = state.cache.next - mixing.halo + jnp.arange(queries.shape[1], dtype=jnp.int32)
        rows = (queries, jnp.broadcast_to(jnp.maximum(places, -1), queries.shape[:2]), None)
        body = partial(_attend_rows, kept.key.astype(dtype), kept.value.astype(dtype), kept.positions, None, mixing, self.scale)
        _, out = scan_rows(body, None, rows, block_size=rows_at_once(self.implementation, None, length), halo=mixing.halo)
        return MultiTokenState(kept, queries[:, length:].astype(state.queries.dtype)), out.astype(query.dtype)


class MultiTokenAttention(Attention):
    """Multi-head :func:`multi_token_attention`.

    The paper convolves scores in every fourth layer (2, 6, 10, ...) and leaves ``score_kernel=None`` in others, mixes heads after the softmax in all, and normalises each
    head's output in all.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism and the output's norm and gate.
      score_kernel, weight_kernel: (c_q, c_k) of the convolution before and after the softmax; None for none.
      score_mix, weight_mix: heads of a group that are mixed before and after the softmax, a divisor of N; None for none.
      group_norm: whether a head's output passes an RMS norm, of gains that heads share.
      layer: index of the layer, for the factor ``1 - (0.8 - 0.6 e^(-0.3 layer))`` after the norm; None for no factor.
      gate: whether a head's output is then multiplied by ``sigmoid`` of a linear map of itself to a number.
      scale, implementation: as in :func:`multi_token_attention`.

    >>> layer = MultiTokenAttention(32, 4, score_kernel=(3, 5), weight_mix=2, gate=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, score_kernel: tuple[int, int] | None = (6, 11), weight_kernel: tuple[int, int] | None = None,
                 score_mix: int | None = None, weight_mix: int | None = None, group_norm: bool = True, layer: int | None = None, gate: bool = False,
                 scale: float | None = None, implementation: str | None = None, rngs: nnx.Rngs, **options):
        mechanism = partial(MultiTokenMechanism, num_heads, score_kernel=score_kernel, weight_kernel=weight_kernel, score_mix=score_mix, weight_mix=weight_mix,
                            scale=scale, implementation=implementation)
        norm = partial(nnx.RMSNorm, epsilon=1e-5) if group_norm else None
        super().__init__(features, num_heads, mechanism=mechanism, output_norm=norm, rngs=rngs, **options)
        self.factor = 1.0 if layer is None else 0.2 + 0.6 * float(np.exp(-0.3 * layer))
        self.head_gate = nnx.Linear(self.value_size, 1, dtype=self.dtype, rngs=rngs) if gate else nnx.data(None)

    def _gated(self, out, x, positions):
        out = out if self.factor == 1.0 else out * self.factor
        return out if self.head_gate is None else out * jax.nn.sigmoid(self.head_gate(out))
