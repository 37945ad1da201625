"""LAVO: linear attention to what is near, and to a memory of fixed size along orthogonal directions.

Zhang, Jiang, Feng, Zheng, Kong: "Linear Attention via Orthogonal Memory" (2023, arXiv 2312.11135). A token's context vector c serves as key and as value. Each head
has R orthonormal directions b_1 .. b_R, and remembers of all tokens so far the mean of their coefficients:

    m_t[r] = mean over s <= t of <b_r, c_s>,          slots H_t[r] = m_t[r] b_r          (pairwise orthogonal; R numbers and a count are the state)

Without dissection of the context a query attends to the slots, ``o_t = softmax(q_t H_t^T / sqrt(D)) H_t``. With it, the tokens up to t in its own window of w
are attended to as they are, with a bias for their distance, and the slots hold the windows before; both under one normaliser. In the first window
there is no memory. It models long text at a cost in proportion to its length.

Reconstructed from the abstract and public descriptions of the method: windows are aligned rather than sliding, the directions are learned and made orthonormal anew by a
QR decomposition in each call, and biases begin at zero.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks
from attnx.core.attention import attention
from attnx.masks.explicit import explicit
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes
from attnx.scores.bias import bias
from pallas_kernels.tile import accumulator_dtype


def orthonormal(bases: Float[Array, "N R D"]) -> Float[Array, "N R D"]:
    """Orthonormal rows that span what the rows of each head do, one after another (Gram and Schmidt's, computed by QR).

    Args:
      bases: real [N, R, D], R at most D, independent rows.

    Returns:
      [N, R, D] in float32 (float64 for float64) with ``B B^T = I``; differentiable. Orthonormal rows stay as they are.

    >>> import jax.numpy as jnp
    >>> bool(jnp.allclose(orthonormal(jnp.array([[[3.0, 0.0], [1.0, 2.0]]])), jnp.eye(2), atol=1e-6))
    True
    """
    bases = _check_bases(bases)
    q, r = jnp.linalg.qr(jnp.swapaxes(bases.astype(accumulator_dtype(bases.dtype)), 1, 2))
    signs = jnp.where(jnp.diagonal(r, axis1=1, axis2=2) < 0, -1, 1)
    return jnp.swapaxes(q * signs[:, None], 1, 2).astype(q.dtype)


def orthogonal_memory(context: Float[Array, "B T N D"], bases: Float[Array, "N R D"], *, counted: Bool[Array, "B T"] | None = None,
                      segment_ids: Int[Array, "B T"] | None = None, causal: bool = True) -> Float[Array, "B T N R"]:
    """The coefficients of the memory: the mean of the context's projections.

    ::

        m_t[r] = mean over s <= t of <b_r, c_s>          or, not causal, over all s

    Args:
      context: [B, T, N, D].
      bases: [N, R, D], orthonormal rows for each head, see :func:`orthonormal`.
      counted: booleans [B, T], which tokens count; all by default.
      segment_ids: int32 [B, T]; the mean begins anew where the id changes. Where causal only.
      causal: whether it is the mean of the tokens so far.

    Returns:
      [B, T, N, R], or [B, 1, N, R] where not causal, in float32 (float64 for float64); 0 before any token counts.

    Cost: O(T R D) a head.

    >>> import jax.numpy as jnp
    >>> context = jnp.array([[1.0, 5.0], [3.0, 5.0]])[None, :, None]
    >>> orthogonal_memory(context, jnp.array([[[1.0, 0.0]]]))[0, :, 0, 0].tolist()
    [1.0, 2.0]
    """
    context, bases, counted = _check(context, bases, counted)
    projected, weight = _project(context, bases, counted)
    if not causal:
        return _mean(projected.sum(1, keepdims=True), weight.sum(1, keepdims=True))
    return _mean(*_running((projected, weight), _goes_on(segment_ids, counted.shape)))


def lavo_attention(query: Float[Array, "B T N D"], context: Float[Array, "B S N D"], bases: Float[Array, "N R D"], *, window: int = 128,
                   rel_bias: Float[Array, "N W"] | None = None, causal: bool = True, cross: bool = False, dissect: bool = True, scale: float | None = None,
                   key_positions: Int[Array, "*B S"] | None = None, segment_ids: Int[Array, "B T"] | None = None, implementation: str | None = None):
    """Attention to the context nearby and to the orthogonal memory of the rest, under one normaliser.

    ::

        out_t = sum over s of w_ts c_s + sum over r of u_tr H[r]              H[r] = m[r] b_r
        (w_t, u_t) = softmax over both of (scale q_t . c_s + rel_bias[t - s],  scale q_t . H[r])

    s: the tokens of t's aligned window of w up to t (all of it where not causal, none in cross-attention or without ``dissect``). m: the mean of the projections of the
    tokens in windows before that (of all tokens where not causal; of those up to t without ``dissect``).

    Args:
      query: [B, T, N, D].
      context: [B, S, N, D], keys and values in one; S = T unless ``cross``.
      bases: [N, R, D], orthonormal rows for each head, see :func:`orthonormal`.
      window: w, tokens of a window.
      rel_bias: real [N, w], at the distances t - s = 0 .. w - 1; or, where not causal, [N, 2 w - 1], at t - s = 1 - w .. w - 1. None adds nothing.
      causal: whether t sees nothing later than itself.
      cross: whether the context is another sequence: the memory alone is attended to. Not causal.
      dissect: whether windows are attended to as they are.
      scale: 1 / sqrt(D) by default.
      key_positions: int32 [S] or [B, S], of which -1 marks padding, neither seen nor counted.
      segment_ids: int32 [B, T], documents that do not see each other; causal self-attention only.
      implementation: of :func:`attnx.attention`, by which windows are attended to.

    Returns:
      [B, T, N, D] in the query's dtype; zero where there is nothing to attend to.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or combination, named.

    Cost: O(T (w + R) D) time and O(T (D + R / w)) memory a head.

    Source: Jun Zhang, Shuyang Jiang, Jiangtao Feng, Lin Zheng, Lingpeng Kong, "Linear Attention via Orthogonal Memory", 2023, arXiv 2312.11135.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, c = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, 4))
    >>> near = lavo_attention(q, c, jnp.eye(4)[None], window=8)  # one window: softmax attention
    >>> bool(jnp.allclose(near, attnx.attention(q, c, c, mask=attnx.masks.causal()), atol=1e-6))
    True
    """
    query, context, _ = checks.check_query_key_value(query, context, context)
    (b, t, n, d), s = query.shape, context.shape[1]
    checks.check_integer("window", window, least=1)
    if context.shape[2] != n:
        raise ValueError(f"context: expected the {n} heads of query, got {checks.describe(context)}")
    if cross and causal:
        raise ValueError("causal: expected False with cross=True, where the memory is of the whole context")
    if not cross and s != t:
        raise ValueError(f"context: expected the length {t} of query with cross=False, got {checks.describe(context)}")
    if segment_ids is not None and not causal:
        raise ValueError("segment_ids: expected None with causal=False; mark padding by key_positions of -1")
    counted = None if key_positions is None else jnp.broadcast_to(jnp.atleast_2d(checks.check_positions("key_positions", key_positions, b, s)) >= 0, (b, s))
    context, bases, counted = _check(context, bases, counted)
    if segment_ids is not None and checks.check_integers("segment_ids", segment_ids, ranks=(2,)).shape != (b, t):
        raise ValueError(f"segment_ids: expected shape {[b, t]}, got {checks.describe(segment_ids)}")
    if rel_bias is not None and (cross or not dissect):
        raise ValueError("rel_bias: expected None without windows (cross=True or dissect=False)")
    _check_rel_bias(rel_bias, n, window, causal)
    scale = checks.check_scale(scale, d)
    if 0 in query.shape:
        return jnp.zeros_like(query)
    if cross or not dissect:
        coefficients = orthogonal_memory(context, bases, counted=counted, segment_ids=segment_ids, causal=causal)
        weight = _running((counted[..., None, None],), _goes_on(segment_ids, (b, s)))[0] if causal else counted.sum(1)[:, None, None, None]
        return _read(query, coefficients, bases, weight > 0, scale)
    cut = partial(_cut, size=window)
    ids = jnp.zeros((b, t), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    ids, seen, context_cut, query_cut = cut(ids, mode="edge"), cut(counted), cut(context), cut(query)
    if causal:
        memory = _memories(context_cut, bases, seen, ids)
    else:
        projected, weight = _project(context, bases, counted)
        memory = jax.tree.map(lambda x: jnp.broadcast_to(x.sum(1)[:, None], (b, ids.shape[1], *x.shape[2:])), (projected, weight))
    # Where a window begins in another document than the one before ended in, nothing is remembered; nor by what follows the first document of a window.
    of = jnp.pad(ids[:, :-1, -1], ((0, 0), (1, 0)))[..., None] if causal else ids[:, :, :1]
    places = jnp.arange(window)
    out = _windows(query_cut, context_cut, bases, memory, ids, ids, ids == of, seen, places, rel_bias, causal, scale, implementation)
    return out.reshape(b, -1, n, d)[:, :t]


def _windows(query, context, bases, memory, query_ids, ids, remembers, seen, places, rel_bias, causal, scale, implementation):
    """Queries [B, W, q, N, D] at ``places`` [q] of windows [B, W, w, N, D], in these and in the memories before them: [B, W, q, N, D]."""
    (b, windows, count), w, r = query.shape[:3], context.shape[2], bases.shape[1]
    sums, weight = memory
    slots = (_mean(sums, weight)[..., None] * bases).astype(context.dtype)  # [B, W, N, R, D]
    keys = jnp.concatenate([context, jnp.swapaxes(slots, 2, 3)], axis=2)
    between = places[:, None] - jnp.arange(w)
    near = (query_ids[..., None] == ids[:, :, None]) & seen[:, :, None]
    near = near & (between >= 0) if causal else near
    far = remembers[..., None] & (weight > 0).reshape(b, windows, 1, 1)
    visible = jnp.concatenate([near, jnp.broadcast_to(far, (b, windows, count, r))], axis=3)
    flat = lambda x: x.reshape(b * windows, *x.shape[2:])
    scores = ()
    if rel_bias is not None:
        column = jnp.clip(between if causal else between + w - 1, 0, rel_bias.shape[1] - 1)
        scores = (bias(jnp.pad(rel_bias[:, column], ((0, 0), (0, 0), (0, r)))[None]),)
    return attention(flat(query), flat(keys), flat(keys), scores=scores, mask=explicit(flat(visible)[:, None]), scale=scale,
                     implementation=implementation).reshape(query.shape)


def _memories(context, bases, seen, ids):
    """What each window finds of those before, of the document in which the last one ended: sums [B, W, N, R] and counts [B, W, 1, 1]."""
    last = ids[:, :, -1]
    projected, weight = _project(context.reshape(-1, *context.shape[2:]), bases, (seen & (ids == last[..., None])).reshape(-1, ids.shape[2]))
    added = jax.tree.map(lambda x: x.sum(1).reshape(*ids.shape[:2], *x.shape[2:]), (projected, weight))
    whole = (ids[:, :, 0] == last) & (jnp.pad(last[:, :-1], ((0, 0), (1, 0))) == last) & (ids == last[..., None]).all(-1)
    return jax.tree.map(lambda x: jnp.pad(x[:, :-1], [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)]), _running(added, whole))


def _read(query, coefficients, bases, some, scale):
    """``softmax(scale q H^T) H`` with slots of their own for each query or of all: coefficients [B, T or 1, N, R], ``some`` [B, T or 1, 1, 1]."""
    scores = scale * coefficients * jnp.einsum("btnd,nrd->btnr", query.astype(bases.dtype), bases)
    weights = jax.nn.softmax(scores, axis=-1) * some
    return jnp.einsum("btnr,nrd->btnd", weights * coefficients, bases).astype(query.dtype)


def _project(context, bases, counted):
    """The coefficients of tokens [B, T, N, R], and how much each counts [B, T, 1, 1]."""
    projected = jnp.einsum("btnd,nrd->btnr", context.astype(bases.dtype), bases)
    return jnp.where(counted[..., None, None], projected, 0), counted.astype(bases.dtype)[..., None, None]


def _mean(total, count):
    return total / jnp.maximum(count, 1)


def _running(changes, goes_on):
    """``y_t = x_t + (y_(t-1) where it goes on)`` along axis 1 of a pytree of [B, T, ...]."""
    def combine(a, b):
        spread = lambda keep, x: keep.reshape(*keep.shape, *(1,) * (x.ndim - 2))
        return a[0] & b[0], jax.tree.map(lambda x, y: jnp.where(spread(b[0], y), x, 0) + y, a[1], b[1])

    changes = jax.tree.map(lambda x: x.astype(accumulator_dtype(jnp.result_type(x, jnp.float32))), changes)
    return lax.associative_scan(combine, (goes_on, changes), axis=1)[1]


def _goes_on(segment_ids, shape):
    """Whether a token is of the document of the one before."""
    if segment_ids is None:
        return jnp.ones(shape, bool)
    return jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)))


def _cut(x, size, mode="constant"):
    """[B, T, ...] in windows, [B, W, size, ...]."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)], mode=mode)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


