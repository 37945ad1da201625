"""Calls of window attention that the kernels of every platform are held against."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from attnx.core.windows import window_attention

SIZES = {"tpu": [(49, 16, True), (64, 32, False), (81, 64, True), (49, 32, False)], "gpu": [(49, 32, True), (64, 64, False), (81, 16, True)]}
"""Tokens, head size, and whether there is a bias; the claim of the row goes through all of them."""
PARTS = {
    "shifted": lambda n, s: {"regions": REGIONS[:, :s]},
    "mask": lambda n, s: {"mask": np.random.default_rng(2).random((2, s, s)) < 0.4},
    "regions and causal": lambda n, s: {"regions": REGIONS[:, :s], "mask": attnx.masks.causal(), "weights": attnx.weights.softpick()},
    "offsets, elementwise weights": lambda n, s: {"scores": attnx.scores.t5_bias(jnp.sin(jnp.arange(32.0 * n)).reshape(32, n)), "weights": attnx.weights.sigmoid()},
    "temperatures": lambda n, s: {"weights": attnx.weights.softmax(temperature=jnp.linspace(0.5, 2.0, s))},
    "soft cap, a bias a window": lambda n, s: {"scores": (attnx.scores.bias(jnp.sin(jnp.arange(6.0 * n * s * s)).reshape(6, n, s, s)), attnx.scores.soft_cap(3.0))},
}
REGIONS = np.random.default_rng(1).integers(0, 2, (3, 81))


def case(length: int, size: int, *, windows: int = 6, heads: int = 3, value_size: int | None = None, dtype=jnp.float64, bias: bool = True):
    """Query, key, value, the output's cotangent and a bias (or None)."""
    keys, shape = jax.random.split(jax.random.key(0), 5), (windows, length, heads, size)
    values = (*shape[:3], value_size or size)
    *arrays, table = (jax.random.normal(k, s, dtype) for k, s in zip(keys, (shape, shape, values, values, (heads, length, length))))
    return (*arrays, table.astype(jnp.promote_types(dtype, jnp.float32)) if bias else None)


@functools.partial(jax.jit, static_argnums=0, static_argnames="chunk_size")
def run(implementation, query, key, value, cotangent, bias, parts=None, *, chunk_size=None):
    """The output, and the gradients by query, key, value, bias and the arrays of scores."""
    parts = parts or {}
    scores = parts.get("scores", ())

    def attend(query, key, value, bias, scores):
        return window_attention(query, key, value, bias=bias, implementation=implementation, chunk_size=chunk_size, **{**parts, "scores": scores})

    out, pull = jax.vjp(attend, query, key, value, bias, scores)
    return out, pull(cotangent)
