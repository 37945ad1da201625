"""Argument checks: every wrong input gets one sentence that names the argument, what came and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.parts import Exponential, Mask, Operand, Score, Similarity, Weights
from pallas_kernels.products import Products


def describe(x) -> str:
    """``float32[2, 8]`` for arrays, the type's name and value otherwise."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return f"{type(x).__name__} {x!r}"[:80]


def as_array(name: str, value, expected: str = "an array") -> jax.Array:
    """``jnp.asarray`` with an error that names the argument."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}") from error


def check_choice(name: str, value, choices: tuple[str, ...]):
    """One of the names, or None."""
    if value is not None and value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))} or None, got {value!r}")


def check_integer(name: str, value, *, least: int, most: int | None = None) -> int:
    """A static integer within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}: expected an integer {f'of at least {least}' if most is None else f'from {least} to {most}'}, got {value}")
    return int(value)


def check_integers(name: str, value, *, ranks: tuple[int, ...] | None = None) -> jax.Array:
    """An integer or an integer array of one of the ranks, as int32."""
    array = as_array(name, value, "integers")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: expected integers, got {describe(value)}")
    if ranks is not None and array.ndim not in ranks:
        raise ValueError(f"{name}: expected an array of rank {' or '.join(map(str, ranks))}, got {describe(array)}")
    return array.astype(jnp.int32)


def check_real(name: str, value, *, ranks: tuple[int, ...] | None = None) -> jax.Array:
    """A real number or an array of them."""
    if not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number or an array of numbers, got {describe(value)}")
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.promote_types(array.dtype, jnp.float32)) if jnp.issubdtype(array.dtype, jnp.integer) else array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected real numbers, got {describe(value)}")
    if ranks is not None and array.ndim not in ranks:
        raise ValueError(f"{name}: expected an array of rank {' or '.join(map(str, ranks))}, got {describe(array)}")
    return array


def check_function(name: str, value):
    """A callable that can key compilation."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {describe(value)}")
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected a hashable function (defined at module level), got {describe(value)}") from error


def parameter_operands(params) -> tuple[tuple, tuple]:
    """The arrays and axes of a user function's parameters; a bare array is handed over whole."""
    arrays, axes = [], []
    for i, p in enumerate(params):
        arrays.append(as_array(f"params[{i}]", p.array if isinstance(p, Operand) else p))
        axes.append(tuple(p.axes) if isinstance(p, Operand) else (None,) * arrays[-1].ndim)
    return tuple(arrays), tuple(axes)


def check_array(name: str, x):
    """Anything with a shape and a dtype."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name}: expected an array, got {describe(x)}")


def check_query_key_value(query, key, value=None):
    """Shapes [B, T, N, H], [B, S, K, H], [B, S, K, Hv] with N a multiple of K, and one floating dtype; returned as JAX arrays."""
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in given.items():
        check_array(name, x)
    query, key, value = (*(jnp.asarray(x) for x in given.values()), None)[:3]
    for name, x in zip(given, (query, key, value)):
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits < 16:
            raise TypeError(f"{name}: expected a floating-point array of 16 bits or more, got {describe(x)}")
        if len(x.shape) != 4:
            layout = "[B, T, N, H]" if name == "query" else "[B, S, K, H]"
            raise ValueError(f"{name}: expected shape {layout}, got {describe(x)}; use jax.vmap for further batch axes")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {describe(x)}")
    b, _, n, h = query.shape
    if key.shape[0] != b:
        raise ValueError(f"key: expected batch size {b} as in query, got {describe(key)}")
    if key.shape[3] != h:
        raise ValueError(f"key: expected head size {h} as in query {describe(query)}, got {describe(key)}")
    if key.shape[2] == 0 or n % key.shape[2]:
        raise ValueError(f"key: expected a number of heads that divides the query's {n}, got {describe(key)}")
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected shape [{', '.join(map(str, key.shape[:3]))}, Hv] as key {describe(key)}, got {describe(value)}")
    return query, key, value


def check_parts(scores, mask, weights):
    """The kinds of the parts, with a hint for the usual slips."""
    if isinstance(scores, Score):
        scores = (scores,)
    if not isinstance(scores, (tuple, list)):
        raise TypeError(f"scores: expected a score or a sequence of scores, got {describe(scores)}")
    for i, score in enumerate(scores):
        if not isinstance(score, Score):
            raise TypeError(f"scores[{i}]: expected a score (see attnx.scores; an array is attnx.scores.bias(array)), got {describe(score)}")
    if sum(isinstance(score, Similarity) for score in scores) > 1:
        raise ValueError("scores: expected at most one Similarity (it replaces the dot product), got several")
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a mask (see attnx.masks; a boolean array is attnx.masks.explicit(array)), got {describe(mask)}")
    if not isinstance(weights, Weights):
        raise TypeError(f"weights: expected weights (see attnx.weights, for example attnx.weights.softmax()), got {describe(weights)}")
    return tuple(scores)


def check_products(products):
    """How matrix products are computed, not a dtype or its name."""
    if not isinstance(products, Products):
        raise TypeError(f"products: expected products (see attnx.products, for example attnx.products.int8()), got {describe(products)}")


def check_scale(scale, head_size: int) -> float:
    """The factor of the dot product, 1 / sqrt(H) by default."""
    if scale is None:
        return head_size**-0.5 if head_size else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.floating, np.integer)):
        raise TypeError(f"scale: expected a static number (for a traced one multiply the query), got {describe(scale)}")
    return float(scale)


def check_positions(name: str, positions, batch: int, length: int):
    """None, or integers [length] or [B, length]."""
    if positions is None:
        return None
    array = check_integers(name, positions, ranks=(1, 2))
    if array.shape not in ((length,), (batch, length), (1, length)):
        raise ValueError(f"{name}: expected shape [{length}] or [{batch}, {length}], got {describe(array)}")
    return array


def check_block_sizes(block_sizes) -> tuple[int, int]:
    """A pair of positive integers."""
    if not isinstance(block_sizes, (tuple, list)):
        raise TypeError(f"block_sizes: expected a pair (queries, keys), got {describe(block_sizes)}")
    if len(block_sizes) != 2:
        raise ValueError(f"block_sizes: expected a pair (queries, keys), got {describe(block_sizes)}")
    queries, keys = (check_integer("block_sizes", size, least=1) for size in block_sizes)
    return queries, keys


def check_dropout_rate(rate) -> float:
    """A static rate in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.floating)):
        raise TypeError(f"dropout_rate: expected a static number, got {describe(rate)}")
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {rate}")
    return float(rate)


def check_dropout(rate, key):
    """A static rate in [0, 1) and, where it is positive, a PRNG key; returns the rate and two uint32 words."""
    rate = check_dropout_rate(rate)
    if rate == 0:
        return rate, None
    if key is None:
        raise ValueError(f"dropout_key: expected a PRNG key with dropout_rate={rate}, got None")
    try:
        return rate, jax.random.bits(key, (2,), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"dropout_key: expected a PRNG key, got {describe(key)}") from error


def check_exponential(name: str, weights):
    """Weights that have a residual to return or merge."""
    if not isinstance(weights, Exponential):
        raise ValueError(f"{name}: expected weights of the exponential family, which have a residual (softmax, softpick, ...), got {describe(weights)}")