class LavoState(NamedTuple):
    """What is remembered: the sum of the coefficients of all earlier windows and that of the current one [B, N, R], the tokens of the current
    window [B, w, N, D], and the position of the next token."""

    total: Float[Array, "B N R"]
    current: Float[Array, "B N R"]
    buffer: Float[Array, "B w N D"]
    next: Int[Array, ""]


def lavo_init(batch: int, heads: int, bases: int, size: int, *, window: int = 128, dtype=jnp.float32) -> LavoState:
    """The state before the first token, O(N (R + w D)) numbers for each of the batch whatever the length.

    Args:
      batch, heads, bases, size, window: B, N, R, D and w.
      dtype: of the context.

    >>> lavo_init(1, 2, 4, 8, window=16).buffer.shape
    (1, 16, 2, 8)
    """
    sums = jnp.zeros((batch, heads, bases), accumulator_dtype(dtype))
    return LavoState(sums, sums, jnp.zeros((batch, window, heads, size), dtype), jnp.zeros((), jnp.int32))


def lavo_step(state: LavoState, query: Float[Array, "B t N D"], context: Float[Array, "B t N D"], bases: Float[Array, "N R D"], *,
              rel_bias: Float[Array, "N w"] | None = None, dissect: bool = True, scale: float | None = None) -> tuple[LavoState, Float[Array, "B t N D"]]:
    """The next t tokens of causal :func:`lavo_attention`: ``(state, out)``.

    Args:
      state: from :func:`lavo_init` or the step before; its buffer has the size of the window.
      query, context, bases, rel_bias, dissect, scale: as there.

    Cost: O((w + R) D) a token and head.

    >>> import jax.numpy as jnp
    >>> state, out = lavo_step(lavo_init(1, 1, 2, 2, window=4), jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)), jnp.eye(2)[None])
    >>> out[0, 0, 0].tolist(), int(state.next)
    ([1.0, 1.0], 1)
    """
    query, context, _ = checks.check_query_key_value(query, context, context)
    (b, _, n, d), window = query.shape, state.buffer.shape[1]
    context, bases, counted = _check(context, bases, None)
    _check_rel_bias(rel_bias, n, window, True)
    scale = checks.check_scale(scale, d)
    projected, _ = _project(context, bases, counted)

    def token(state, new):
        q, c, p = new
        at = state.next % window
        fresh = at == 0  # the window before is complete
        total = jnp.where(fresh, state.total + state.current, state.total)
        current = jnp.where(fresh, 0, state.current) + p
        state = LavoState(total, current, lax.dynamic_update_slice_in_dim(state.buffer, c[:, None].astype(state.buffer.dtype), at, 1), state.next + 1)
        if not dissect:
            return state, _read(q[:, None], ((total + current) / state.next)[:, None], bases, True, scale)[:, 0]
        ids = jnp.zeros((b, 1, window), jnp.int32)
        count = jnp.full((b, 1, 1, 1), state.next - 1 - at, bases.dtype)
        one = jnp.ones((b, 1, 1), bool)
        out = _windows(q[:, None, None], state.buffer[:, None].astype(q.dtype), bases, (total[:, None], count), ids[..., :1], ids, one, ids == 0, at[None],
                       rel_bias, True, scale, None)
        return state, out[:, 0, 0]

    state, out = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, context, projected)))
    return state, jnp.moveaxis(out, 0, 1)


