"""The pairs engine: attention as a choice of scores, mask and weights, and of how to execute it.

    out_i = sum over j allowed by mask of  weights(score(q_i, k_j), row statistics of i) * v_j
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnx.core import checks, cudnn, operations, reference
from attnx.core.blockwise import choose_blockwise
from attnx.core.fused import choose_fused, prefer
from attnx.core.program import Data, Program, bind, bind_operand, unbind_output
from attnx.core.ring import choose_ring, mesh_in_context
from attnx.core.tiling import choose_tiling
from pallas_kernels import tile
from pallas_kernels.parts import Exponential, Mask, Score, Softmax, Weights
from pallas_kernels.products import Products

IMPLEMENTATIONS = ("reference", "blockwise", "pallas", "cudnn", "ring")


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    scores: Score | tuple[Score, ...] = (),
    mask: Mask | None = None,
    weights: Weights = Softmax(),
    scale: float | None = None,
    products: Products = Products(),
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    query_positions: Int[Array, "*B T"] | None = None,
    key_positions: Int[Array, "*B S"] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    block_sizes: tuple[int, int] | None = None,
    hooks: dict | None = None,
):
    """Attention over all allowed pairs.

    ::

        out_i = sum over j allowed by mask of  w_ij v_j,     w_ij = weights(s_ij, statistics of row i),     s_ij = scores(scale q_i . k_j)

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K: query head n reads key-value head n // (N / K).
      value: [B, S, K, Hv].
      scores: what is done to the scaled dot products, in order (see :mod:`attnx.scores`).
      mask: which pairs are allowed (see :mod:`attnx.masks`); None allows all.
      weights: how scores become weights (see :mod:`attnx.weights`).
      scale: factor of the dot product, a static number; 1 / sqrt(H) by default.
      products: in what precision queries meet keys and weights values, and their gradients (see :mod:`attnx.products`); by default in that of the
        arrays, summed in at least float32.
      dropout_rate: probability with which a weight is dropped, the others divided by 1 - dropout_rate.
      dropout_key: PRNG key, needed when dropout_rate > 0. The pattern depends on it and on logical positions alone.
      query_positions, key_positions: logical positions, int32 [T] or [B, T] ([S] or [B, S]); -1 is padding. 0, 1, 2, ... by default.
      implementation: "reference" (materialised, O(T S) memory, forward mode and hooks), "blockwise" (XLA fold, O(T) memory, any backend),
        "pallas" (fused kernels), "cudnn" (jax.nn's), "ring" (over the axis 'sequence' of the mesh in context; more to choose in
        :func:`attnx.ring_attention`); None picks the best that serves the call: the fold over the devices of the mesh in context if there
        is one (its axes 'data', 'fsdp', 'sequence', 'tensor', of type Auto), else "cudnn", "pallas" or "blockwise", the first that can.
      return_residual: also return r [B, T, N], the log of each row's normaliser (sink included), which :func:`attnx.merge` wants;
        -inf for rows that attend to nothing. Exponential weights only.
      block_sizes: (queries, keys) of a tile in "blockwise", "ring" and "pallas" (there powers of two, from 128 on a TPU and 16 on a
        GPU); chosen by default.
      hooks: ``{stage: (value, at) -> value}`` on the materialised 'scores' or 'weights' [B, N, T, S]; they force "reference". ``at`` holds
        integer arrays that broadcast against the value.

    Returns:
      [B, T, N, Hv] in the query's dtype; with return_residual the pair (out, r), r in float32 (float64 for float64).
      Rows with nothing to attend to are zero, and so are their gradients.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.
      NotImplementedError: a named implementation cannot serve the call; says what it lacks.

    Cost: O(T S) time times the share of tiles that hold allowed pairs; memory O(T + S), or O(T S) for "reference". Derivatives of any order in
    reverse mode; forward mode in "reference" only.

    >>> import attnx, jax.numpy as jnp
    >>> x = jnp.ones((1, 16, 4, 8))
    >>> attnx.attention(x, x[:, :, :2], x[:, :, :2], mask=attnx.masks.causal()).shape
    (1, 16, 4, 8)
    """
    chosen = _choose(implementation, hooks)
    checks.check_array("value", value)
    weights, program, data = prepare(query, key, value, scores=scores, mask=mask, weights=weights, scale=scale, products=products,
                                     dropout_rate=dropout_rate, dropout_key=dropout_key, query_positions=query_positions, key_positions=key_positions)
    if return_residual:
        checks.check_exponential("return_residual", weights)
    named = picked(chosen)
    call = dict(scores=checks.check_parts(scores, mask, weights), mask=mask, weights=weights, dropout_rate=program.parts.dropout_rate,
                products=products, positions=(query_positions, key_positions))
    if chosen == "cudnn" or named is None and not return_residual and cudnn.serves(query, key, value, **call):
        return cudnn.attention(query, key, value, scale=program.parts.scale, return_residual=return_residual, **call)
    return evaluate(program, data, weights, chosen, return_residual=return_residual, block_sizes=block_sizes, hooks=hooks)


def evaluate(program: Program, data: Data, weights: Weights, implementation: str | None, *, return_residual: bool = False, block_sizes=None, hooks=None):
    """A checked and bound call by a named execution, or by the best of them that serves it: what :func:`attention` returns."""
    named, sink = picked(implementation), sink_of(program, weights)
    if implementation == "reference" or no_tiles(program):
        out, r = execute_reference(program, data, sink) if not hooks else with_sink(reference.output(program, data, hooks), sink)
    else:
        run = lambda executor: execute(executor, data, sink)
        out, r = prefer(named, lambda: run(choose_fused(program, data, block_sizes)), lambda: run(_executor(implementation, program, data, block_sizes)))
    out = unbind_output(out, program.sizes.dtype)
    return (out, unbind_output(r, r.dtype)[..., 0]) if return_residual else out


def picked(implementation: str | None) -> str | None:
    """What serves a call that names this execution: within a mesh the ring where none is named."""
    return implementation or ("ring" if mesh_in_context() is not None else None)


def prepare(query, key, value, *, scores=(), mask=None, weights=Softmax(), scale=None, products=Products(), dropout_rate=0.0, dropout_key=None,
            query_positions=None, key_positions=None) -> tuple[Weights, Program, Data]:
    """The checked arguments of a call as its weights, static program and arrays."""
    query, key, value = checks.check_query_key_value(query, key, value)
    scores = checks.check_parts(scores, mask, weights)
    dropout_rate, seed = checks.check_dropout(dropout_rate, dropout_key)
    checks.check_products(products)
    program, data = bind(query, key, value, scores=scores, mask=mask, weights=weights, scale=checks.check_scale(scale, query.shape[3]),
                         dropout_rate=dropout_rate, seed=seed, products=products,
                         query_positions=checks.check_positions("query_positions", query_positions, *query.shape[:2]),
                         key_positions=checks.check_positions("key_positions", key_positions, *key.shape[:2]))
    products.check(program.parts)
    return weights, program, data


def ring_attention(query, key, value, *, mesh=None, axis_name: str = "sequence", batch_axes=("data", "fsdp"), head_axes=("tensor",),
                   zigzag: bool | None = None, return_residual: bool = False, block_sizes=None, **parts):
    """:func:`attention` with the sequence over the devices of a mesh axis: key blocks travel around them.

    Args:
      query, key, value, return_residual, block_sizes: as in :func:`attention`; whole arrays, sharded or to be sharded.
      mesh: the mesh; the one in context (``jax.set_mesh``) by default.
      axis_name: the mesh axis that holds the sequence.
      batch_axes, head_axes: the mesh axes that hold batch and key-value heads; those that the mesh lacks, or that do not divide, are left out.
      zigzag: deal the sequence out so that causal work is equal on all devices; by default when the mask lets late queries see more.
      **parts: scores, mask, weights, scale, products, dropout_rate, dropout_key, query_positions, key_positions. Each array among them is sharded
        as its axes say.

    Returns:
      As :func:`attention`, sharded as [batch_axes, axis_name, head_axes].

    Cost a device: time O(T S / P), memory O((T + S) / P), transfer O(S) in P steps that overlap the computation (fewer for masks of limited span).
    First derivatives only. Liu, Zaharia, Abbeel: "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023, arXiv 2310.01889).

    >>> import attnx, jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> x = jnp.ones((1, 16, 4, 8))
    >>> attnx.ring_attention(x, x, x, mesh=mesh, mask=attnx.masks.causal()).shape
    (1, 16, 4, 8)
    """
    weights, program, data = prepare(query, key, value, **parts)
    if return_residual:
        checks.check_exponential("return_residual", weights)
    if no_tiles(program):
        return attention(query, key, value, return_residual=return_residual, implementation="reference", **parts)
    ring = choose_ring(program, data, choose_tiling(program, data, block_sizes), mesh, axis_name, batch_axes, head_axes, zigzag)
    out, r = execute(ring, data, sink_of(program, weights))
    out = unbind_output(out, program.sizes.dtype)
    return (out, unbind_output(r, r.dtype)[..., 0]) if return_residual else out


@partial(jax.jit, static_argnums=0)
def execute(executor, data, sink):
    """Output and residual of a call by an executor, the sink (or None) let in."""
    return with_sink(operations.output(executor, data), sink)


@partial(jax.jit, static_argnums=0)
def execute_reference(program: Program, data: Data, sink):
    """The same by the definition."""
    return with_sink(reference.output(program, data), sink)


def sink_of(program: Program, weights: Weights):
    """The canonical sink [B or 1, K or 1, G or 1, T or 1, 1] of the weights, or None."""
    operand = weights.sink(program.sizes) if isinstance(weights, Exponential) else None
    return None if operand is None else bind_operand(operand, program.sizes, f"weights ({type(weights).__name__})")[0]


def with_sink(result, sink):
    """Lets the sink into the finished normaliser of ``(out, r)``: ``r' = logaddexp(r, sink)``, ``out' = out e^(r - r')``."""
    if sink is None:
        return result
    out, r = result
    shape = (*out.shape[:-1], 1)
    nothing = jnp.zeros(shape, out.dtype)
    sink = jnp.broadcast_to(sink.astype(r.dtype), shape)
    merged, total = tile.merge((out, r[..., 0]), (nothing, sink[..., 0]))
    return merged, total[..., None]


def _choose(implementation, hooks):
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    if hooks:
        if not isinstance(hooks, dict):
            raise TypeError(f"hooks: expected a dict from stages to functions, got {checks.describe(hooks)}")
        unknown = set(hooks) - {"scores", "weights"}
        if unknown:
            raise ValueError(f"hooks: expected stages 'scores' and 'weights', got {sorted(unknown)}")
        if implementation not in (None, "reference"):
            raise NotImplementedError(f"implementation={implementation!r} never holds the scores or weights that hooks act on; use 'reference' or None")
        return "reference"
    return implementation


def _executor(chosen, program, data, block_sizes):
    if chosen == "ring":
        return choose_ring(program, data, choose_tiling(program, data, block_sizes))
    mesh = mesh_in_context() if chosen is None else None
    if mesh is None:
        return choose_blockwise(program, data, block_sizes)
    # The compiler would gather what a loop over blocks slices, so batch and heads are sharded here as well as the sequence.
    spread = mesh.shape.get("sequence", 1)
    whole = spread > 1 and min(program.sizes.queries, program.sizes.keys) >= spread
    return choose_ring(program, data, choose_tiling(program, data, block_sizes), mesh, "sequence" if whole else None)


def no_tiles(program: Program) -> bool:
    """Whether there is not a single pair to fold; the definition covers that."""
    sizes = program.sizes
    return 0 in (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
