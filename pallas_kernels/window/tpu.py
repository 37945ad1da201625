"""Windows on a TPU core: several windows a program, and as many of their heads at a time as fill the 128 lanes of a register.

Tokens stay as calls bring them, [NW, S, N H]: a program reads the lanes of neighbouring heads. The queries of its heads become the rows of one matrix,
zero but in the lanes of their own head, so that the products with the keys and values, of which all heads lie side by side, are those of every head at once:

    s = k Q^T  [S, heads S],      out = diagonal blocks of  w^T v,      dk = ds Q,  dv = w dO,  dq = diagonal blocks of  ds^T k

Scores are turned, keys along the 8 sublanes and (head, query) along the lanes, and so no lane is idle for windows of fewer than 128 tokens.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as _like
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compat import results_like
from pallas_kernels.flash.operands import LANES, column
from pallas_kernels.parts import At, Spec
from pallas_kernels.products import accumulator_dtype, multiply
from pallas_kernels.tiles import Windows
from pallas_kernels.window.arrays import Plan, inexact
from pallas_kernels.window.tile import weigh

VMEM = 48 * 2**20  # bytes of on-chip memory a kernel may have; the smallest chips have 64 MiB
PAIRS = 2**16  # scores at a time, of several windows together


class Cut(NamedTuple):
    """How a call is cut: ``programs`` along the heads, ``together`` heads each, and along the windows, ``windows`` each, ``abreast`` at a time."""

    heads: int
    length: int
    rows: int  # of a head, the length in whole registers
    together: int
    programs: int
    windows: int
    abreast: int

    @property
    def lanes(self) -> int:
        """The queries of all heads of a program."""
        return self.together * self.rows


def cut_call(query, value, operands, sizes: Windows) -> Cut:
    """The cut of a call with arrays [NW, S, N, H], [NW, S, N, Hv]."""
    (nw, length, heads, size), value_size = query.shape, value.shape[3]
    tiles = 32 // query.dtype.itemsize  # sublanes of a register
    rows = -(-length // tiles) * tiles
    lanes = lambda n: n * size % LANES == 0 and n * value_size % LANES == 0
    even = LANES % size == 0 and size == value_size and heads * size > LANES
    together = LANES // size if even else min((n for n in range(1, heads) if heads % n == 0 and lanes(n)), default=heads)
    most = max(1, sizes.memory // (rows * 2 * together * (4 * size + 3 * value_size) * query.dtype.itemsize))
    most = min(most, sizes.windows)
    period = max([x.shape[0] for x in jax.tree.leaves(operands) if x.shape[0] < nw], default=1)
    windows = _share(period, most, exact=True) if period > most else period * _share(nw // period, most // period)
    abreast = max(n for n in range(1, sizes.abreast + 1) if windows % n == 0 and (n == 1 or n * rows * rows * together <= PAIRS))
    return Cut(heads, length, rows, together, -(-heads // together), windows, abreast)


def _share(n: int, most: int, exact: bool = False) -> int:
    """How many of ``n`` at a time, ``most`` at the most: a divisor, or unless it has to be ``exact``, parts as equal as they can be where no divisor is near."""
    divisor = max(m for m in range(1, most + 1) if n % m == 0)
    return divisor if exact or 2 * divisor >= min(n, most) else -(-n // -(-n // most))


# Operands -----------------------------------------------------------------------------------------------------------


def _kind(x, spec: Spec) -> str:
    """'pair' [keys, lanes], 'row' [1, lanes], or 'key' [1, keys], which is read as a column."""
    return "row" if not spec.key else "pair" if spec.query or spec.kv or inexact(x) else "key"


def _lay(cut: Cut, kind: str, x):
    """An operand [n, N or 1, 1, S or 1, S or 1] as programs read it: [programs or 1, n, keys or 1, lanes], or for keys alone [1, n, 1, keys]."""
    x = x.astype(jnp.int8) if x.dtype == bool else x
    n, more = x.shape[0], cut.rows - cut.length
    if x.shape[4] > 1:
        x = jnp.pad(x, [(0, 0)] * 4 + [(0, more)], mode="edge")
    if kind == "key":
        return x.reshape(1, n, 1, cut.rows)
    x = jnp.broadcast_to(x[:, :, 0], (n, x.shape[1], cut.length, x.shape[4]))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)), mode="edge")
    if x.shape[1] == 1:
        x = jnp.broadcast_to(x, (n, cut.together, *x.shape[2:]))
    else:
        x = jnp.pad(x, ((0, 0), (0, cut.programs * cut.together - cut.heads), (0, 0), (0, 0)), mode="edge")
    x = x.reshape(n, -1, cut.lanes, x.shape[3])
    return x.transpose(1, 0, 3, 2)


def _see(ref, kind: str, dtype, w):
    """What the parts see of a laid operand in a window."""
    x = ref[w] if len(ref.shape) == 3 else ref[...]
    x = column(x) if kind == "key" else x
    return x.astype(dtype) if jnp.issubdtype(dtype, jnp.number) else x != 0


# Programs -----------------------------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """A window inside a program: its tokens and what the parts see.

    Attributes:
      rows: the tokens of each array, [rows, lanes of the heads], zeros beyond the window.
      at, blocks: of its scores.
    """

    plan: Plan
    cut: Cut
    rows: list
    at: At
    blocks: Any

    def by_head(self, x):
        """[rows, lanes of the heads] as a row for each head and token, [lanes, lanes of the heads], zero but in the lanes of its head."""
        return jnp.concatenate([jnp.where(self._mine(x, head), x, 0) for head in range(self.cut.together)])

    def of_heads(self, x):
        """The reverse: of the rows of each head its own lanes."""
        rows = self.cut.rows
        whole = x[:rows]
        for head in range(1, self.cut.together):
            whole = jnp.where(self._mine(whole, head), x[head * rows:(head + 1) * rows], whole)
        return whole[:self.cut.length]

    def _mine(self, x, head: int):
        return lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 1), jnp.int32(x.shape[1] // self.cut.together)) == head

    def scale_rows(self):
        """Whether the queries are scaled rather than the scores: it is less work, where it loses nothing."""
        scale, q = self.plan.parts.scale, self.rows[0]
        return math.frexp(scale)[0] == 0.5 or q.dtype == accumulator_dtype(q.dtype)

    def weigh(self):
        """The queries by head, scaled or not; their turned weights; and how to pull back."""
        q, k = self.rows[:2]
        early, scale = self.scale_rows(), self.plan.parts.scale
        q = self.by_head(q * scale if early and scale != 1.0 else q)
        raw = multiply(k, q, (1, 1))
        return q, *weigh(self.plan.parts, raw if early else raw * scale, self.at, self.blocks, keys=self.cut.length, axis=0)


def forward(plan: Plan, query, key, value, operands):
    """As :func:`pallas_kernels.window.attend`."""
    def window(here: _Window, outputs, w):
        v = here.rows[2]
        _, weights, _ = here.weigh()
        outputs[0][w] = here.of_heads(multiply(weights.astype(v.dtype), v, (0, 0))).astype(outputs[0].dtype)

    cut = cut_call(query, value, operands, plan.sizes)
    return _launch(plan, cut, (query, key, value), operands, window, [_like(value.shape, query.dtype)], [], "window_forward")[0]


def backward(plan: Plan, query, key, value, operands, cotangent):
    """The gradients of query, key and value, and a list of those of the operands that have one."""
    def window(here: _Window, outputs, w):
        (dq, dk, dv), sums = outputs[:3], outputs[3:]
        _, k, v, do = here.rows
        q, weights, pull = here.weigh()
        do = here.by_head(do)
        dv[w] = multiply(weights.astype(do.dtype), do, (1, 0))[:cut.length].astype(dv.dtype)
        ds, found = pull(multiply(v, do, (1, 1)))
        for ref, x in zip(sums, found):
            if len(ref.shape) == 3:
                ref[w] = x
            else:
                ref[...] += x
        ds, scale = ds.astype(k.dtype), plan.parts.scale
        x, y = here.of_heads(multiply(ds, k, (0, 0))) * scale, multiply(ds, q, (1, 0))[:cut.length]
        dq[w], dk[w] = x.astype(dq.dtype), (y if here.scale_rows() else y * scale).astype(dk.dtype)

    cut, dtype = cut_call(query, value, operands, plan.sizes), accumulator_dtype(query.dtype)
    chosen = [(x, _kind(x, spec)) for x, spec in zip(jax.tree.leaves(operands), plan.flat_specs(), strict=True) if inexact(x)]
    laid, pulls = zip(*(jax.vjp(partial(_lay, cut, kind), x.astype(dtype)) for x, kind in chosen)) if chosen else ((), ())
    tokens = query, key, value
    dq, dk, dv, *found = _launch(plan, cut, (*tokens, cotangent), operands, window, [_like(x.shape, x.dtype) for x in tokens],
                                 [_like((cut.programs, *x.shape[1:]), x.dtype) for x in laid], "window_backward")
    found = [x.sum(0, keepdims=True) if like.shape[0] == 1 else x for x, like in zip(found, laid)]
    return dq, dk, dv, [pull(x)[0] for pull, x in zip(pulls, found)]


def _launch(plan: Plan, cut: Cut, tokens, operands, window, outputs, sums, name: str):
    """Runs ``window(here, output refs, w)`` for every window; ``outputs`` are tokens, ``sums`` laid gradients of operands, summed over windows or not."""
    nw, length, heads, _ = tokens[0].shape
    leaves, structure = jax.tree.flatten(operands)
    kinds = [_kind(x, spec) for x, spec in zip(leaves, plan.flat_specs(), strict=True)]
    more = -nw % cut.windows

    def lanes(x):
        return _like((nw + more, length, heads * x.shape[3]), x.dtype)

    def by_window(x):
        return pl.BlockSpec((cut.windows, length, cut.together * (x.shape[2] // heads)), lambda i, j: (j, 0, i))

    def summed(x):
        n = x.shape[1]
        wide = (cut.programs, n + more if n == nw else 1, *x.shape[2:])
        return _like(wide, x.dtype), _block(cut, wide)

    read = [jnp.pad(x.reshape(nw, length, -1), ((0, more), (0, 0), (0, 0))) for x in tokens]
    laid = [_fit(cut, nw, _lay(cut, kind, x)) for x, kind in zip(leaves, kinds)]
    written, wide = [lanes(x) for x in outputs], [summed(x) for x in sums]
    fold = any(x.shape[1] == 1 and nw > 1 for x in sums)

    def kernel(*refs):
        ins, refs = refs[:len(read)], refs[len(read):]
        given, outs = refs[:len(laid)], refs[len(laid):]
        program = pl.program_id(0)

        if sums:
            @pl.when(pl.program_id(1) == 0)
            def _():
                for ref in outs[len(written):]:
                    if len(ref.shape) == 2:
                        ref[...] = jnp.zeros(ref.shape, ref.dtype)

        first = pl.program_id(1) * cut.windows
        rows, lane = lax.broadcasted_iota(jnp.int32, (cut.rows, 1), 0), lax.broadcasted_iota(jnp.int32, (1, cut.lanes), 1)
        head, place = program * cut.together + lax.div(lane, jnp.int32(cut.rows)), lax.rem(lane, jnp.int32(cut.rows))

        def step(n, _):
            for w in range(cut.abreast):
                w = n * cut.abreast + w
                at = At(first + w, head, place, jnp.where(rows < length, rows, -1))
                blocks = jax.tree.unflatten(structure, [_see(ref, kind, x.dtype, w) for ref, kind, x in zip(given, kinds, leaves)])
                window(_Window(plan, cut, [whole(ref[w], program) for ref in ins], at, blocks), outs, w)

        lax.fori_loop(0, cut.windows // cut.abreast, step, None)

    def whole(x, program):
        size = x.shape[1] // cut.together
        if cut.programs * cut.together > heads:  # the last program reads beyond the heads
            x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < (heads - program * cut.together) * size, x, 0)
        return jnp.pad(x, ((0, cut.rows - length), (0, 0)))

    out = pl.pallas_call(
        kernel, results_like([*written, *(x for x, _ in wide)], [*read, *laid]), grid=(cut.programs, (nw + more) // cut.windows),
        in_specs=[by_window(x) for x in read] + [_block(cut, x.shape) for x in laid],
        out_specs=[by_window(x) for x in written] + [spec for _, spec in wide],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary" if fold else "parallel"), vmem_limit_bytes=VMEM),
        interpret=plan.interpret, name=name)(*read, *laid)
    found = [x[:nw].reshape(like.shape) for x, like in zip(out, outputs)]
    return *found, *(x[:, :like.shape[1]] for x, like in zip(out[len(written):], sums))


def _fit(cut: Cut, nw: int, x):
    """A laid operand with as many windows as its blocks need."""
    n = x.shape[1]
    if n == nw:
        return jnp.pad(x, ((0, 0), (0, -n % cut.windows), (0, 0), (0, 0)))
    return jnp.tile(x, (1, cut.windows // n, 1, 1)) if 1 < n < cut.windows else x


def _block(cut: Cut, shape) -> pl.BlockSpec:
    """The block of a laid operand with such a shape: [windows, .., ..], or [.., ..] of all windows."""
    programs, n, *inner = shape
    blocks = max(1, n // cut.windows)
    return pl.BlockSpec((None, cut.windows if n > 1 else None, *inner),
                        lambda i, j: (i if programs > 1 else 0, lax.rem(j, jnp.int32(blocks)) if n > 1 else 0, 0, 0))
