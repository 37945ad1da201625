"""The two halves of attention, and attention from given scores: public, differentiable, for mechanisms that need only one.

    r_i   = row statistics of the scores of i                 row_statistics
    out_i = sum_j weight(s_ij, r_i) v_j                       apply, with r from anywhere: another mask, layer or axis
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks, operations, reference
from attnx.core.attention import IMPLEMENTATIONS, no_tiles, prepare, sink_of, with_sink
from attnx.core.blockwise import Blockwise, choose_blockwise
from attnx.core.program import Data, Program, unbind_output
from pallas_kernels import tile
from pallas_kernels.parts import Exponential, Extent, Mask, Range, Softmax, Weights, part


def _materialises(name, program):
    checks.check_choice("implementation", name, IMPLEMENTATIONS)
    if name not in (None, "reference", "blockwise"):
        raise NotImplementedError(f"implementation={name!r} has no separate halves; use 'blockwise', 'reference' or None")
    return name == "reference" or no_tiles(program)


def row_statistics(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], *, implementation: str | None = None, block_sizes=None, **parts):
    """The row statistics of the weights, without values.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      implementation: "reference", "blockwise" or None.
      block_sizes: as in :func:`attnx.attention`.
      **parts: scores, mask, weights, scale, query_positions, key_positions as in :func:`attnx.attention`.

    Returns:
      For exponential weights the residual [B, T, N] = log of the normaliser, sink included (-inf for an empty row); for others a tuple of the statistics,
      each [B, T, N], empty for elementwise weights. In float32 (float64 for float64).

    Cost: as attention without the product with values; differentiable in query, key and the parts' arrays.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> attnx.row_statistics(q, k, mask=attnx.masks.causal())[0, :, 0]
    Array([0.       , 0.6931472, 1.0986123, 1.3862944], dtype=float32)
    """
    weights, program, data = prepare(query, key, None, **parts)
    if _materialises(implementation, program):
        rows = _reference_statistics(program, data)
    else:
        rows = _blockwise_statistics(choose_blockwise(program, data, block_sizes), data)
    if isinstance(weights, Exponential):
        (r,) = rows
        sink = sink_of(program, weights)
        return unbind_output(r if sink is None else with_sink((jnp.zeros_like(r), r), sink)[1], r.dtype)[..., 0]
    return tuple(unbind_output(r, r.dtype)[..., 0] for r in rows)


@part
class _Counted(Weights):
    statistics = (Extent.COUNT,)


def visible_counts(mask: Mask | None, batch: int, queries: int, keys: int, *, heads: int = 1, query_positions: Int[Array, "*B T"] | None = None,
                   key_positions: Int[Array, "*B S"] | None = None) -> Int[Array, "B T N"]:
    """How many keys each query sees.

    Args:
      mask: which pairs are allowed; None allows all.
      batch, queries, keys: B, T and S.
      heads: N, of masks that differ between heads.
      query_positions, key_positions: as in :func:`attnx.attention`: padding sees nothing and is not seen.

    Returns:
      int32 [B, T, N].

    Cost: O(B T N) where the mask knows a formula (see :meth:`Mask.count`) and positions are the default; else a pass over all allowed pairs.

    >>> import attnx
    >>> visible_counts(attnx.masks.sliding_window(3), 1, 5, 5)[0, :, 0]
    Array([1, 2, 3, 3, 3], dtype=int32)
    """
    if query_positions is None and key_positions is None:
        places = jnp.arange(queries, dtype=jnp.int32)
        count = keys if mask is None else mask.count(places, Range(0, keys - 1))
        if count is not None:
            return jnp.broadcast_to(jnp.broadcast_to(count, (queries,))[:, None], (batch, queries, heads)).astype(jnp.int32)
    query, key = jnp.zeros((batch, queries, heads, 1)), jnp.zeros((batch, keys, 1, 1))
    (count,) = row_statistics(query, key, mask=mask, weights=_Counted(), query_positions=query_positions, key_positions=key_positions)
    return count.astype(jnp.int32)


def apply(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], r, *,
          implementation: str | None = None, block_sizes=None, **parts):
    """Values weighed by ``weight(s_ij, r_i)`` with given row statistics.

    Args:
      query, key, value: as in :func:`attnx.attention`.
      r: what :func:`row_statistics` returns: [B, T, N], or a tuple of them for weights outside the exponential family.
      implementation, block_sizes, **parts: as there; dropout_rate and dropout_key too.

    Returns:
      [B, T, N, Hv] in the query's dtype. With ``r = row_statistics(query, key, **parts)`` it is attention.

    Differentiable in everything, r included.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8))
    >>> bool(jnp.allclose(attnx.apply(q, k, v, attnx.row_statistics(q, k)), attnx.attention(q, k, v), atol=1e-6))
    True
    """
    checks.check_array("value", value)
    weights, program, data = prepare(query, key, value, **parts)
    rows = tuple(r) if isinstance(r, (tuple, list)) else (r,)
    if len(rows) != len(weights.statistics):
        raise ValueError(f"r: expected {len(weights.statistics)} row statistics for {checks.describe(weights)}, got {len(rows)}")
    for x in rows:
        if jnp.shape(x) != query.shape[:3]:
            raise ValueError(f"r: expected shape {list(query.shape[:3])} ([B, T, N]), got {checks.describe(x)}")
    dtype = tile.accumulator_dtype(program.sizes.dtype)
    b, k, g, t, _ = data.query.shape
    rows = tuple(x.astype(dtype).transpose(0, 2, 1).reshape(b, k, g, t, 1) for x in rows)
    if _materialises(implementation, program):
        out = _reference_apply(program, data, rows)
    else:
        out = _blockwise_apply(choose_blockwise(program, data, block_sizes), data, rows)
    return unbind_output(out, program.sizes.dtype)


def attention_weights(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], **parts) -> Float[Array, "B N T S"]:
    """The weights themselves, for analysis: materialised, O(T S) memory.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      **parts: scores, mask, weights, scale, dropout, positions as in :func:`attnx.attention`.

    Returns:
      [B, N, T, S] in float32 (float64 for float64), 0 where the mask forbids.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = jnp.zeros((1, 2, 1, 8))
    >>> attnx.attention_weights(q, k, mask=attnx.masks.causal())[0, 0]
    Array([[1. , 0. ],
           [0.5, 0.5]], dtype=float32)
    """
    weights, program, data = prepare(query, key, None, **parts)
    return _weights(program, data, sink_of(program, weights))


def attention_scores(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], **parts) -> tuple[Float[Array, "B N T S"], Bool[Array, "B N T S"]]:
    """The scores themselves and which pairs are allowed, for mechanisms that change whole rows of scores; :func:`attend_scores` goes on from there.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      **parts: scores, mask, scale, query_positions, key_positions as in :func:`attnx.attention`.

    Returns:
      ``(scores, allowed)``: [B, N, T, S] in float32 (float64 for float64), whatever the mask says of a pair, and booleans of that shape. Materialised: O(T S) memory.

    >>> import attnx, jax.numpy as jnp
    >>> x = jnp.eye(2)[None, :, None]
    >>> s, allowed = attnx.attention_scores(x, x, mask=attnx.masks.causal(), scale=1.0)
    >>> s[0, 0].tolist(), allowed[0, 0].tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [[True, False], [True, True]])
    """
    _, program, data = prepare(query, key, None, **parts)
    return _scores(program, data)


def attend_scores(scores: Float[Array, "... T S"], value: Float[Array, "... S Hv"], *, mask: Array | None = None,
                  weights: Weights = Softmax(), return_weights: bool = False):
    """Attention from given scores: pooling, additive attention, steering.

    ::

        out_i = sum_j weights(s_ij, statistics of row i) v_j

    Args:
      scores: [..., T, S]; a pooling has T = 1.
      value: [..., S, Hv], leading axes broadcast against those of the scores.
      mask: booleans that broadcast to the scores, true where the pair is allowed.
      weights: see :mod:`attnx.weights`; its arrays must be single numbers.
      return_weights: also return the weights [..., T, S].

    Returns:
      [..., T, Hv]; rows with nothing to attend to are zero. The scores exist already, so this is materialised, and differentiable to any
      order in either mode.

    >>> import attnx, jax.numpy as jnp
    >>> attnx.attend_scores(jnp.zeros((1, 4)), jnp.arange(4.0)[:, None])
    Array([[1.5]], dtype=float32)
    """
    scores, value = checks.as_array("scores", scores), checks.as_array("value", value)
    for name, x in (("scores", scores), ("value", value)):
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a floating-point array [..., T, S] and [..., S, Hv], got {checks.describe(x)}")
    if scores.shape[-1] != value.shape[-2]:
        raise ValueError(f"value: expected S = {scores.shape[-1]} rows as the scores {checks.describe(scores)} have columns, got {checks.describe(value)}")
    checks.check_parts((), None, weights)
    t, s = scores.shape[-2:]
    try:
        lead = jnp.broadcast_shapes(scores.shape[:-2], value.shape[:-2])
    except ValueError as error:
        raise ValueError(f"value: expected leading axes that broadcast with the scores {checks.describe(scores)}, got {checks.describe(value)}") from error
    ok = checks.as_array("mask", True if mask is None else mask, "booleans")
    if ok.dtype != bool:
        raise TypeError(f"mask: expected booleans that broadcast to the scores {checks.describe(scores)}, got {checks.describe(mask)}")
    shape = (*lead, t, s)
    if ok.ndim > len(shape) or any(n not in (1, full) for n, full in zip(ok.shape[::-1], shape[::-1])):
        raise ValueError(f"mask: expected booleans that broadcast to {list(shape)}, got {checks.describe(ok)}")
    flat, ok = (jnp.broadcast_to(x, shape).reshape(math.prod(lead), 1, 1, t, s) for x in (scores.astype(tile.accumulator_dtype(scores.dtype)), ok))
    ones = jnp.zeros((flat.shape[0], t, 1, 1), flat.dtype)  # a query and key of no content: only their sizes matter
    _, program, data = prepare(ones, jnp.zeros((flat.shape[0], s, 1, 1), flat.dtype), None, weights=weights)
    w, r = reference.weights(program, data, flat, ok)
    sink = sink_of(program, weights)
    if sink is not None:
        w, _ = with_sink((w, r), sink)
    w = w.reshape(shape)
    out = jnp.einsum("...ts,...sv->...tv", w.astype(value.dtype), value, preferred_element_type=tile.accumulator_dtype(value.dtype))
    return (out.astype(value.dtype), w) if return_weights else out.astype(value.dtype)


def merge(a, b):
    """One attention from two over disjoint keys, under one normaliser.

    ::

        r = log(e^r_a + e^r_b),        out = out_a e^(r_a - r) + out_b e^(r_b - r)

    Args:
      a, b: pairs ``(out [B, T, N, Hv], r [B, T, N])`` as :func:`attnx.attention` returns with ``return_residual=True``. With a sink, give it to one
        of the branches only.

    Returns:
      The merged pair; associative, commutative, and differentiable through out and r of both.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> near, far = (attnx.attention(q, k[:, s], v[:, s], return_residual=True) for s in (slice(0, 2), slice(2, 6)))
    >>> bool(jnp.allclose(attnx.merge(near, far)[0], attnx.attention(q, k, v), atol=1e-6))
    True
    """
    for name, pair in (("a", a), ("b", b)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or jnp.shape(pair[0])[:-1] != jnp.shape(pair[1]):
            got = [jnp.shape(x) for x in pair] if isinstance(pair, (tuple, list)) else checks.describe(pair)
            raise ValueError(f"{name}: expected a pair (out [..., Hv], r [...]), got {got}")
    if jnp.shape(a[0]) != jnp.shape(b[0]):
        raise ValueError(f"b: expected an output of shape {jnp.shape(a[0])} as in a, got {jnp.shape(b[0])}")
    return tile.merge(a, b)


@partial(jax.jit, static_argnums=0)
def _reference_statistics(program: Program, data: Data):
    return reference.statistics(program, data, *reference.scores(program, data))


@partial(jax.jit, static_argnums=0)
def _blockwise_statistics(executor: Blockwise, data: Data):
    return operations.statistics(executor, data)


@partial(jax.jit, static_argnums=0)
def _reference_apply(program: Program, data: Data, rows):
    s, ok = reference.scores(program, data)
    w = reference.given(program, data, jnp.where(ok, s, 0), ok, rows)
    return reference.values(program, data, reference.dropout(program, data, w))


@partial(jax.jit, static_argnums=0)
def _blockwise_apply(executor: Blockwise, data: Data, rows):
    return operations.apply(executor, data, rows)


@partial(jax.jit, static_argnums=0)
def _scores(program: Program, data: Data):
    b, k, g, t, _ = data.query.shape
    return tuple(x.reshape(b, k * g, t, x.shape[-1]) for x in reference.scores(program, data))


@partial(jax.jit, static_argnums=0)
def _weights(program: Program, data: Data, sink):
    w, r = reference.weights(program, data, *reference.scores(program, data))
    w = reference.dropout(program, data, w if sink is None else with_sink((w, r), sink)[0])
    b, k, g, t, s = w.shape
    return w.reshape(b, k * g, t, s)
