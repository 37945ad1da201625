"""Linear log-normal attention: linear attention whose weights have the distribution that softmax gives them.

Nahshan, Kampeas, Haleva: "Linear Log-Normal Attention with Unbiased Concentration" (ICLR 2024, arXiv 2311.13541):

    w_ij = phi_q(q_i) . phi_k(k_j) / sum over j,          phi_q(q) = e^(alpha q),   phi_k(k) = e^(beta k)       elementwise

Softmax weights of normal queries and keys (deviations sigma_q, sigma_k, scores over sqrt(H)) are log-normal with log-variance sigma_q^2 sigma_k^2; those above have
about a (alpha^2 sigma_q^2 + beta^2 sigma_k^2) + b. :func:`moment_match` chooses alpha and beta so that both are the same, hence also entropy and spectral gap. The
paper's layer takes the mean of this and of softmax attention within blocks of H tokens (LLN + Diag), which sees what is near as it is.

The exponents are shifted by their largest value, that of each query and that of all keys so far, which cancels; the state is scaled along by the decays of the
recurrent engine, so no token depends on a later one even by underflow. What does is the choice of alpha and beta by the deviations of a whole batch, as in the
released code: kept deviations are what a decoder needs.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks, linear
from attnx.core.attention import attention
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.masks.strided import within_blocks
from attnx.mechanism import pairs, skipped
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes
from attnx.nn.frozen import Constant
from pallas_kernels.tile import accumulator_dtype

A, B = 0.14855178144710912, -0.35487039130661086
"""Slope and offset of the log-variance, as released; they fit heads of size 64. See :func:`fit_moment_constants`."""

MODES = {"average": 0, "learnable_scale": 2, "learnable_ratio": 1}
"""Ways of mixing, and how many arrays each learns."""


def moment_match(sigma_query, sigma_key, a: float = A, b: float = B) -> tuple[Array, Array]:
    """alpha and beta that give the weights the log-variance of softmax attention.

    ::

        alpha sigma_q = beta sigma_k = sqrt((sigma_q^2 sigma_k^2 - b) / (2 a))

    Args:
      sigma_query, sigma_key: deviations, real numbers or arrays of one shape.
      a, b: slope and offset, see :func:`fit_moment_constants`.

    Returns:
      ``(alpha, beta)`` of that shape.

    >>> alpha, beta = moment_match(1.0, 2.0)
    >>> round(float(alpha), 3), round(float(beta), 3)
    (3.829, 1.914)
    """
    sigma_query, sigma_key = (jnp.maximum(checks.check_real(name, x), 1e-6) for name, x in (("sigma_query", sigma_query), ("sigma_key", sigma_key)))
    both = jnp.sqrt(jnp.maximum(jnp.square(sigma_query * sigma_key) - b, 1e-6) / (2 * a))
    return both / sigma_query, both / sigma_key


@functools.cache
def fit_moment_constants(head_size: int, *, samples: int = 512, seed: int = 0) -> tuple[float, float]:
    """Slope a and offset b of the log-variance of the weights for heads of a size, by least squares on normal queries and keys.

    Args:
      head_size: H.
      samples: queries and keys that are drawn.
      seed: of the draws.

    Returns:
      ``(a, b)``: the variance of the logarithms of weights is about a (alpha^2 sigma_q^2 + beta^2 sigma_k^2) + b where both terms are equal, from 4 to 16 together.

    Cost: O(samples^2 H) on the host, once for each argument.

    >>> a, b = fit_moment_constants(64)
    >>> 0.1 < a < 0.2, b < 0
    (True, True)
    """
    checks.check_integer("head_size", head_size, least=1)
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, samples, head_size))
    total = np.linspace(4.0, 16.0, 7)
    weights = [np.exp(t * q) @ np.exp(t * k).T for t in np.sqrt(total / 2)]
    found = [np.log(w / w.sum(1, keepdims=True)).var() for w in weights]
    slope, offset = np.polyfit(total, found, 1)
    return float(slope), float(offset)


def _expand(name, x, heads):
    """A number or one a head, to broadcast against [B, T, heads, H]."""
    x = checks.check_real(name, x, ranks=(0, 1))
    if x.ndim and x.shape != (heads,):
        raise ValueError(f"{name}: expected a number or shape {[heads]}, one a head, got {checks.describe(x)}")
    return x[..., None]


def _largest_so_far(x, start, anew):
    """The running maximum of x [B, T, K] along T, from ``start`` [B, K], anew where ``anew`` [B, T] says."""
    x = x.at[:, 0].max(start) if x.shape[1] else x

    def combine(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    return jax.lax.associative_scan(combine, (jnp.broadcast_to(anew[..., None], x.shape), x), axis=1)[1]


def _features(query, key, alpha, beta, start, seen, anew, is_causal):
    """Features of queries and keys, the log-decays that rescale the state (or None), and the largest exponent after the last key."""
    wide = accumulator_dtype(query.dtype)
    query = query.astype(wide) * _expand("alpha", alpha, query.shape[2]).astype(wide)
    key = key.astype(wide) * _expand("beta", beta, key.shape[2]).astype(wide)
    query = jnp.exp(query - jax.lax.stop_gradient(jnp.max(query, axis=-1, keepdims=True)))
    highest = jnp.where(seen[..., None], jax.lax.stop_gradient(jnp.max(key, axis=-1)), -jnp.inf)  # [B, S, K]
    if not is_causal:
        top, log_decay, last = jnp.max(highest, axis=1, keepdims=True, initial=-jnp.inf), None, start
    else:
        top = _largest_so_far(highest, start, anew)
        before = jnp.concatenate([start[:, None], top[:, :-1]], axis=1)
        last = top[:, -1] if key.shape[1] else start
        log_decay = jnp.where(jnp.isfinite(before), jnp.minimum(jnp.where(jnp.isfinite(before), before, 0) - top, 0), 0)
    exponent = jnp.where(seen[..., None, None], key - top[..., None], 0)
    return query, jnp.exp(exponent), log_decay, last


def lln_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], alpha, beta, *, is_causal: bool = True,
                  key_mask: Bool[Array, "B S"] | None = None, segment_ids: Int[Array, "B T"] | None = None, chunk_size: int | None = None,
                  implementation: str | None = None):
    """Linear attention with exponential features.

    ::

        out_i = sum over j of  (e^(alpha q_i) . e^(beta k_j)) v_j  /  sum over j of  e^(alpha q_i) . e^(beta k_j)

    Args:
      query: [B, T, N, H], as projected, without a scale.
      key: [B, S, K, H], N a multiple of K; S = T where causal.
      value: [B, S, K, Hv].
      alpha: real, or [N], one a head.
      beta: real, or [K]. Both from :func:`moment_match`.
      is_causal: whether a token sees nothing later than itself.
      key_mask: booleans [B, S], the keys that are there.
      segment_ids: int32 [B, T], S = T: documents that do not see each other; tokens of negative ids are padding.
      chunk_size, implementation: as for :func:`attnx.linear_attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype; 0 where there is nothing to attend to.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T (C (H + Hv) + H Hv)) time a head, C tokens a chunk, and O(T (H + Hv)) memory.

    Source: Yury Nahshan, Joseph Kampeas, Emir Haleva, "Linear Log-Normal Attention with Unbiased Concentration", 2024, arXiv 2311.13541.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
    >>> means = lln_attention(q, k, v, 0.0, 0.0)  # all weights alike
    >>> bool(jnp.allclose(means[:, -1], v.mean(1), atol=1e-6))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    seen = jnp.ones(key.shape[:2], bool) if key_mask is None else checks.as_array("key_mask", key_mask, "booleans")
    anew = jnp.zeros(key.shape[:2], bool)
    if segment_ids is not None:
        segment_ids = checks.check_integers("segment_ids", segment_ids, ranks=(2,))
    if seen.shape != anew.shape or (segment_ids is not None and segment_ids.shape != anew.shape):
        name, x = ("key_mask", seen) if seen.shape != anew.shape else ("segment_ids", segment_ids)
        raise ValueError(f"{name}: expected shape {list(anew.shape)}, got {checks.describe(x)}")
    if segment_ids is not None:
        seen, anew = seen & (segment_ids >= 0), linear.restarts(segment_ids)
    start = jnp.full((key.shape[0], key.shape[2]), -jnp.inf, accumulator_dtype(query.dtype))
    q, k, log_decay, _ = _features(query, key, alpha, beta, start, seen, anew, is_causal)
    return linear.linear_attention(q.astype(query.dtype), k.astype(query.dtype), value, log_decay=log_decay, normalize=True, is_causal=is_causal, key_mask=key_mask,
                                   segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)


class LLNState(NamedTuple):
    """Sums of keys' features times values and of keys' features, and the largest exponent so far, by which both are scaled, [B, K]."""

    sums: linear.LinearState
    top: Float[Array, "B K"]


def lln_init(batch: int, heads: int, key_size: int, value_size: int, *, dtype=jnp.float32) -> LLNState:
    """The state before the first token: K (H (Hv + 1) + 1) numbers for each of the batch, float32 or wider, whatever comes.

    >>> lln_init(1, 2, 4, 8).sums.memory.shape
    (1, 2, 4, 8)
    """
    wide = accumulator_dtype(dtype)
    return LLNState(linear.init(batch, heads, key_size, value_size, normalize=True, dtype=wide), jnp.full((batch, heads), -jnp.inf, wide))


def lln_step(state: LLNState, query: Float[Array, "B t N H"], key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"], alpha, beta, **options):
    """The next t tokens of causal :func:`lln_attention`: ``(state, out [B, t, N, Hv])``.

    Args:
      state: from :func:`lln_init` or the step before.
      query, key, value, alpha, beta: as there; alpha and beta the same in all steps.
      **options: chunk_size, implementation as there.

    Cost: O(H Hv) a token and head.

    >>> import jax.numpy as jnp
    >>> state, x = lln_init(1, 1, 1, 1), jnp.ones((1, 1, 1, 1))
    >>> state, out = lln_step(state, x, x, x, 1.0, 1.0)
    >>> state, out = lln_step(state, x, 100 * x, 3 * x, 1.0, 1.0)  # a large key
    >>> out.item()
    3.0
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    seen = jnp.ones(key.shape[:2], bool)
    q, k, log_decay, top = _features(query, key, alpha, beta, state.top, seen, ~seen, True)
    sums, out = linear.step(state.sums, q.astype(query.dtype), k.astype(query.dtype), value, log_decay=log_decay, **options)
    return LLNState(sums, top), out


def block_diag_attention(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], *, block: int | None = None,
                         is_causal: bool = True, key_mask: Bool[Array, "B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, **options):
    """Softmax attention within consecutive blocks of tokens, the last of them shorter where the length demands.

    Args:
      query, key, value: [B, T, N, H], [B, T, K, H], [B, T, K, Hv].
      block: tokens of a block, H by default.
      is_causal, key_mask, segment_ids: as in :func:`lln_attention`.
      **options: scale, implementation, block_sizes of :func:`attnx.attention`.

    Returns:
      [B, T, N, Hv]; 0 where there is nothing to attend to.

    Cost: O(T block (H + Hv)) a head.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> whole = attnx.attention(q, k, v, mask=attnx.masks.causal())
    >>> bool(jnp.allclose(block_diag_attention(q, k, v), whole, atol=1e-6))  # one block of eight
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    length = query.shape[1]
    if key.shape[1] != length:
        raise ValueError(f"key: expected the query's length {length}, got {checks.describe(key)}")
    mask = _block_mask(block, query.shape[3], is_causal)
    if segment_ids is not None:
        segment_ids = checks.check_integers("segment_ids", segment_ids, ranks=(2,))
        mask &= documents(segment_ids)
        key_mask = segment_ids >= 0 if key_mask is None else key_mask & (segment_ids >= 0)
    positions = None if key_mask is None else jnp.where(key_mask, jnp.arange(length, dtype=jnp.int32), -1)
    out = attention(query, key, value, mask=mask, key_positions=positions, **options)
    return out if segment_ids is None else jnp.where((segment_ids >= 0)[..., None, None], out, 0)


def _block_mask(block, size, is_causal):
    block = max(size, 1) if block is None else checks.check_integer("block", block, least=1)
    return causal() & within_blocks(block) if is_causal else within_blocks(block)


def lln_diag(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], alpha, beta, *, mode: str = "average",
             mix: tuple[Array, ...] = (), block: int | None = None, scale: float | None = None, implementation: str | None = None, chunk_size: int | None = None,
             **options) -> Float[Array, "B T N Hv"]:
    """:func:`lln_attention` and :func:`block_diag_attention`, mixed.

    ::

        average:           (lln + diag) / 2
        learnable_scale:   r lln + p diag
        learnable_ratio:   r lln + (1 - r) diag

    Args:
      query, key, value, alpha, beta: as for :func:`lln_attention`.
      mode: one of the three.
      mix: () for "average", (r, p) for "learnable_scale", (r,) for "learnable_ratio"; real [N, Hv], 0.5 to begin with.
      block, scale: of the blocks.
      implementation, chunk_size: of :func:`lln_attention`; blocks are evaluated as is best.
      **options: is_causal, key_mask, segment_ids of both.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
    >>> lln_diag(q, k, v, 1.0, 1.0).shape
    (1, 6, 2, 4)
    """
    everywhere = lln_attention(query, key, value, alpha, beta, implementation=implementation, chunk_size=chunk_size, **options)
    return _mixed(everywhere, block_diag_attention(query, key, value, block=block, scale=scale, **options), mode, mix)


def _mixed(everywhere, near, mode, mix):
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {tuple(MODES)}, got {mode!r}")
    count, heads = MODES[mode], everywhere.shape[2:]
    if len(mix) != count or any(x.shape != heads for x in mix):
        raise ValueError(f"mix: expected {count} arrays {list(heads)} with mode={mode!r}, got {[checks.describe(x) for x in mix]}")
    r, p = (0.5, 0.5) if not mix else mix if count == 2 else (mix[0], 1 - mix[0])
    return (r * everywhere + p * near).astype(everywhere.dtype)


class LLNMechanism(nnx.Module):
    """:func:`lln_attention` or :func:`lln_diag` with the deviations of queries and keys, as an :class:`attnx.Mechanism`; made by :class:`LLNAttention`."""

    def __init__(self, num_heads: int, num_kv_heads: int, value_size: int, *, head_size: int, mode: str | None, block: int | None, statistics: str, is_causal: bool,
                 constants: tuple[float, float], param_dtype=jnp.float32, rngs: nnx.Rngs | None = None):
        del rngs  # nothing is random
        self.mode, self.block, self.statistics, self.is_causal, self.constants = mode, block or head_size, statistics, is_causal, constants
        self.sigma_query, self.sigma_key = Constant(jnp.ones(num_kv_heads)), Constant(jnp.ones(num_kv_heads))
        half = lambda: nnx.Param(jnp.full((num_heads, value_size), 0.5, param_dtype), **logical_axes("heads", "head_size"))
        self.mix = nnx.List([half() for _ in range(MODES.get(mode, 0))])

    def deviations(self, query, key, kind: str) -> tuple[Array, Array]:
        """Of queries and of keys by key-value head, [K], or, with kind 'batch', of all, []."""
        wide = accumulator_dtype(query.dtype)
        axes = (0, 1, 2, 3, 4) if kind == "batch" else (0, 1, 3, 4)
        by_group = lambda x: x.reshape(*x.shape[:2], key.shape[2], -1, x.shape[3]).astype(wide)
        return tuple(jax.lax.stop_gradient(jnp.std(by_group(x), axis=axes)) for x in (query, key))

    def _temperatures(self, query, key):
        """alpha, beta."""
        kept = self.sigma_query[...], self.sigma_key[...]
        alpha, beta = moment_match(*(kept if self.statistics == "frozen" else self.deviations(query, key, self.statistics)), *self.constants)
        return jnp.repeat(alpha, query.shape[2] // key.shape[2]) if alpha.ndim else alpha, beta

    def _near(self):
        return pairs(mask=_block_mask(self.block, 1, self.is_causal))

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        told = skipped(query, key, query_positions, key_positions, segment_ids, is_causal=self.is_causal)
        out = lln_attention(query, key, value, *self._temperatures(query, key), is_causal=self.is_causal, **told)
        if self.mode is None:
            return out
        near = self._near()(query, key, value, query_positions=query_positions, key_positions=key_positions, segment_ids=segment_ids)
        return _mixed(out, near, self.mode, tuple(x[...] for x in self.mix))

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        if not self.is_causal or self.statistics != "frozen":
            raise NotImplementedError(f"is_causal={self.is_causal}, statistics={self.statistics!r}: what depends on all tokens has no streaming form; "
                                      "use is_causal=True and statistics='frozen'")
        near = None if self.mode is None else self._near().init(batch, max_length, kv_heads, key_size, value_size, dtype)
        return lln_init(batch, kv_heads, key_size, value_size, dtype=dtype), near

    def step(self, state, query, key, value) -> tuple[Any, Array]:
        """The next tokens."""
        state, near = state
        state, out = lln_step(state, query, key, value, *self._temperatures(query, key))
        if self.mode is None:
            return (state, near), out
        near, beside = self._near().step(near, query, key, value)
        return (state, near), _mixed(out, beside, self.mode, tuple(x[...] for x in self.mix))


class LLNAttention(Attention):
    """Multi-head :func:`lln_diag`, or :func:`lln_attention` alone.

    Args:
      features, num_heads: as for :class:`attnx.nn.Attention`, as are all options but the mechanism.
      mode: "average", "learnable_scale", "learnable_ratio", or None for no blocks.
      block: tokens of a block, the head size by default.
      statistics: by which deviations alpha and beta are chosen: "frozen" (kept for each key-value head, 1 until :meth:`observe` sets them, which is right where
        ``qk_norm="rms"``), "head" (those of the call, a head) or "batch" (those of the call, all heads together, as released). The latter two see all tokens of the
        batch, padding and future ones too, and do not stream.
      constants: a and b of :func:`moment_match`.
      is_causal: for a decoder (True) or an encoder.

    >>> layer = LLNAttention(32, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, mode: str | None = "average", block: int | None = None, statistics: str = "frozen",
                 constants: tuple[float, float] = (A, B), is_causal: bool = True, rngs: nnx.Rngs, **options):
        checks.check_choice("mode", mode, tuple(MODES))
        if statistics not in ("frozen", "head", "batch"):
            raise ValueError(f"statistics: expected 'frozen', 'head' or 'batch', got {statistics!r}")
        size = options.get("head_size") or features // num_heads
        mechanism = partial(LLNMechanism, num_heads, options.get("num_kv_heads") or num_heads, options.get("value_size") or size, head_size=size, mode=mode, block=block,
                            statistics=statistics, is_causal=is_causal, constants=constants, param_dtype=options.get("param_dtype", jnp.float32))
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)

    def observe(self, x: Float[Array, "B T D"], rate: float = 1.0) -> None:
        """Moves the kept deviations towards those of the queries and keys of x: ``sigma <- (1 - rate) sigma + rate deviation``."""
        query, key = self._query(x), self._key_value(x)[0]
        kept = self.mechanism.sigma_query, self.mechanism.sigma_key
        for sigma, found in zip(kept, self.mechanism.deviations(query, key, "head")):
            sigma[...] = (1 - rate) * sigma[...] + rate * found.astype(sigma[...].dtype)
