"""A call of the pairs engine as a static program and its arrays.

:func:`bind` splits parts into what is static (:class:`Program`, hashable: it keys compilation) and what is data (:class:`Data`, a
pytree: gradients and transformations act on it), and brings every operand into one canonical layout

    [batch, kv_head, group, query, key, *None axes]      or, for an 'offset' table,      [batch, kv_head, group, offset]

with size 1 where the operand does not vary. Head n of the query is group ``n % G`` of key-value head ``n // G``.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Blocks, Operand, Similarity, Sizes, Spec
from pallas_kernels.products import Products
from pallas_kernels.static import Parts, strip


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a call."""

    parts: Parts
    specs: Blocks  # of tuples of Spec
    sizes: Sizes
    contiguous: bool  # consecutive positions inside every block, so that offset tables may be read by slices

    @property
    def flat_specs(self) -> list[Spec]:
        """The specs of all operands, in tree order."""
        return [spec for group in (*self.specs.scores, self.specs.mask, self.specs.weights) for spec in group]

    def inexact_specs(self, operands: Blocks) -> list[Spec]:
        """The specs of those operands that have gradients, in tree order."""
        return [spec for x, spec in zip(jax.tree.leaves(operands), self.flat_specs, strict=True) if jnp.issubdtype(x.dtype, jnp.inexact)]


class Data(NamedTuple):
    """The arrays of a call, heads split into (kv_head, group)."""

    query: Any  # [B, K, G, T, H]
    key: Any  # [B, K, S, H]
    value: Any  # [B, K, S, Hv], or None where only row statistics are wanted
    operands: Blocks
    query_positions: Any  # [B or 1, T]
    key_positions: Any  # [B or 1, S]
    seed: Any  # uint32 [2]
    origin: Any  # int32 [2]: which batch element and key-value head of the whole call comes first here


def bind_operand(operand: Operand, sizes: Sizes, owner: str) -> tuple[jax.Array, Spec]:
    """An operand in the canonical layout, and how it varies."""
    array, axes = jnp.asarray(operand.array), operand.axes
    if len(axes) != jnp.ndim(array):
        raise ValueError(f"{owner}: expected an array with axes {axes}, got shape {jnp.shape(array)}")
    groups = sizes.heads // sizes.kv_heads
    low, high = sizes.offsets
    full = {"batch": sizes.batch, "head": sizes.heads, "kv_head": sizes.kv_heads, "query": sizes.queries, "key": sizes.keys,
            "offset": high - low + 1}
    named = [a for a in axes if a is not None]
    if len(set(named)) < len(named) or not set(named) <= set(full):
        raise ValueError(f"{owner}: operand axes must be distinct names among {sorted(full)}, got {axes}")
    if "offset" in named and ({"query", "key"} & set(named) or None in axes):
        raise ValueError(f"{owner}: an 'offset' operand has no other position axis and no None axis, got {axes}")
    if {"head", "kv_head"} <= set(named):
        raise ValueError(f"{owner}: an operand varies over 'head' or 'kv_head', not both, got {axes}")
    for name, length in zip(axes, array.shape):
        if name is not None and length not in (1, full[name]):
            raise ValueError(f"{owner}: expected {name} axis of size 1 or {full[name]}, got {length} in shape {array.shape} with axes {axes}")

    varies = [i for i, (name, size) in enumerate(zip(axes, array.shape)) if name is None or size != 1]
    array, axes = array.reshape([array.shape[i] for i in varies]), tuple(axes[i] for i in varies)

    def size(name):
        return array.shape[axes.index(name)] if name in axes else 1

    heads = "head" if "head" in axes else "kv_head"
    order: list[int] = [axes.index(n) for n in ("batch", heads, "query", "key", "offset") if n in axes]
    order += [i for i, n in enumerate(axes) if n is None]
    extra = [array.shape[i] for i, n in enumerate(axes) if n is None]
    kv, group = (1, 1) if size(heads) == 1 else (sizes.kv_heads, groups if heads == "head" else 1)
    positions = [size("offset")] if "offset" in axes else [size("query"), size("key")]
    spec = Spec(size("batch") > 1, kv > 1, group > 1, size("query") > 1, size("key") > 1, "offset" in axes)
    return jnp.transpose(array, order).reshape(size("batch"), kv, group, *positions, *extra), spec


def _bind_part(part, sizes, argument):
    owner = f"{argument} ({type(part).__name__})"
    bound = [bind_operand(operand, sizes, owner) for operand in part.operands(sizes)]
    if len(bound) != part.arity:
        raise ValueError(f"{owner}: expected as many operands as its arity {part.arity}, got {len(bound)}")
    return tuple(a for a, _ in bound), tuple(s for _, s in bound)


def bind(query, key, value, *, scores, mask, weights, scale, dropout_rate=0.0, seed=None, query_positions=None, key_positions=None,
         offsets=None, contiguous=None, products=Products(), dtype=None) -> tuple[Program, Data]:
    """Checks nothing that the caller has not: see :mod:`attnx.core.checks`. ``dtype``: of the output, the query's by default."""
    (b, t, n, h), (s, k) = query.shape, key.shape[1:3]
    if offsets is None:
        reach = max([t, s, *(score.horizon + 1 for score in scores)]) - 1
        offsets = (-(t - 1), s - 1) if query_positions is None and key_positions is None else (-reach, reach)
    sizes = Sizes(b, n, k, t, s, offsets, query.dtype if dtype is None else dtype)
    if contiguous is None:
        contiguous = query_positions is None and key_positions is None
    bound = [(part, *_bind_part(part, sizes, f"scores[{i}]")) for i, part in enumerate(scores)]
    scores, arrays, specs = zip(*sorted(bound, key=lambda x: not isinstance(x[0], Similarity))) if bound else ((), (), ())
    mask_arrays, mask_specs = _bind_part(mask, sizes, "mask") if mask is not None else ((), ())
    weight_arrays, weight_specs = _bind_part(weights, sizes, "weights")
    parts = Parts(tuple(strip(p) for p in scores), strip(mask) if mask is not None else None, strip(weights), float(scale), float(dropout_rate),
                  products)
    program = Program(parts, Blocks(tuple(specs), mask_specs, weight_specs), sizes, contiguous)
    data = Data(
        query=query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4),
        key=key.transpose(0, 2, 1, 3),
        value=None if value is None else value.transpose(0, 2, 1, 3),
        operands=Blocks(tuple(arrays), mask_arrays, weight_arrays),
        query_positions=_positions(query_positions, t),
        key_positions=_positions(key_positions, s),
        seed=jnp.zeros(2, jnp.uint32) if seed is None else seed,
        origin=jnp.zeros(2, jnp.int32),
    )
    return program, data


def _positions(positions, length):
    if positions is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.asarray(positions, jnp.int32)
    return positions[None] if positions.ndim == 1 else positions


def unbind_output(out, dtype):
    """[B, K, G, T, X] as [B, T, N, X] in the query's dtype."""
    b, k, g, t, x = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, x).astype(dtype)


def partition(tree):
    """The inexact leaves of a pytree, the others, and a function that joins them again: custom gradients need them apart."""
    leaves, structure = jax.tree.flatten(tree)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def join(chosen, others):
        chosen, others = iter(chosen), iter(others)
        return jax.tree.unflatten(structure, [next(chosen) if f else next(others) for f in inexact])

    return [x for f, x in zip(inexact, leaves) if f], [x for f, x in zip(inexact, leaves) if not f], join
