"""Attention in many small windows: the pairs engine with windows for batch elements, and executions that know how small they are.

    out_wi = sum over j of window w allowed by mask of  weights(scale q_wi . k_wj + bias[n, i, j]) v_wj

Thousands of windows of 49 or 64 tokens leave nothing to fold over: a whole map fits on chip. ``pallas`` computes it there, several windows and heads at a time,
and keeps nothing for the gradient but the inputs; ``blockwise`` takes one block of windows after another in XLA. What differs between windows, which shifted
windows need, repeats: window w has the regions and the mask of w mod nW.

Zhang: "Flash Window Attention: speedup the attention computation for Swin Transformer" (2025, arXiv 2501.06480): whole maps on chip, products cut along the features
instead of the tokens. Windows, shifts and biases: Liu et al., "Swin Transformer" (2021, arXiv 2103.14030).
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks, fused
from attnx.core.attention import execute_reference, no_tiles, sink_of
from attnx.core.compat import vary, varying_axes
from attnx.core.program import Data, Program, bind, unbind_output
from attnx.core.tiling import map_operands
from pallas_kernels import window
from pallas_kernels.parts import Blocks, Exponential, Mask, Operand, Score, Similarity, Sizes, Softmax, Spec, Weights, part
from pallas_kernels.static import strip
from pallas_kernels.tiles import power

IMPLEMENTATIONS = ("reference", "blockwise", "pallas")
LONGEST = {"tpu": 256, "gpu": 128}  # tokens of a window whose map stays on chip
PAIRS = 2**22  # scores at a time, "blockwise"


@part
class _Bias(Score):
    array: Any

    def operands(self, sizes):
        return (Operand(self.array, ("head", "query", "key")),)

    def tile(self, s, at, bias):
        return s + bias.astype(s.dtype)


@part
class _Allowed(Mask):
    array: Any

    def operands(self, sizes):
        return (Operand(self.array, ("batch", "query", "key")),)

    def tile(self, at, allowed):
        return allowed


@part
class _Regions(Mask):
    ids: Any

    @property
    def arity(self):
        return 2

    def operands(self, sizes):
        return Operand(self.ids, ("batch", "query")), Operand(self.ids, ("batch", "key"))

    def tile(self, at, query, key):
        return query == key


def window_attention(
    query: Float[Array, "*W S N H"],
    key: Float[Array, "*W S K H"],
    value: Float[Array, "*W S K Hv"],
    *,
    bias: Float[Array, "N S S"] | None = None,
    regions: Int[Array, "nW S"] | np.ndarray | None = None,
    mask: Mask | Bool[Array, "nW S S"] | np.ndarray | None = None,
    scores: Score | tuple[Score, ...] = (),
    weights: Weights = Softmax(),
    scale: float | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "*W S N Hv"]:
    """Attention of every window by itself.

    ::

        out_wi = sum_j weights(scale q_wi . k_wj + bias[n, i, j]) v_wj      over j with regions[w, i] == regions[w, j] and mask[w, i, j],  w mod nW

    Args:
      query: [NW, S, N, H], or with several axes of windows, such as [B, nW, S, N, H]; :func:`attnx.core.axes.window_partition` makes them.
      key: [NW, S, K, H], N a multiple of K.
      value: [NW, S, K, Hv].
      bias: added to the scaled scores, in all windows alike.
      regions: tokens see those of their own region (:func:`attnx.core.axes.window_regions`); the number of windows a multiple of nW.
      mask: which pairs are allowed, for each of nW windows, or a mask of positions 0 .. S - 1 (:mod:`attnx.masks`).
      scores: what is done to the scores after the bias, in order (see :mod:`attnx.scores`).
      weights: how scores become weights (see :mod:`attnx.weights`).
      scale: factor of the dot product, a static number; 1 / sqrt(H) by default.
      implementation: "reference" (materialised), "blockwise" (one block of windows after another, recomputed for the gradient), "pallas" (fused kernels, windows of up
        to 256 tokens on a TPU and 128 on a GPU), or None: "pallas" where it serves, else "reference".
      chunk_size: features that a step of a product takes in the kernels of a GPU, a power of two and at least 16, where one may be chosen.

    Returns:
      As query, with values' size, in the query's dtype. Rows that see nothing are zero.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.
      NotImplementedError: a named implementation cannot serve the call; says what it lacks.

    Cost: O(NW N S^2 H) time; memory O(NW N S^2) in "reference", one block of it in "blockwise", none in "pallas" beyond inputs and outputs. Derivatives
    of any order in reverse mode, in "pallas" first ones.

    >>> x = jnp.ones((8, 49, 3, 32))
    >>> window_attention(x, x, x, bias=jnp.zeros((3, 49, 49)), regions=jnp.zeros((4, 49), int)).shape
    (8, 49, 3, 32)
    """
    checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
    if chunk_size is not None and power(checks.check_integer("chunk_size", chunk_size, least=1)) != chunk_size:
        raise ValueError(f"chunk_size: expected a power of two and at least 16, got {chunk_size}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_array(name, x)
        if x.ndim < 4 or x.shape[:-3] != query.shape[:-3] or x.shape[-3] != query.shape[-3]:
            raise ValueError(f"{name}: expected shape [*W, S, heads, size] with the windows and tokens of query {query.shape}, got {checks.describe(x)}")
    lead = query.shape[:-3]
    query, key, value = checks.check_query_key_value(*map(_flat, (query, key, value)))
    nw, length, heads, size = query.shape
    given, masks = checks.check_parts(scores, None, weights), _masks(mask, regions, nw, length)
    if bias is not None:
        bias = checks.check_real("bias", bias)
        if bias.shape != (heads, length, length):
            raise ValueError(f"bias: expected shape [{heads}, {length}, {length}] for {heads} heads and windows of {length} tokens, got {checks.describe(bias)}")
        given = (_Bias(bias), *given)
    call = given, masks, weights, checks.check_scale(scale, size)

    def kernels():
        if isinstance(weights, Exponential) and weights.sink(Sizes(nw, heads, heads, length, length, (0, 0), query.dtype)) is not None:
            raise NotImplementedError("implementation='pallas': the window kernels have no sink in the weights; use 'blockwise' or 'reference'")
        program, data = _bind(query[..., :0], key[..., :0], None, *call)
        plan, operands = _plan(program, data.operands, query, key, value)
        if chunk_size is not None:
            plan = dataclasses.replace(plan, sizes=plan.sizes._replace(chunk=chunk_size))
        arrays = query, key, value, operands
        return _attend(plan, *vary(arrays, varying_axes(arrays)))

    def otherwise():
        program, data = _bind(query, key, value, *call)
        sink = sink_of(program, weights)
        if implementation == "blockwise" and not no_tiles(program):
            out = _blockwise(program, data, sink)
        else:
            out = execute_reference(program, data._replace(operands=_tiled(data.operands, nw)), sink)[0]
        return unbind_output(out, query.dtype)

    out = fused.prefer(implementation, kernels, otherwise) if query.size and value.size else otherwise()
    return out.reshape(*lead, length, heads, value.shape[3])


def _flat(x):
    """Windows along one axis."""
    return x.reshape(-1, *x.shape[-3:])


def _masks(mask, regions, nw: int, length: int) -> list[tuple[Mask, int]]:
    """The masks of a call, and of how many windows each is."""
    def count(name, x, rank):
        if x.shape != (x.shape[0], *(length,) * (rank - 1)) or not x.shape[0] or nw % x.shape[0]:
            raise ValueError(f"{name}: expected shape [nW{f', {length}' * (rank - 1)}] with nW a divisor of the {nw} windows, got {checks.describe(x)}")
        return x.shape[0]

    masks: list[tuple[Mask, int]] = []
    if regions is not None:
        regions = checks.check_integers("regions", regions, ranks=(2,))
        masks.append((_Regions(regions), count("regions", regions, 2)))
    if isinstance(mask, Mask):
        masks.append((mask, nw))
    elif mask is not None:
        mask = checks.as_array("mask", mask, "a mask or booleans [nW, S, S]")
        if mask.dtype != bool or mask.ndim != 3:
            raise TypeError(f"mask: expected a mask (see attnx.masks) or booleans [nW, S, S], got {checks.describe(mask)}")
        masks.append((_Allowed(mask), count("mask", mask, 3)))
    return masks


def _bind(query, key, value, scores, masks, weights, scale) -> tuple[Program, Data]:
    """The call as a program and its arrays; operands of masks are of as many windows as the masks."""
    program, data = bind(query, key, value, scores=scores, mask=None, weights=weights, scale=scale)
    if not masks:
        return program, data
    bound = [bind(query[:n, ..., :0], key[:n, ..., :0], None, scores=(), mask=mask, weights=Softmax(), scale=scale) for mask, n in masks]
    specs, arrays = (sum(found, ()) for found in zip(*((program.specs.mask, data.operands.mask) for program, data in bound)))
    parts = dataclasses.replace(program.parts, mask=strip(functools.reduce(operator.and_, (mask for mask, _ in masks))))
    program = dataclasses.replace(program, parts=parts, specs=program.specs._replace(mask=specs))
    return program, data._replace(operands=data.operands._replace(mask=arrays))


# Executions ---------------------------------------------------------------------------------------------------------


def _tiled(operands: Blocks, count: int) -> Blocks:
    """The operands of so many windows; those of all alike as they are."""
    return jax.tree.map(lambda x: jnp.tile(x, (count // x.shape[0], *(1,) * (x.ndim - 1))) if 1 < x.shape[0] < count else x, operands)


@functools.partial(jax.jit, static_argnums=0)
def _blockwise(program: Program, data: Data, sink):
    """Output [NW, K, G, S, Hv] of one block of windows after another."""
    nw, k, g, length, _ = data.query.shape
    most = max(1, PAIRS // (k * g * length * length))
    size = -(-nw // -(-nw // most))
    blocks = -(-nw // size)
    leaves, structure = jax.tree.flatten(_tiled(data.operands, nw))

    def cut(x):  # [NW, ..] in blocks
        return jnp.pad(x, [(0, blocks * size - nw)] + [(0, 0)] * (x.ndim - 1)).reshape(blocks, size, *x.shape[1:])

    moving = [n for n, x in enumerate(leaves) if nw > 1 and x.shape[0] == nw]

    @jax.checkpoint
    def block(given):
        (q, k, v), operands = given
        mine = dict(zip(moving, operands))
        here = data._replace(query=q, key=k, value=v, operands=jax.tree.unflatten(structure, [mine.get(n, x) for n, x in enumerate(leaves)]))
        return execute_reference(program, here, sink)[0]

    out = lax.map(block, (tuple(map(cut, (data.query, data.key, data.value))), [cut(leaves[n]) for n in moving]))
    return out.reshape(-1, *out.shape[2:])[:nw]


_attend = jax.jit(window.attend, static_argnums=0)


def _plan(program: Program, operands: Blocks, query, key, value) -> tuple[window.Plan, Blocks]:
    """How the kernels are to be run, and their operands, or NotImplementedError that says what they lack for a call."""
    interpret, platform = fused.target()
    lacks, instead = "implementation='pallas': the window kernels", "use 'blockwise' or 'reference'"
    parts, weights, length = program.parts, program.parts.weights, query.shape[1]
    if platform not in fused.PLATFORMS:
        raise NotImplementedError(f"{lacks} are for TPU and GPU, the backend is {platform!r}; {instead} (attnx.core.fused.forced() emulates them)")
    if length > LONGEST[platform]:
        raise NotImplementedError(f"{lacks} hold whole maps, of {LONGEST[platform]} tokens at the most, got {length}; {instead}, or attnx.attention")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(f"{lacks} want as many heads of keys as of queries, {query.shape[2]}, got {key.shape[2]}; repeat the keys, or {instead}")
    if min(query.shape[3], value.shape[3]) == 1:
        raise NotImplementedError(f"{lacks} take no heads of size 1, which are no matrix; {instead}")
    if any(isinstance(score, Similarity) for score in parts.scores):
        raise NotImplementedError(f"{lacks} take several heads in one product, and no similarity in its place; {instead}")
    if (weights.statistics or weights.normalized) and not isinstance(weights, Exponential):
        raise NotImplementedError(f"{lacks} compute weights of the exponential family, and elementwise ones, not {type(weights).__name__}; {instead}")
    if any(x.ndim > 5 for x in jax.tree.leaves(operands)):
        raise NotImplementedError(f"{lacks} take no operands with axes of their own (None among an Operand's axes); {instead}")
    dtypes = {"tpu": (jnp.float32, jnp.bfloat16), "gpu": (jnp.float32, jnp.bfloat16, jnp.float16)}[platform]
    if interpret is False and query.dtype not in dtypes:
        raise NotImplementedError(f"{lacks} compute in {', '.join(x.__name__ for x in dtypes)}, not in {query.dtype}; {instead}")
    operands = map_operands(lambda x, spec: _pairs_of(x, length) if spec.offset else x, operands, program.specs)
    specs = jax.tree.map(lambda s: s._replace(query=True, key=True, offset=False) if s.offset else s, program.specs, is_leaf=lambda s: isinstance(s, Spec))
    return window.Plan(parts, specs, fused.default_sizes("window", platform, query, value), platform, interpret), operands


def _pairs_of(x, length: int):
    """An offset table [.., 2 S - 1] at the pairs of a window, [.., S, S]."""
    place = jnp.arange(length)
    return x[..., place - place[:, None] + length - 1]
