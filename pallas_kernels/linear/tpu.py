"""The recurrent engine on a TPU core: one kernel that carries the state along the sequence, and its transpose.

The grid is (batch element, head of the state, slab of tokens). The slabs of a head come one after the other, the chunks of a slab in a loop,
and the state stays on chip from the first token to the last. For a gradient the forward kernel also writes the state that arrives at
each slab; the backward kernel takes the slabs in reverse order, recomputes the states that arrive at the chunks of one, and carries the
state's cotangent. Both call :func:`pallas_kernels.linear_tile.attend`, the backward one under ``jax.vjp``.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import linear_tile
from pallas_kernels.compat import results_like
from pallas_kernels.linear.arrays import State, Tokens, differentiated_once, shared
from pallas_kernels.tile import accumulator_dtype
from pallas_kernels.tiles import Slab

VMEM = 48 * 2**20  # bytes of on-chip memory a kernel may have; the smallest chips have 64 MiB


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call.

    Attributes:
      chunk: tokens of a chunk, a power of two and at least 128.
      chunks: chunks of a slab, whose first state a gradient keeps.
      scale: a factor of the output.
      floor: of the denominator, see :func:`pallas_kernels.linear_tile.divide`.
      interpret: as for ``pallas_call``.
    """

    chunk: int
    chunks: int
    scale: float = 1.0
    floor: float | None = None
    interpret: Any = False

    @property
    def slab(self):
        """Tokens of a slab."""
        return self.chunk * self.chunks


def choose_plan(query, value, states: int, longest: Slab, chunk: int | None = None, **options) -> Plan:
    """The plan of a call with arrays [B, T, N, H], [B, T, K, Hv]: slabs as long as ``longest`` and the sequence allow, of its chunks or given ones."""
    chunk = chunk or longest.chunk
    (_, t, n, h), hv, size = query.shape, value.shape[3], value.dtype.itemsize
    groups = n // states
    # A token's bytes in the backward kernel: read and written, of two slabs at a time.
    token = 2 * 2 * ((groups + 1) * (h + hv) * size + h * accumulator_dtype(value.dtype).itemsize)
    chunks = -(-t // chunk)
    most = longest.chunks
    while most > 1 and most * (chunk * token + h * hv * 4) > longest.memory:
        most //= 2
    slabs = -(-chunks // most)
    chunks = -(-chunks // slabs)
    return Plan(chunk, chunks if chunks == 1 else chunks + chunks % 2, **options)


def _step(plan: Plan, narrow, tokens: Tokens, state: State):
    """``(out, state)`` of one chunk of one head: blocks without the axes B and M, all in the accumulator's dtype."""
    query, key, value, log_decay = tokens
    groups, size, head = query.shape
    key, value, log_decay, memory, normalizer = jax.tree.map(lambda x: x[None], (key, value, log_decay, *state))
    out, denominator, memory, normalizer = linear_tile.attend(
        query.reshape(1, groups * size, head), key, value, log_decay, memory, normalizer, block=size, narrow=narrow)
    out = out if plan.scale == 1.0 else out * plan.scale
    if denominator is not None:
        out = linear_tile.divide(out, denominator * plan.scale, plan.floor)
    return out.reshape(groups, size, -1), jax.tree.map(lambda x: x[0], State(memory, normalizer))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, tokens: Tokens, state: State):
    """``(out [B, M, G, T, Hv] in the query's dtype, state after the last token)``; reverse mode differentiates it once."""
    return _forward(plan, tokens, state, keep=False)[:2]


def _forward(plan, tokens, state, *, keep):
    """``(out, state, states that arrive at the slabs [B, M, slabs, ...] or None)``."""
    b, m, g, t, _ = tokens.query.shape

    def kernel(tokens, initial, out, state, arriving):
        @pl.when(pl.program_id(2) == 0)
        def _():
            _copy(state, initial)

        if keep:
            _copy(arriving, state)

        def body(c):
            result, after = _step(plan, _narrow(tokens), _load(tokens, plan, c), _read(state))
            out[:, _at(plan, c)] = result.astype(out.dtype)
            _copy(state, after)

        _loop(plan, body)

    out = jax.ShapeDtypeStruct((b, m, g, t, tokens.value.shape[3]), tokens.query.dtype)
    slabs = t // plan.slab
    arriving = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, m, slabs, *x.shape[2:]), x.dtype), state) if keep else None
    at = lambda s: s
    outputs, specs = (out, state, arriving), (_along(plan, out, at), _whole(state), _by_slab(arriving, at))
    return _call(kernel, plan, "linear_forward", (tokens, state), (_token_specs(plan, tokens, m, at), _whole(state)), outputs, specs)


@differentiated_once
def _keep(plan, tokens, state):
    out, state, arriving = _forward(plan, tokens, state, keep=True)
    return (out, state), (tokens, arriving)


