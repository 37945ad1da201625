"""Runs one attention call with all its gradients, and compares two such results."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from pallas_kernels.parts import Exponential

STATIC = ("implementation", "block_sizes", "scale", "dropout_rate", "products")


def arrays(dtype=jnp.float64, *, batch=2, queries=13, keys=11, heads=4, kv_heads=2, size=5, value_size=3, seed=0):
    """Query, key, value and an output cotangent."""
    shapes = (batch, queries, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, value_size), (batch, queries, heads, value_size)
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(jax.random.split(jax.random.key(seed), 4), shapes)]


@partial(jax.jit, static_argnames=STATIC)
def evaluate(query, key, value, cotangent, scores=(), mask=None, weights=attnx.weights.softmax(), query_positions=None, key_positions=None,
             dropout_key=None, **options):
    """The output, the residual (exponential weights), and the gradients of a loss of both by all real arrays of the call."""
    exponential = isinstance(weights, Exponential)

    def loss(query, key, value, scores, weights):
        out = attnx.attention(query, key, value, scores=scores, mask=mask, weights=weights, query_positions=query_positions,
                              key_positions=key_positions, dropout_key=dropout_key, return_residual=exponential, **options)
        out, r = out if exponential else (out, None)
        total = jnp.vdot(out, cotangent)
        if exponential:
            total += jnp.sum(jnp.sin(jnp.where(jnp.isfinite(r), r, 0)) * cotangent.mean(-1))
        return total, (out, r)

    gradients, (out, r) = jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True, allow_int=True)(query, key, value, scores, weights)
    return {"out": out, "r": r, "gradients": [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]}


def reference(*args, **kwargs):
    return evaluate(*args, implementation="reference", **kwargs)


def blockwise(*args, block_sizes=(4, 4), **kwargs):
    return evaluate(*args, implementation="blockwise", block_sizes=block_sizes, **kwargs)


def assert_agree(got, expected, tolerance=1e-11):
    """Every array agrees to ``tolerance`` of the larger of 1 and its largest entry; -inf and nothing else may be infinite."""
    got, expected = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(expected)
    assert [p for p, _ in got] == [p for p, _ in expected]
    for (path, a), (_, b) in zip(got, expected):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (path, a.shape, b.shape)
        assert not np.isnan(a).any() and not np.isnan(b).any(), path
        empty = np.isneginf(b)
        assert (np.isneginf(a) == empty).all(), path
        scale = max(1.0, np.abs(b[~empty]).max(initial=0))
        worst = np.abs(a[~empty] - b[~empty]).max(initial=0) / scale
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: {worst:.2e} > {tolerance:.0e}"
