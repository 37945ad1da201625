"""Latte: attention through a few latent states instead of between all pairs of tokens.

Dolga, Maystre, Cobzarenco, Barber: "Latent Attention for Linear Time Transformers" (2024, arXiv 2402.17512):

    out_t = sum over l of  p(l | t)  sum over s of p(s | l) v_s,        p(l | t) = softmax_l(q_tl),     p(s | l) = softmax over positions s of k_sl

with two logits a token and latent in place of queries and keys: no dot product and no scale. Causal, p(s | l) is over s <= t, so its normaliser moves with t; the
state is one mean of values a latent, whatever the length, and a token costs the same at any. Causal it needs no positions.

One latent more, whose p(s | .) is softmax attention over the last w tokens, gives sharp attention nearby and cheap attention afar under one distribution p(l | t).
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import cache, checks
from attnx.core.attention import attention
from attnx.linear.softmax_over_positions import PositionSoftmaxState, channel_softmax, position_softmax, position_softmax_attention, position_softmax_init
from attnx.masks.documents import documents
from attnx.masks.local import sliding_window
from attnx.mechanism import pairs
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes
from attnx.positions.rotary import Rotary
from pallas_kernels.parts import part, static

_WINDOW_FORMS = {None: None, "parallel": "reference", "chunked": "blockwise", "pallas": "pallas"}


def latte(query: Float[Array, "B T N L"], key: Float[Array, "B S K L"], value: Float[Array, "B S K Hv"], *, is_causal: bool = True, **options):
    """Attention through L latents a head.

    ::

        out_t = sum over l of  softmax_l(q_tl)  sum over s of softmax_s(k_sl) v_s               s <= t where causal, in the softmax too

    Args:
      query: logits of latents given a token, [B, T, N, L].
      key: logits of tokens given a latent, [B, S, K, L], N a multiple of K.
      value: [B, S, K, Hv].
      is_causal: whether token t sees tokens up to itself only.
      **options: key_positions, segment_ids, initial_state, return_state, chunk_size, implementation, axis_name as in :func:`attnx.linear.position_softmax_attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype, with ``return_state`` a pair with the state. Causal, the first token finds its own value.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T L (C + Hv)) time a head with chunks of C tokens, O(T (L + Hv)) memory.

    Source: Rares Dolga, Lucas Maystre, Marius Cobzarenco, David Barber, "Latent Attention for Linear Time Transformers", 2024, arXiv 2402.17512.

    >>> import jax.numpy as jnp
    >>> value = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    >>> latte(jnp.ones((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2)), value)[0, :, 0, 0].round(3)
    Array([1., 2., 4.], dtype=float32)
    """
    return position_softmax_attention(channel_softmax(query), key, value, is_causal=is_causal, **options)


def latte_init(batch: int, heads: int, latents: int, value_size: int, *, dtype=jnp.float32) -> PositionSoftmaxState:
    """The state of causal :func:`latte` before the first token: [B, K, L, Hv] and [B, K, L], of the same size after any number of tokens.

    Args:
      batch, heads, latents, value_size: B, K, L and Hv.
      dtype: float32, or float64 for such inputs.

    >>> latte_init(2, 4, 16, 8).log_total.shape
    (2, 4, 16)
    """
    return position_softmax_init(batch, heads, latents, value_size, dtype=dtype)


def latte_step(state: PositionSoftmaxState, query: Float[Array, "B t N L"], key: Float[Array, "B t K L"], value: Float[Array, "B t K Hv"],
               **options) -> tuple[PositionSoftmaxState, Float[Array, "B t N Hv"]]:
    """The next t tokens of causal :func:`latte`: ``(state, out)``.

    Args:
      state: of :func:`latte_init` or the step before.
      query, key, value: as there, of t tokens: one to decode, many to prefill.
      **options: chunk_size, implementation as there.

    Cost: O(L Hv) a token and head, whatever came before.

    >>> import jax.numpy as jnp
    >>> state, x = latte_init(1, 1, 1, 1), jnp.ones((1, 1, 1, 1))
    >>> for number in (1.0, 3.0):
    ...     state, out = latte_step(state, x, x, number * x)
    >>> round(out.item(), 3)
    2.0
    """
    out, state = latte(query, key, value, initial_state=state, return_state=True, **options)
    return state, out


def latte_window(query_logits: Float[Array, "B T N L+1"], key_logits: Float[Array, "B T K L"], query: Float[Array, "B T N H"], key: Float[Array, "B T K H"],
                 value: Float[Array, "B T K Hv"], *, window: int, positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                 scale: float | None = None, implementation: str | None = None) -> Float[Array, "B T N Hv"]:
    """Causal attention through L latents and, as latent 0, through softmax attention to the last ``window`` tokens.

    ::

        out_t = p_t0 sum over t - w < s <= t of softmax_s(scale q_t . k_s) v_s  +  sum over l >= 1 of p_tl sum over s <= t of softmax_s(logits_sl) v_s
        p_t   = softmax(query_logits_t)  over all L + 1

    Args:
      query_logits: [B, T, N, L + 1], latent 0 first.
      key_logits: [B, T, K, L], N a multiple of K.
      query, key: [B, T, N, H] and [B, T, K, H], of the window alone; with positions in them where these matter.
      value: [B, T, K, Hv], of both.
      window: w, a token's own included.
      positions: int32 [T] or [B, T]; -1 is padding, unseen.
      segment_ids: int32 [B, T], documents that do not see each other.
      scale: of the window's dot products, 1 / sqrt(H) by default.
      implementation: of both halves: 'parallel' (all pairs), 'chunked', 'pallas' or None.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T L (C + Hv) + T w (H + Hv)) time a head with chunks of C tokens, O(T) memory.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 3, 1, 2))
    >>> sharp = jnp.array([30.0, 0.0, 0.0]) * jnp.ones((1, 3, 1, 3))  # all of p on the window
    >>> latte_window(sharp, x, x, x, jnp.arange(3.0).reshape(1, 3, 1, 1), window=2)[0, :, 0, 0].round(2)
    Array([0. , 0.5, 1.5], dtype=float32)
    """
    _check_logits(query_logits, key_logits, query)
    checks.check_choice("implementation", implementation, tuple(filter(None, _WINDOW_FORMS)))
    mask = sliding_window(window)
    if segment_ids is not None:
        mask &= documents(segment_ids)
    p = channel_softmax(query_logits)
    near = attention(query, key, value, mask=mask, scale=scale, query_positions=positions, key_positions=positions, implementation=_WINDOW_FORMS[implementation])
    far = position_softmax_attention(p[..., 1:], key_logits, value, key_positions=positions, segment_ids=segment_ids, implementation=implementation)
    return p[..., :1] * near + far


def _check_logits(query_logits, key_logits, query):
    for name, x in (("query_logits", query_logits), ("key_logits", key_logits)):
        checks.check_real(name, x, ranks=(4,))
    if query_logits.shape != (*query.shape[:3], key_logits.shape[3] + 1):
        raise ValueError(f"query_logits: expected shape {[*query.shape[:3], key_logits.shape[3] + 1]}, one latent more than key_logits has, "
                         f"got {checks.describe(query_logits)}")


class LatteAttention(Attention):
    """Multi-head :func:`latte`: projections to logits in place of queries and keys.

    ::

        out = latte(x W_q, x W_k, x W_v) W_o                   W_q, W_k: D -> L over all heads

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism.
      latents: L of all heads together, a multiple of ``num_heads``.
      is_causal, implementation: as in :func:`latte`. Not causal it also reads a context.

    >>> layer = LatteAttention(32, 4, latents=16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, latents: int, is_causal: bool = True, implementation: str | None = None, rngs: nnx.Rngs, **options):
        options = {"head_size": _per_head(latents, num_heads), "value_size": features // num_heads} | options
        super().__init__(features, num_heads, mechanism=position_softmax(is_causal=is_causal, implementation=implementation), rngs=rngs, **options)


def _per_head(latents, heads):
    if checks.check_integer("latents", latents, least=1) % heads:
        raise ValueError(f"latents: expected a multiple of num_heads = {heads}, got {latents}")
    return latents // heads


class LatteWindowState(NamedTuple):
    """A cache of the window's tokens, and the means of the latents."""

    window: cache.KVCache
    latents: PositionSoftmaxState


@part
class LatteWindow:
    """:func:`latte_window` as an :class:`attnx.Mechanism` that is also handed the logits; made by :class:`LatteWindowAttention`."""

    window: int = static(default=1)
    latents: int = static(default=1)
    scale: float | None = static(default=None)
    implementation: str | None = static(default=None)

    def __call__(self, query, key, value, *, query_logits, key_logits, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        return latte_window(query_logits, key_logits, query, key, value, window=self.window, positions=key_positions, segment_ids=segment_ids, scale=self.scale,
                            implementation=self.implementation)

    def _near(self):
        return pairs(mask=sliding_window(self.window), scale=self.scale)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        return LatteWindowState(self._near().init(batch, max_length, kv_heads, key_size, value_size, dtype),
                                latte_init(batch, kv_heads, self.latents, value_size, dtype=jnp.promote_types(dtype, jnp.float32)))

    def step(self, state, query, key, value, *, query_logits, key_logits) -> tuple[LatteWindowState, Array]:
        """The next tokens."""
        p = channel_softmax(query_logits)
        window, near = self._near().step(state.window, query, key, value)
        far, latents = position_softmax_attention(p[..., 1:], key_logits, value, initial_state=state.latents, return_state=True)
        return LatteWindowState(window, latents), p[..., :1] * near + far


class LatteWindowAttention(Attention):
    """Multi-head :func:`latte_window`, causal: one distribution over latents and a window of softmax attention.

    ::

        out = latte_window(x W_lq, x W_lk, position(x W_q, x W_k), x W_v) W_o            W_lq: D -> L + N,  W_lk: D -> L over all heads

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism.
      latents: L of all heads together, a multiple of ``num_heads``.
      window: w, tokens.
      position: of the window's queries and keys alone; rotary by default, None for none.
      scale, implementation: as in :func:`latte_window`.

    >>> layer = LatteWindowAttention(32, 4, latents=16, window=4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, latents: int, window: int, position: Any = Rotary(), scale: float | None = None,
                 implementation: str | None = None, rngs: nnx.Rngs, **options):
        size = _per_head(latents, num_heads)
        checks.check_integer("window", window, least=1)
        super().__init__(features, num_heads, mechanism=LatteWindow(window, size, scale, implementation), position=position, rngs=rngs, **options)
        dense = partial(nnx.LinearGeneral, features, use_bias=False, dtype=self.dtype, param_dtype=options.get("param_dtype", jnp.float32), rngs=rngs)
        self.latent_query = dense((num_heads, size + 1), kernel_metadata=logical_axes("embed", "heads", None))
        self.latent_key = dense((self.num_kv_heads, size), kernel_metadata=logical_axes("embed", "kv_heads", None))

    def extras(self, x):
        return {"query_logits": self._heads(self.latent_query, x, "heads"), "key_logits": self._heads(self.latent_key, x, "kv_heads")}