@differentiated_once
def _backward(plan, residuals, cotangents):
    """The gradients of tokens and initial state."""
    tokens, arriving = residuals
    dout, dfinal = cotangents
    b, m, _, t, _ = tokens.query.shape
    slabs = t // plan.slab

    def kernel(tokens, arriving, dout, dfinal, dtokens, dstate, states):
        step = partial(_step, plan, _narrow(tokens))

        @pl.when(pl.program_id(2) == 0)
        def _():
            _copy(dstate, dfinal)

        jax.tree.map(lambda ref, x: _put(ref.at[0], x[...]), states, arriving)

        def recompute(c):
            _, after = step(_load(tokens, plan, c), _read(states, c))
            jax.tree.map(lambda ref, x: _put(ref.at[c + 1], x), states, after)

        def reverse(i):
            c = plan.chunks - 1 - i
            (out, _), pull = jax.vjp(step, _load(tokens, plan, c), _read(states, c))
            dchunk, before = pull((dout[:, _at(plan, c)].astype(out.dtype), _read(dstate)))
            jax.tree.map(lambda ref, x: _put(_rows(ref, plan, c), x), dtokens, dchunk)
            _copy(dstate, before)

        _loop(plan, recompute)
        _loop(plan, reverse)

    at = lambda s: slabs - 1 - s
    heads = lambda x: x.shape if m == x.shape[1] else (b, m, *x.shape[2:])
    summed = lambda x: x.dtype if m == x.shape[1] else accumulator_dtype(x.dtype)
    dtokens = jax.tree.map(lambda x: jax.ShapeDtypeStruct(heads(x), summed(x)), tokens)
    dstate = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dfinal)
    scratch = jax.tree.map(lambda x: pltpu.VMEM((plan.chunks + 1, *x.shape[2:]), x.dtype), dfinal)
    inputs = tokens, arriving, dout, dfinal
    specs = _token_specs(plan, tokens, m, at), _by_slab(arriving, at), _along(plan, dout, at), _whole(dfinal)
    dtokens, dstate = _call(kernel, plan, "linear_backward", inputs, specs, (dtokens, dstate), (_token_specs(plan, dtokens, m, at), _whole(dstate)), scratch)
    return jax.tree.map(shared, dtokens, tokens), dstate


attend.defvjp(_keep, _backward)


def _call(kernel, plan, name, inputs, in_specs, outputs, out_specs, scratch=()):
    """``kernel(*inputs, *outputs, *scratch)`` over (batch element, head of the state, slab); arguments are pytrees, of refs inside."""
    read, in_tree = jax.tree.flatten(inputs)
    written, out_tree = jax.tree.flatten(outputs)
    kept, scratch_tree = jax.tree.flatten((scratch,) if scratch else ())
    query = read[0]

    def body(*refs):
        trees = zip((in_tree, out_tree, scratch_tree), (refs[: len(read)], refs[len(read): len(refs) - len(kept)], refs[len(refs) - len(kept):]))
        kernel(*(x for tree, part in trees for x in jax.tree.unflatten(tree, part)))

    results = pl.pallas_call(
        body, results_like(written, read),
        grid=(*query.shape[:2], query.shape[3] // plan.slab),
        in_specs=jax.tree.leaves(in_specs), out_specs=jax.tree.leaves(out_specs), scratch_shapes=kept,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=plan.interpret, name=name)(*read)
    return jax.tree.unflatten(out_tree, results)


# Blocks -------------------------------------------------------------------------------------------------------------


def _loop(plan, body):
    """``body(c)`` for every chunk of a slab, two at a time, so that the one's products hide the other's latencies."""
    lax.fori_loop(0, plan.chunks, lambda c, _: body(c), None, unroll=2 - plan.chunks % 2)


def _along(plan, x, at):
    """The slab of an array [B, M, .., T, X], or of rows [B, M, 1, T]."""
    size = plan.slab
    if x.ndim == 5:
        return pl.BlockSpec((None, None, x.shape[2], size, x.shape[4]), lambda b, m, s: (b, m, 0, at(s), 0))
    if x.shape[2] == 1:
        return pl.BlockSpec((None, None, 1, size), lambda b, m, s: (b, m, 0, at(s)))
    return pl.BlockSpec((None, None, size, x.shape[3]), lambda b, m, s: (b, m, at(s), 0))


def _token_specs(plan, tokens, heads, at):
    def spec(x):
        along, share = _along(plan, x, at), heads // x.shape[1]
        return along if share == 1 else pl.BlockSpec(along.block_shape, lambda b, m, s: along.index_map(b, m // share, s))

    return jax.tree.map(spec, tokens)


def _whole(state):
    return jax.tree.map(lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda b, m, s: (b, m, 0, 0)), state)


def _by_slab(states, at):
    return jax.tree.map(lambda x: pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, m, s: (b, m, at(s), 0, 0)), states)


def _at(plan, c):
    return pl.ds(pl.multiple_of(c * plan.chunk, plan.chunk), plan.chunk)


def _rows(ref, plan, c):
    """The chunk of a slab."""
    return ref.at[_at(plan, c)] if ref.ndim == 2 and ref.shape[0] > 1 else ref.at[:, _at(plan, c)]


def _load(tokens, plan, c):
    return jax.tree.map(lambda ref: _rows(ref, plan, c)[...].astype(accumulator_dtype(ref.dtype)), tokens)


def _read(state, *index):
    return jax.tree.map(lambda ref: ref[(*index, ...)], state)


def _put(ref, x):
    ref[...] = x.astype(ref.dtype)


def _copy(refs, values):
    jax.tree.map(lambda ref, x: _put(ref, x[...]), refs, values)


def _narrow(tokens):
    dtype = tokens.query.dtype
    return None if dtype == accumulator_dtype(dtype) else dtype
