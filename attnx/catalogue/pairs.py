"""Examples of mechanisms that are parts of the pairs engine."""

from collections.abc import Callable

import jax.numpy as jnp

from attnx.catalogue.entry import PATTERNS, SEEN, Case, Example, stream
from attnx.core.attention import attention
from attnx.masks.causal import causal
from attnx.mechanism import pairs

EXECUTIONS = ("reference", "blockwise", "pallas", "ring", "step")


def attend(case: Case, query, key, value, seen, **parts):
    """Attention with these parts in the case's pattern and execution; keys not ``seen`` [B, S] are padding."""
    mask = parts.pop("mask", None)
    if case.causal:
        mask = causal() if mask is None else causal() & mask
    if case.execution == "step":
        mechanism = pairs(mask=mask, **parts)
        state = mechanism.init(query.shape[0], query.shape[1], key.shape[2], key.shape[3], value.shape[3], query.dtype)
        return stream(mechanism.step, state, query, key, value)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return attention(query, key, value, mask=mask, key_positions=positions, implementation=case.implementation, block_sizes=case.block_sizes, **parts)


def pairs_example(parts: Callable, *, patterns=PATTERNS, executions=EXECUTIONS, name: str = "", sizes=None, **inputs) -> Example:
    """An example of attention with parts.

    Args:
      parts: ``parts(**inputs) -> {"scores": ..., "mask": ..., "weights": ...}``, made of the extra inputs; masks besides causality only.
      patterns, executions, name, sizes: see :class:`Example`; 'step' is tried in causal self-attention.
      **inputs: the arrays of the parts, by their axes.
    """
    def call(case, query, key, value, seen, **arrays):
        return attend(case, query, key, value, seen, **parts(**arrays))

    return Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN, **inputs}, "btnv", tuple(patterns), tuple(executions), "seen",
                   sizes=sizes or {}, name=name)