def _check_bases(bases):
    bases = checks.check_real("bases", bases, ranks=(3,))
    if not 1 <= bases.shape[1] <= bases.shape[2]:
        raise ValueError(f"bases: expected shape [N, R, D] with R from 1 to D, got {checks.describe(bases)}")
    return bases


def _check(context, bases, counted):
    """The context, the bases in the accumulator's dtype, and which tokens count."""
    context, bases = checks.check_real("context", context, ranks=(4,)), _check_bases(bases)
    if bases.shape[::2] != context.shape[2:]:
        raise ValueError(f"bases: expected shape [{context.shape[2]}, R, {context.shape[3]}] as context, got {checks.describe(bases)}")
    counted = jnp.ones(context.shape[:2], bool) if counted is None else checks.as_array("counted", counted, "booleans")
    if counted.shape != context.shape[:2] or counted.dtype != bool:
        raise ValueError(f"counted: expected booleans {list(context.shape[:2])}, got {checks.describe(counted)}")
    return context, bases.astype(accumulator_dtype(context.dtype)), counted


def _check_rel_bias(rel_bias, heads, window, causal):
    shape = (heads, window if causal else 2 * window - 1)
    if rel_bias is not None and checks.check_real("rel_bias", rel_bias, ranks=(2,)).shape != shape:
        raise ValueError(f"rel_bias: expected shape {list(shape)}, got {checks.describe(rel_bias)}")


