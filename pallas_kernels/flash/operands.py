"""How the operands of parts reach a kernel: their layout in memory, the window of a tile, and where their gradients add up.

Row quantities (one number a query) travel along lanes, [1, T], and are turned into [bq, 1] columns on chip: a [T, 1] array would occupy
128 lanes a number. An 'offset' table stays on chip whole; a strided rotation spreads its window over the tile.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def kind(spec) -> str:
    """What an operand varies over within a head: 'offset', 'pair', 'query', 'key' or 'whole'."""
    if spec.offset:
        return "offset"
    return {(True, True): "pair", (True, False): "query", (False, True): "key", (False, False): "whole"}[spec.query, spec.key]


class Window(NamedTuple):
    """The block of an array that a tile reads: its shape (None: squeezed) and, from (b, k, g, i, j), its place."""

    shape: tuple
    place: tuple  # of names among 'b', 'k', 'g', 'i', 'j' or None for 0


def _lead(spec):
    return tuple(name if varies else None for name, varies in zip("bkg", (spec.batch, spec.kv, spec.group)))


def prepare(x, spec, plan):
    """A canonical operand [b, k, g, T or 1, S or 1, *None axes] (or [b, k, g, offset]) as the kernels read it, and its window."""
    which, extra, lead = kind(spec), x.shape[5:], _lead(spec)
    if x.dtype == bool:
        x = x.astype(jnp.int8)
    if which == "offset":
        right = plan.bq + plan.bk + 2 * LANES  # room for the aligned window of the last tile
        right += -(x.shape[3] + plan.bq + right) % LANES
        x = jnp.pad(x, [(0, 0)] * 3 + [(plan.bq, right)], mode="edge")[:, :, :, None]
        return x, Window((None, None, None, 1, x.shape[4]), (*lead, None, None))
    sizes, names = {"pair": ((plan.bq, plan.bk), "ij"), "query": ((plan.bq,), "i"), "key": ((plan.bk,), "j"), "whole": ((1, 1), (None, None))}[which]
    if which == "query":
        x = x.reshape(*x.shape[:3], 1, x.shape[3]) if not extra else x.reshape(*x.shape[:4], *extra)
    elif which == "key" and extra:
        x = x.reshape(*x.shape[:3], x.shape[4], *extra)
    if which in ("query", "key") and not extra:
        sizes, names = (1, *sizes), (None, *names)
    return x, Window((None, None, None, *sizes, *extra), (*lead, *names, *(None,) * len(extra)))


def wide(x):
    """32-bit numbers, which the vector units transpose."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x.astype(jnp.promote_types(x.dtype, jnp.int32))


def column(row):
    """[1, n] as [n, 1]."""
    return wide(row).T


def row(column):
    """[n, 1] as [1, n]."""
    return wide(column).T


def block(ref, spec, dtype, plan, start):
    """The block [bq or 1, bk or 1, *None axes] that a part sees, from the window's ref.

    ``start`` is the entry of an offset table at the tile's lowest offset.
    """
    which, extra = kind(spec), len(ref.shape) - 2
    if which == "offset":
        return _spread(ref, plan, start)
    x = ref[...]
    if which == "query":
        x = column(x) if x.shape[0] == 1 and len(x.shape) == 2 and plan.bq > 1 and not _whole(x, plan) else jnp.expand_dims(x, 1)
    elif which == "key" and extra + 1 and x.shape[0] == plan.bk:
        x = jnp.expand_dims(x, 0)
    return x != 0 if dtype == bool else x.astype(dtype)
