"""Attention in many small windows: several windows and heads a program, all pairs of a window on chip, and nothing kept for the gradient but the inputs."""

from functools import partial

import jax
import numpy as np

from pallas_kernels.window import gpu, tpu
from pallas_kernels.window.arrays import Plan, inexact, once

__all__ = ["Plan", "attend", "gpu", "tpu"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, query, key, value, operands):
    """Attention of every window by itself.

    Args:
      query, key: [NW, S, N, H].
      value: [NW, S, N, Hv].
      operands: of the parts, in the canonical layout [NW, a number that divides NW or 1, N or 1, 1, S or 1, S or 1], by window modulo their number.
        Those that have gradients have one for each window, or one for all.

    Returns:
      [NW, S, N, Hv] in the query's dtype. Reverse mode differentiates it once.
    """
    return _on(plan).forward(plan, query, key, value, operands)


def _on(plan):
    return tpu if plan.platform == "tpu" else gpu


@once
def _keep(plan, query, key, value, operands):
    return attend(plan, query, key, value, operands), (query, key, value, operands)


@once
def _backward(plan, kept, cotangent):
    *qkv, operands = kept
    *main, found = _on(plan).backward(plan, *kept, cotangent.astype(qkv[2].dtype))
    leaves, structure = jax.tree.flatten(operands)
    found = iter(found)
    return *main, jax.tree.unflatten(structure, [next(found).astype(x.dtype) if inexact(x) else np.zeros(x.shape, jax.dtypes.float0) for x in leaves])


attend.defvjp(_keep, _backward)