class LavoMechanism(nnx.Module):
    """:func:`lavo_attention` with its directions and biases, as an :class:`attnx.Mechanism` whose values are its keys; made by :class:`LAVO`."""

    def __init__(self, num_heads: int, head_size: int, *, num_bases: int, window: int, dissect: bool, causal: bool, cross: bool, orth: str,
                 param_dtype=jnp.float32, rngs: nnx.Rngs):
        checks.check_choice("orth", orth, ("qr", "init-only"))
        checks.check_integer("num_bases", num_bases, least=1, most=head_size)
        checks.check_integer("window", window, least=1)
        self.window, self.dissect, self.causal, self.cross, self.orth = window, dissect, causal, cross, orth
        start = orthonormal(jax.random.normal(rngs.params(), (num_heads, num_bases, head_size), param_dtype))
        self.bases = nnx.Param(start.astype(param_dtype), **logical_axes("heads", None, "head_size"))
        near = dissect and not cross
        self.rel_bias = nnx.Param(jnp.zeros((num_heads, window if causal else 2 * window - 1), param_dtype),
                                  **logical_axes("heads", None)) if near else nnx.data(None)

    def directions(self) -> Float[Array, "N R D"]:
        """The orthonormal rows in use."""
        return orthonormal(self.bases[...]) if self.orth == "qr" else self.bases[...]

    def _options(self):
        return dict(rel_bias=None if self.rel_bias is None else self.rel_bias[...], dissect=self.dissect)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        return lavo_attention(query, key, self.directions(), window=self.window, causal=self.causal, cross=self.cross, key_positions=key_positions,
                              segment_ids=segment_ids, **self._options())

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        if not self.causal:
            raise NotImplementedError("causal=False: the memory is of the whole sequence, so there is no streaming form; use causal=True")
        return lavo_init(batch, kv_heads, self.bases.shape[1], key_size, window=self.window, dtype=dtype)

    def step(self, state, query, key, value) -> tuple[Any, Array]:
        """The next tokens."""
        return lavo_step(state, query, key, self.directions(), **self._options())


