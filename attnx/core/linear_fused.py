"""The ``pallas`` execution of the recurrent engine: chunks on fused kernels (:mod:`pallas_kernels.linear`), for TPU and for GPU."""

from typing import Any

import jax
import jax.numpy as jnp

from attnx.core import fused
from attnx.core import linear_forms as forms
from attnx.core.compat import vary, varying_axes
from pallas_kernels import linear, native

CHUNK = {"tpu": 128, "gpu": 16}  # tokens, at the least: as many as a vector has lanes, or as a matrix product has rows
LARGEST = 512  # size of keys on a GPU


def choose_kernel(implementation: str | None, query, value, log_decay, size: int, is_causal: bool, chunk_size: int | None) -> tuple[str, Any]:
    """The implementation, the one that is named or else what the table of sizes has for the device at hand, and what :func:`check_kernel` says of it."""
    if implementation is None and fused.target() == (False, "gpu") and native.installed():
        implementation = fused.default_sizes("linear language", "gpu", query, value)[0 if log_decay is None else 1 if log_decay.ndim < 4 else 2]
    implementation = implementation or "pallas"
    return implementation, check_kernel(query.dtype, size, is_causal, chunk_size, implementation)


def check_kernel(dtype, size: int, is_causal: bool, chunk_size: int | None, language: str = "pallas") -> tuple[Any, str]:
    """How the kernels are to be run, ``interpret`` of ``pallas_call``, and on what platform, if they can serve the call."""
    interpret, platform = fused.target()
    lacks = f"implementation={language!r}: the kernels of the recurrent engine"
    if language == "triton":
        fused.check_native(language, "the kernels of the recurrent engine")
    if platform not in CHUNK:
        raise NotImplementedError(f"{lacks} are for TPU and GPU, the backend is {platform!r}; use 'chunked' or None (attnx.core.fused.forced() emulates them)")
    if not is_causal:
        raise NotImplementedError(f"{lacks} read tokens in order and need is_causal=True; 'chunked' serves, where every query reads one sum over all keys")
    if interpret is False and dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{lacks} compute in float32 and bfloat16, not in {dtype}; use 'chunked'")
    if interpret is False and platform == "tpu" and size == 1:
        raise NotImplementedError(f"{lacks} take no keys of size 1; use 'chunked'")
    if platform == "gpu" and size > LARGEST:
        raise NotImplementedError(f"{lacks} hold states of keys of size {LARGEST} at the most in a GPU's registers, got {size}; use 'chunked'")
    if chunk_size is not None and chunk_size < CHUNK[platform]:
        raise NotImplementedError(f"{lacks} want a chunk_size of at least {CHUNK[platform]}, got {chunk_size}; leave it out, or use 'chunked'")
    return interpret, platform


def attend(query, key, value, log_decay, state, *, normalize: bool, scale: float, floor: float | None, chunk_size: int | None, kernels: tuple[Any, str],
           language: str = "pallas"):
    """A form (:mod:`attnx.core.linear_forms`) that scales and divides by itself: ``(out [B, T, N, Hv] in the query's dtype, state)``.

    Args:
      query, key: features; a key of zeros adds nothing.
      value: [B, T, K, Hv], without a column of ones.
      log_decay: [B or 1, T or 1, M or 1, 1 or H], or None.
      state: [B, M, H, Hv] or, with ``normalize``, [B, M, H, Hv + 1], whose last column is the normaliser.
      kernels: what :func:`check_kernel` says.
      language: "pallas", or "triton" for the forward pass on a GPU in Triton itself.
    """
    (b, t, n, _), m = query.shape, state.shape[1]
    if not query.size:  # states alone
        value = jnp.concatenate([value, jnp.ones_like(value, shape=(*value.shape[:3], 1))], axis=-1) if normalize else value
        out, state = forms.chunked(query, key, value, log_decay, state, features=lambda x: x, chunk_size=None)
        return jnp.zeros((b, t, n, value.shape[3] - normalize), query.dtype), state
    interpret, platform = kernels
    options = dict(scale=scale, floor=floor, interpret=interpret) | (dict(language=language) if platform == "gpu" else {})
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (b, t, m, log_decay.shape[3]))
    form = _on_tpu if platform == "tpu" else _on_gpu
    state = linear.State(state[..., :-1], state[:, :, None, :, -1]) if normalize else linear.State(state, None)
    out, (memory, normalizer) = form(query, key, value, log_decay, state, chunk_size, options)
    return out[:, :t], jnp.concatenate([memory, jnp.swapaxes(normalizer, 2, 3)], axis=-1) if normalize else memory


def _on_tpu(query, key, value, log_decay, state, chunk_size, options):
    (b, t, n, h), m = query.shape, state.memory.shape[1]
    plan = linear.tpu.choose_plan(query, value, m, fused.default_sizes("linear", "tpu", query, value), chunk_size, **options)

    def by_head(x):  # [B, T, heads, ..] -> [B, heads, .., padded T, .]
        return jnp.moveaxis(_whole(x, plan), 1, -2)

    if log_decay is not None:
        log_decay = by_head(log_decay) if log_decay.shape[3] > 1 else jnp.swapaxes(by_head(log_decay), 2, 3)
    tokens = linear.Tokens(by_head(query.reshape(b, t, m, n // m, h)), by_head(key), by_head(value), log_decay)
    out, state = linear.tpu.attend(plan, *_vary(tokens, state))
    return jnp.moveaxis(out, 3, 1).reshape(b, -1, n, out.shape[-1]), state


def _on_gpu(query, key, value, log_decay, state, chunk_size, options):
    decay = None if log_decay is None else "channel" if log_decay.shape[3] > 1 else "head"
    plan = linear.gpu.choose_plan(query, value, state.memory.shape[1], chunk_size, decay, **options)
    tokens = linear.Tokens(query, key, value, log_decay[..., 0] if decay == "head" else log_decay)
    return linear.gpu.attend(plan, *_vary(jax.tree.map(lambda x: _whole(x, plan), tokens), state))


def _whole(x, plan):
    """With tokens [B, T, ..] of whole slabs."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % plan.slab)) + ((0, 0),) * (x.ndim - 2))


def _vary(*trees):
    return vary(trees, varying_axes(*trees))
