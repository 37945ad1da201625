"""The ``pallas`` execution of the recurrent engine: chunks on fused TPU kernels (:mod:`pallas_kernels.linear`)."""

from typing import Any

import jax.numpy as jnp

from attnx.core import fused
from attnx.core import linear_forms as forms
from attnx.core.compat import vary, varying_axes
from pallas_kernels import linear as kernels

CHUNK = 128  # the least, as many tokens as a vector has lanes


def check_kernel(dtype, size: int, is_causal: bool, chunk_size: int | None) -> Any:
    """How the kernels are to be run, ``interpret`` of ``pallas_call``, if they can serve the call."""
    interpret, platform = fused.target()
    lacks = "implementation='pallas': the kernels of the recurrent engine"
    if platform != "tpu":
        raise NotImplementedError(f"{lacks} are for TPU, the backend is {platform!r}; use 'chunked' or None (attnx.core.fused.forced() emulates them)")
    if not is_causal:
        raise NotImplementedError(f"{lacks} read tokens in order and need is_causal=True; 'chunked' serves, where every query reads one sum over all keys")
    if interpret is False and dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{lacks} compute in float32 and bfloat16, not in {dtype}; use 'chunked'")
    if interpret is False and size == 1:
        raise NotImplementedError(f"{lacks} take no keys of size 1; use 'chunked'")
    if chunk_size is not None and chunk_size < CHUNK:
        raise NotImplementedError(f"{lacks} want a chunk_size of at least {CHUNK}, got {chunk_size}; leave it out, or use 'chunked'")
    return interpret


def attend(query, key, value, log_decay, state, *, normalize: bool, scale: float, floor: float | None, chunk_size: int | None, interpret: Any):
    """A form (:mod:`attnx.core.linear_forms`) that scales and divides by itself: ``(out [B, T, N, Hv] in the query's dtype, state)``.

    Args:
      query, key: features; a key of zeros adds nothing.
      value: [B, T, K, Hv], without a column of ones.
      log_decay: [B or 1, T or 1, M or 1, 1 or H], or None.
      state: [B, M, H, Hv] or, with ``normalize``, [B, M, H, Hv + 1], whose last column is the normaliser.
    """
    (b, t, n, h), m = query.shape, state.shape[1]
    if not query.size:  # states alone
        value = jnp.concatenate([value, jnp.ones_like(value, shape=(*value.shape[:3], 1))], axis=-1) if normalize else value
        out, state = forms.chunked(query, key, value, log_decay, state, features=lambda x: x, chunk_size=None)
        return jnp.zeros((b, t, n, value.shape[3] - normalize), query.dtype), state
    plan = kernels.choose_plan(query, value, m, fused.default_sizes("linear", "tpu", query, value), chunk_size, scale=scale, floor=floor, interpret=interpret)

    def by_head(x):  # [B, T, heads, ..] -> [B, heads, .., padded T, .]
        x = jnp.pad(x, ((0, 0), (0, -t % plan.slab)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x, 1, -2)

    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (b, t, m, log_decay.shape[3]))
        log_decay = by_head(log_decay) if log_decay.shape[3] > 1 else jnp.swapaxes(by_head(log_decay), 2, 3)
    tokens = kernels.Tokens(by_head(query.reshape(b, t, m, n // m, h)), by_head(key), by_head(value), log_decay)
    state = kernels.State(state[..., :-1], state[:, :, None, :, -1]) if normalize else kernels.State(state, None)
    tokens, state = vary((tokens, state), varying_axes(tokens, state))
    out, (memory, normalizer) = kernels.attend(plan, tokens, state)
    state = jnp.concatenate([memory, jnp.swapaxes(normalizer, 2, 3)], axis=-1) if normalize else memory
    return jnp.moveaxis(out, 3, 1)[:, :t].reshape(b, t, n, out.shape[-1]), state