class LAVO(Attention):
    """Multi-head :func:`lavo_attention`: projections of queries and of one context vector a head, directions and biases.

    ::

        out = lavo_attention(x W_q, x W_c, orthonormal(bases), rel_bias) W_o

    Args:
      features, num_heads: D' and N, as for :class:`attnx.nn.Attention`, as are all options but the mechanism; W_c is its ``key``.
      num_bases: R, at most the head size.
      window: w, tokens of a window.
      dissect, causal, cross: as in :func:`lavo_attention`.
      orth: "qr" (directions made orthonormal in every call) or "init-only" (free after they are drawn).

    >>> layer = LAVO(32, 4, num_bases=4, window=8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 20, 32))).shape
    (1, 20, 32)
    """

    def __init__(self, features: int, num_heads: int, *, num_bases: int = 64, window: int = 128, dissect: bool = True, causal: bool = True, cross: bool = False,
                 orth: str = "qr", rngs: nnx.Rngs, **options):
        size = options.get("head_size") or features // num_heads
        mechanism = partial(LavoMechanism, num_heads, size, num_bases=num_bases, window=window, dissect=dissect, causal=causal, cross=cross, orth=orth,
                            param_dtype=options.get("param_dtype", jnp.float32))
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
        self.value = nnx.data(None)

    def _key_value(self, context):
        key = self._heads(self.key, context, "kv_heads")
        key = key if self.key_norm is None else self.key_norm(key)
        return key, key
