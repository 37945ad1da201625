"""The tiles a kernel visits, as one list in scalar memory: empty tiles cost nothing, full ones need no mask.

A tile table (:class:`~pallas_kernels.parts.Cover`: may some pair be allowed, is every one) becomes, for each batch element and key-value
head over which it varies, a list of steps sorted by query block (or by key block). A step packs both
block numbers and four bits into an int32. A block without any tile keeps one empty step, so that its result is written.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.parts import Cover

EMPTY, PARTIAL, FULL = 0, 1, 2
_BITS = 14  # of a block number
_FIRST, _LAST = 4, 8
SCALARS = 1 << 17  # steps in scalar memory, half of it


class Schedule(NamedTuple):
    """``steps`` int32 [B or 1, K or 1, nq * nk], of which at the most the first ``count`` [] are worth a visit."""

    steps: Any
    count: Any


class Step(NamedTuple):
    """A step, unpacked: the outer and the inner block, EMPTY, PARTIAL or FULL, and whether it is the first or last of its outer block."""

    outer: Any
    inner: Any
    kind: Any
    first: Any
    last: Any


def unpack(step) -> Step:
    """The contents of a packed step."""
    return Step(step >> (_BITS + 4), (step >> 4) & ((1 << _BITS) - 1), step & 3, (step & _FIRST) != 0, (step & _LAST) != 0)


def schedule(table: Cover, *, by_key: bool = False, varies=(True, True)) -> Schedule:
    """The steps of a tile table [B or 1, K or 1, G or 1, nq, nk], united over groups.

    Args:
      by_key: key blocks outside, query blocks inside, rather than the other way round.
      varies: whether the lists may differ over batch elements and over key-value heads; united where not.
    """
    axes = (*(axis for axis, own in enumerate(varies) if not own), 2)
    united = table.some.any(axes, keepdims=True)[:, :, 0], table.every.all(axes, keepdims=True)[:, :, 0]
    some, every = (jnp.swapaxes(x, -1, -2) if by_key else x for x in united)
    blocks, steps = some.shape[-2:]
    if max(blocks, steps) >= 1 << (_BITS - 1) or some.size > SCALARS:
        raise NotImplementedError(f"implementation='pallas': {some.size} tiles exceed the schedule's {SCALARS}; use larger block_sizes, or 'blockwise'")
    outer, inner = jnp.arange(blocks, dtype=jnp.int32)[:, None], jnp.arange(steps, dtype=jnp.int32)
    kept = some | (~some.any(-1, keepdims=True) & (inner == 0))
    first = inner == jnp.min(jnp.where(kept, inner, steps), -1, keepdims=True)
    last = inner == jnp.max(jnp.where(kept, inner, -1), -1, keepdims=True)
    kind = jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY)
    packed = outer << (_BITS + 4) | inner << 4 | jnp.where(last, _LAST, 0) | jnp.where(first, _FIRST, 0) | kind
    packed, kept = (x.reshape(*x.shape[:-2], blocks * steps) for x in (packed, kept))
    idle = jnp.max(jnp.where(kept, packed, 0), -1, keepdims=True) & ~jnp.int32(15)  # at the end of a list nothing is fetched, computed or written
    count = kept.sum(-1, keepdims=True, dtype=jnp.int32)
    listed = jnp.sort(jnp.where(kept, packed, jnp.iinfo(jnp.int32).max), axis=-1)
    return Schedule(jnp.where(jnp.arange(blocks * steps) < count, listed, idle).astype(jnp.int32), count.max())
