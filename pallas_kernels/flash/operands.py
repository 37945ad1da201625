"""How arrays reach a kernel: their layout in memory, the window of a tile, and where the gradients of operands add up.

Row quantities (one number a query) travel along lanes, [1, T], and are turned into columns [bq, 1] on chip: an array [T, 1] would occupy
128 lanes a number. An 'offset' table lies on chip whole; a rotation by one more lane in each row spreads a window of it over the tile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.parts import Spec

LANES = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """An array in memory and the block of it that a grid step sees.

    Attributes:
      array: what is read, or the shape and dtype of what is written.
      shape: of the block; None removes an axis.
      place: what numbers the blocks along each axis: 'b', 'k', 'g' (the head), 'i', 'j' (the tile), or None for the only one.
      turned: the block is a row [1, n] whose tile wants a column [n, 1].
    """

    array: Any
    shape: tuple
    place: tuple
    turned: bool = False

    def spec(self, index) -> pl.BlockSpec:
        """The block specification; ``index(*grid indices and scalars) -> {name: number}``."""
        return pl.BlockSpec(self.shape, lambda *args: tuple(0 if n is None else index(*args)[n] for n in self.place))


class Form(NamedTuple):
    """The static description of an operand within a head."""

    kind: str  # what it varies over: 'query', 'key', 'pair', 'whole' (neither) or 'offset'
    spec: Spec
    extra: tuple  # sizes of its None axes
    dtype: Any

    @property
    def lead(self):
        return tuple(name if varies else None for name, varies in zip("bkg", self.spec))


def form(x, spec: Spec) -> Form:
    """The form of a canonical operand [batch, kv_head, group, query, key, *None axes] or [batch, kv_head, group, offset]."""
    kinds = {(True, True): "pair", (True, False): "query", (False, True): "key", (False, False): "whole"}
    return Form("offset" if spec.offset else kinds[spec.query, spec.key], spec, x.shape[5:], x.dtype)


def matrix(x, lead, name: str, size: int) -> Window:
    """[.., n, X] cut into blocks [size, X]."""
    return Window(x, (None,) * len(lead) + (size, x.shape[-1]), (*lead, name, None))


def line(x, lead, name: str, size: int, *, turned: bool = False) -> Window:
    """Numbers [.., n] along lanes, [.., 1, n], cut into blocks [1, size]."""
    return Window(x[..., None, :], (None,) * len(lead) + (1, size), (*lead, None, name), turned)


def row_output(x, plan) -> Window:
    """Numbers [B, K, G, T] to be written along lanes."""
    *lead, length = x.shape
    return Window(jax.ShapeDtypeStruct((*lead, 1, length), x.dtype), (None, None, None, 1, plan.bq), ("b", "k", "g", None, "i"))


def padded_offsets(length: int) -> int:
    """The length of an offset table in memory: windows start at whole lanes."""
    return length + LANES + -length % LANES


def window(x, form: Form, bq: int, bk: int, transposed: bool) -> Window:
    """The window of a canonical operand that was padded to whole blocks, for tiles [bq, bk] or, transposed, [bk, bq]."""
    if form.kind == "offset":
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, padded_offsets(x.shape[3]) - x.shape[3])], mode="edge")
        return Window(x[..., None, :], (None, None, None, 1, x.shape[3]), (*form.lead, None, None))
    x = x.astype(jnp.int8) if x.dtype == bool else x
    more = (None,) * len(form.extra)
    if form.kind == "pair":
        return Window(x, (None, None, None, bq, bk, *form.extra), (*form.lead, "i", "j", *more))
    if form.kind == "whole":
        return Window(x, (None, None, None, 1, 1, *form.extra), (*form.lead, None, None, *more))
    name, size = ("i", bq) if form.kind == "query" else ("j", bk)
    x = x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *form.extra)
    if form.extra:
        return Window(x, (None, None, None, size, *form.extra), (*form.lead, name, *more))
    return line(x, form.lead, name, size, turned=form.kind == ("key" if transposed else "query"))


def wide(dtype):
    """The dtype of at least 32 bits, which the vector units can transpose, that holds numbers of ``dtype``."""
    return jnp.promote_types(dtype, jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32)


def _wide(x):
    return x.astype(wide(x.dtype))


def column(row):
    """[1, n] as [n, 1]."""
    return _wide(row).T


def row(column):
    """[n, 1] as [1, n]."""
    return _wide(column).T


def block(x, form: Form, transposed: bool):
    """What a part sees, [bq or 1, bk or 1, *None axes] or its transpose, of an operand's window (lines already turned)."""
    if form.extra and form.kind in ("query", "key"):
        x = jnp.expand_dims(x, 1 if (form.kind == "query") != transposed else 0)
    elif transposed and form.kind in ("pair", "offset"):
        x = jnp.swapaxes(_wide(x), 0, 1)
    return x != 0 if form.dtype == bool else x.astype(form.dtype)


# Offset tables ------------------------------------------------------------------------------------------------------


def _aligned(start):
    return pl.multiple_of((start >> 7) << 7, LANES), start & (LANES - 1)


def spread(ref, start, bq: int, bk: int):
    """The tile [bq, bk] whose entry (a, b) is ``ref[0, start + bq - 1 + b - a]``."""
    base, rest = _aligned(start)
    width = bq + bk
    line = jnp.broadcast_to(_wide(ref[:, pl.ds(base, width + LANES)]), (8, width + LANES))
    line = pltpu.roll(line, (width + LANES - rest) % (width + LANES), 1)[:1, :width]
    return pltpu.roll(jnp.broadcast_to(line, (bq, width)), bk + 1, 1, stride=1, stride_axis=0)[:, :bk]


def add_gathered(ref, tile, start):
    """The transpose of :func:`spread`: adds a tile's diagonals to the table, halving the rows while shifting them into line."""
    bq, bk = tile.shape
    base, rest = _aligned(start)
    width = bq + bk
    x = jnp.concatenate([tile, jnp.zeros((bq, bq), tile.dtype)], 1)
    rows = bq
    while rows > 1:
        rows //= 2
        x = (pltpu.roll if rows >= 8 else jnp.roll)(x[:rows], rows, 1) + x[rows:]
    x = jnp.broadcast_to(jnp.concatenate([x, jnp.zeros((1, LANES), x.dtype)], 1), (8, width + LANES))
    ref[:, pl.ds(base, width + LANES)] += pltpu.roll(x, rest, 1)[:1]
