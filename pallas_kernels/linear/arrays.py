"""What the kernels of the recurrent engine are handed, on any platform."""

from typing import Any, NamedTuple

import jax


class Tokens(NamedTuple):
    """What varies along the sequence, of length T, a multiple of a slab: on a TPU heads first, on a GPU tokens first, as a call brings them.

    Attributes:
      query: [B, M, G, T, H], for each of M states its G queries; or [B, T, M G, H].
      key, value: [B, K, T, H], [B, K, T, Hv], M a multiple of K; or [B, T, K, H], [B, T, K, Hv].
      log_decay: [B, M, 1, T] (one for the head), [B, M, T, H] (one for each channel), or None; or [B, T, M], [B, T, M, H].
    """

    query: Any
    key: Any
    value: Any
    log_decay: Any


class State(NamedTuple):
    """S [B, M, H, Hv] and, to divide by ``query . z``, z [B, M, 1, H], in the accumulator's dtype."""

    memory: Any
    normalizer: Any


def differentiated_once(rule):
    """``rule(plan, ..)`` of a derivative, which says so where it is to be differentiated again."""
    def refuse(*_):
        raise NotImplementedError("implementation='pallas': the kernels of the recurrent engine have first derivatives only; use 'chunked'")

    rule = jax.custom_vjp(rule, nondiff_argnums=(0,))
    rule.defvjp(refuse, refuse)
    return rule


def shared(gradient, like, axis: int = 1):
    """The gradient of keys or values, summed over the states of each of their heads, which ``axis`` has."""
    if gradient.shape != like.shape:
        gradient = gradient.reshape(*like.shape[:axis + 1], -1, *like.shape[axis + 1:]).sum(axis + 1)
    return gradient.astype(like.dtype)
