"""The tiles a kernel visits, as one list in scalar memory: empty tiles cost nothing, full ones need no mask.

A tile table (:class:`~pallas_kernels.parts.Cover`: may some pair be allowed, is every one) becomes, for each batch element and key-value
head over which it varies, a list of steps sorted by query block (or by key block). A step packs its query block, its
key block and four bits into an int32. A block without any tile keeps one empty step, so that its result is written.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.parts import Cover

EMPTY, PARTIAL, FULL = 0, 1, 2
_BITS = 14  # of a block number
LIMIT = 1 << _BITS
_FIRST, _LAST = 4, 8


class Schedule(NamedTuple):
    """``steps`` int32 [B or 1, K or 1, nq * nk], of which the first ``count`` [] at the most are worth a visit."""

    steps: Any
    count: Any


class Step(NamedTuple):
    """A step, unpacked: query block, key block, EMPTY, PARTIAL or FULL, and whether its run of equal outer blocks starts or ends here."""

    i: Any
    j: Any
    kind: Any
    first: Any
    last: Any


def unpack(step) -> Step:
    """The contents of a packed step."""
    return Step((step >> (_BITS + 4)), (step >> 4) & (LIMIT - 1), step & 3, (step & _FIRST) != 0, (step & _LAST) != 0)


def schedule(table: Cover, *, by_key: bool = False, varies=(True, True)) -> Schedule:
    """The steps of a tile table [B or 1, K or 1, G or 1, nq, nk], united over groups.

    Args:
      by_key: key blocks outside, query blocks inside.
      varies: whether the lists may differ over batch elements and over key-value heads; united where not.
    """
    axes = (*(axis for axis, own in enumerate(varies) if not own), 2)
    some, every = table.some.any(axes, keepdims=True)[:, :, 0], table.every.all(axes, keepdims=True)[:, :, 0]
    kind = jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY).astype(jnp.int32)
    nq, nk = kind.shape[-2:]
    if max(nq, nk) > LIMIT // 2:
        raise NotImplementedError(f"a schedule of {nq} x {nk} tiles: at most {LIMIT // 2} blocks; use larger ones")
    i, j = jnp.arange(nq, dtype=jnp.int32)[:, None], jnp.arange(nk, dtype=jnp.int32)
    inner = j if not by_key else i
    axis = -2 if by_key else -1
    kept = (kind > EMPTY) | (~(kind > EMPTY).any(axis, keepdims=True) & (inner == 0))
    first = inner == jnp.min(jnp.where(kept, inner, LIMIT), axis, keepdims=True)
    last = inner == jnp.max(jnp.where(kept, inner, -1), axis, keepdims=True)
    place = (i << (_BITS + 4)) | (j << 4)
    steps = place | kind | jnp.where(first, _FIRST, 0) | jnp.where(last, _LAST, 0)

    def listed(x):
        x = jnp.swapaxes(x, -1, -2) if by_key else x
        return x.reshape(*x.shape[:-2], nq * nk)

    steps, kept = listed(steps), listed(kept)
    count = kept.sum(-1, keepdims=True, dtype=jnp.int32)
    steps = jnp.take_along_axis(steps, jnp.argsort(~kept, axis=-1, stable=True), axis=-1)
    final = jnp.take_along_axis(steps, count - 1, axis=-1)
    idle = final & ~jnp.int32(15)  # stays where the list ended: nothing is fetched, computed or written
    return Schedule(jnp.where(jnp.arange(nq * nk) < count, steps, idle), count.max())
