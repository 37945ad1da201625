"""The recurrent engine on a GPU by Pallas' Triton route: a program carries some columns of a head's state along a slab of the sequence, in registers.

The columns of the values are independent of each other, and so are slabs once the states that arrive at them are known. So a sequence is cut into as many slabs
as keep the processors busy; where that is more than one, a first sweep finds what each adds to a state, and a short scan of these
what arrives where. For a gradient the states that arrive at every few chunks are recomputed into memory, and a sweep from the last chunk to the first
carries the state's cotangent. Both call :mod:`pallas_kernels.linear.gpu_tile`, the backward one under ``jax.vjp``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.flash.gpu_quick import quickened
from pallas_kernels.linear import gpu_tile, triton_launch
from pallas_kernels.linear.arrays import State, Tokens, differentiated_once, shared
from pallas_kernels.linear.gpu_launch import ALL, Field, Plan, launch, plain, slabs_of, stacked, token_fields, width
from pallas_kernels.tile import accumulator_dtype
from pallas_kernels.tiles import power

PROGRAMS = 512  # that a large GPU has room for, about
SHORTEST = 8  # chunks of a slab, at least
SLABS = 32  # at most
EXACT = (lax.tanh_p,)  # in which a small loss is computed, see linear_tile.forget

# Tokens of a chunk and chunks of a kept state, by decay: none, one for the head, one for each channel. Chosen by what the compiler for sm_90 makes of them: more
# tokens spill registers, fewer waste the matrix units.
CHUNKS = {None: (64, 2), "head": (32, 4), "channel": (16, 4)}


def choose_plan(query, value, states: int, chunk: int | None, decay: str | None, **options) -> Plan:
    """The plan of a call with arrays [B, T, N, H], [B, T, K, Hv] and a ``decay`` of the kind that ``CHUNKS`` names."""
    (b, t, _, h), hv = query.shape, value.shape[3]
    size, kept = CHUNKS[decay]
    if h > 128 or value.dtype.itemsize > 2:
        size = max(16, size // 2)
    chunk = min(chunk or size, power(t))
    columns = min(power(hv), 64 if h <= 128 else 32)
    chunks, programs = -(-t // chunk), b * states * -(-hv // columns)
    slabs = max(1, min(-(-PROGRAMS // programs), chunks // SHORTEST, SLABS))
    chunks = -(-chunks // slabs)
    kept = min(kept, chunks)
    return Plan(states, chunk, chunks + -chunks % kept, kept, columns, **options)


def attend(plan: Plan, tokens: Tokens, state: State):
    """``(out [B, T, M G, Hv] in the query's dtype, state after the last token)``; reverse mode differentiates it once."""
    (h, hv), size = state.memory.shape[2:], power(tokens.key.shape[3])
    widen = lambda x, *sizes: jnp.pad(x, [(0, 0)] * 2 + [(0, size - n) for size, n in zip(sizes, x.shape[2:])])
    memory = widen(state.memory, size, width(plan, tokens.value))
    out, (memory, normalizer) = _attend(plan, tokens, State(memory, None if state.normalizer is None else widen(state.normalizer, 1, size)))
    return out, State(memory[:, :, :h, :hv], None if normalizer is None else normalizer[..., :h])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, tokens, state):
    """:func:`attend` with states as wide as programs have them."""
    return _forward(plan, tokens, state)[:2]


def _forward(plan, tokens, state):
    """``(out, state, states that arrive at the slabs [B, M, slabs, ...], denominators [B, M, G, T] or None)``."""
    (b, t, n, _), m = tokens.query.shape, plan.states
    read, write = _chunk_functions(plan, tokens)
    arriving = jax.tree.map(lambda x: x[:, :, None], state)
    if slabs_of(plan, tokens) > 1:
        arriving = _scan(plan, tokens, state, _states(plan, tokens, _blank(state, slabs_of(plan, tokens))), reverse=False)
    if plan.language == "triton":
        out, denominators, leaving = triton_launch.forward(plan, tokens, arriving)
        return out, jax.tree.map(lambda x: x[:, :, -1], leaving), arriving, denominators

    def program(here, inputs, outputs):
        (tokens, arriving), (out, denominators, leaving) = inputs, outputs

        def step(c, state):
            key, value, log_decay = here.keys(tokens, c)

            def head(n, _):
                numerator, denominator = read(here.query(tokens, c, n), key, value, log_decay, *state)
                if denominator is not None:
                    numerator = numerator * _factor(plan, denominator)
                    pl.when(here.v == 0)(lambda: denominators.write(denominator[:, 0], here.b, here.m, n, here.span(c)))
                out.write(numerator if denominator is not None else numerator * plan.scale, *here.queries(c, n), here.columns)
                return _

            _loop(here.groups, head, None)
            return write(key, value, log_decay, *state)

        here.put(leaving, here.s, _loop(plan.chunks, step, here.get(arriving, here.s)))

    out = Field(jax.ShapeDtypeStruct((b, t, n, tokens.value.shape[3]), tokens.query.dtype), width(plan, tokens.value))
    denominators = None if state.normalizer is None else Field(jax.ShapeDtypeStruct((b, m, n // m, t), state.normalizer.dtype))
    out, denominators, leaving = launch(plan, tokens, "linear_forward", program, (token_fields(plan, tokens), plain(arriving)),
                                       (out, denominators, jax.tree.map(lambda x: stacked(x, x.shape[2]), arriving)))
    return out, jax.tree.map(lambda x: x[:, :, -1], leaving), arriving, denominators


@differentiated_once
def _keep(plan, tokens, state):
    out, state, arriving, denominators = _forward(plan, tokens, state)
    return (out, state), (tokens, arriving, denominators, None if denominators is None else out)


@differentiated_once
def _backward(plan, residuals, cotangents):
    """The gradients of tokens and initial state."""
    tokens, arriving, denominators, out = residuals
    (dout, dfinal), m, slabs, rows = cotangents, plan.states, slabs_of(plan, tokens), None
    if denominators is not None:  # out = numerator * factor(denominator)
        factor, pull = jax.vjp(partial(_factor, plan), denominators)
        along = jnp.sum(dout.astype(factor.dtype) * out.astype(factor.dtype), axis=-1)
        along = jnp.moveaxis(along, 1, 2).reshape(factor.shape)
        rows = factor, *pull(jnp.where(factor != 0, along / jnp.where(factor != 0, factor, 1), 0))
    departing = jax.tree.map(lambda x: x[:, :, None], dfinal)
    if slabs > 1:
        departing = _scan(plan, tokens, dfinal, _state_changes(plan, tokens, dout, rows, _blank(dfinal, slabs)), reverse=True)
    states = _states(plan, tokens, arriving, keep=True)
    _, write = _chunk_functions(plan, tokens)
    pull_read, pull_write = (quickened(_pullback(function), plan.interpret, EXACT) for function in _chunk_functions(plan, tokens, quick=False))

    def program(here, inputs, outputs):
        (tokens, states, departing, dout, rows), (dtokens, dstate) = inputs, outputs

        def step(n, later):
            c = plan.chunks - 1 - n
            last = lax.rem(c, jnp.int32(plan.kept))
            kept = here.get(states, lax.div(here.s * plan.chunks + c, jnp.int32(plan.kept)))
            state = lax.fori_loop(jnp.int32(0), last, lambda i, state: write(*here.keys(tokens, c - last + i), *state), kept)
            keys = here.keys(tokens, c)

            def head(n, sums):
                found = pull_read((here.query(tokens, c, n), *keys, *state), here.cotangents(dout, rows, c, n))
                dtokens.query.write(found[0], here.v, *here.queries(c, n), ALL)
                return jax.tree.map(jnp.add, sums, tuple(found[1:]))

            *dkeys, dmemory, dnormalizer = _loop(here.groups, head, tuple(pull_write((*keys, *state), later)))
            here.put_gradients(dtokens, c, *dkeys)
            return dmemory, dnormalizer

        memory, normalizer = here.get(departing, here.s)
        later = memory, None if normalizer is None else jnp.where(here.v == 0, normalizer, 0)  # counted once
        here.put(dstate, here.s, _loop(plan.chunks, step, later))

    blocks, wide = width(plan, tokens.value) // plan.columns, accumulator_dtype(tokens.key.dtype)

    def each(x, heads, *lead):  # a gradient of each program that has one of its own
        alone = heads == x.shape[2] and lead in ((), (1,))
        return jax.ShapeDtypeStruct((*lead, *x.shape[:2], heads, *x.shape[3:]), x.dtype if alone else wide)

    fields = token_fields(plan, tokens)
    like = Tokens(each(tokens.query, tokens.query.shape[2], blocks), each(tokens.key, m, blocks), each(tokens.value, m),
                  jax.tree.map(lambda x: each(x, m, blocks), tokens.log_decay))
    dtokens = jax.tree.map(lambda field, x: Field(x, field.width), fields, like, is_leaf=lambda x: isinstance(x, Field))
    inputs = fields, plain(states), plain(departing), Field(dout, width(plan, tokens.value)), jax.tree.map(Field, rows)
    dtokens, dstate = launch(plan, tokens, "linear_backward", program, inputs, (dtokens, jax.tree.map(lambda x: stacked(x, slabs), departing)))
    dtokens = Tokens(*(x.sum(0) for x in dtokens[:2]), dtokens.value, jax.tree.map(lambda x: x.sum(0), dtokens.log_decay))
    return jax.tree.map(partial(shared, axis=2), dtokens, tokens), jax.tree.map(lambda x: x[:, :, 0], dstate)


_attend.defvjp(_keep, _backward)


# Sweeps for states alone --------------------------------------------------------------------------------------------


def _states(plan, tokens, arriving, keep=False):
    """The states that leave the slabs, given those that arrive at them; or those that a gradient keeps."""
    if plan.language == "triton" and not keep:
        return triton_launch.forward(plan, tokens, arriving, read=False)[2]
    _, write = _chunk_functions(plan, tokens)

    def program(here, inputs, states):
        tokens, arriving = inputs

        def step(n, state):
            if keep:
                here.put(states, here.s * (plan.chunks // plan.kept) + n, state)
            return _loop(plan.kept, lambda i, state: write(*here.keys(tokens, n * plan.kept + i), *state), state)

        last = _loop(plan.chunks // plan.kept, step, here.get(arriving, here.s))
        if not keep:
            here.put(states, here.s, last)

    states = jax.tree.map(lambda x: stacked(x, x.shape[2] * (plan.chunks // plan.kept if keep else 1)), arriving)
    return launch(plan, tokens, "linear_states", program, (token_fields(plan, tokens), plain(arriving)), states)


def _state_changes(plan, tokens, dout, rows, later):
    """The cotangents of the states that arrive at the slabs, given those of the states that leave them."""
    narrow = _narrow(tokens)
    decayed = quickened(lambda query, log_decay: gpu_tile.decayed(query, gpu_tile.since(plan.chunk), log_decay), plan.interpret)

    def program(here, inputs, changes):
        tokens, dout, rows, later = inputs

        def step(n, state):
            c = plan.chunks - 1 - n
            log_decay = here.decay(tokens, c)
            lost = gpu_tile.total(log_decay)

            def head(n, sums):
                query, (numerator, denominator) = decayed(here.query(tokens, c, n), log_decay), here.cotangents(dout, rows, c, n)
                memory = sums[0] + gpu_tile.matmul(query, numerator, (0, 0), narrow)
                return memory, None if denominator is None else sums[1] + jnp.sum(query * denominator, axis=0, keepdims=True)

            return _loop(here.groups, head, gpu_tile.forgotten(*state, lost))

        here.put(changes, here.s, _loop(plan.chunks, step, here.get(later, here.s)))

    inputs = token_fields(plan, tokens), Field(dout, width(plan, tokens.value)), jax.tree.map(Field, rows), plain(later)
    return launch(plan, tokens, "linear_state_changes", program, inputs, jax.tree.map(lambda x: stacked(x, x.shape[2]), later))


def _scan(plan, tokens, state, added, *, reverse):
    """The states that arrive at the slabs, the first given, where each forgets and adds what is said; from the last on if ``reverse``."""
    lost, slabs = None, slabs_of(plan, tokens)
    if tokens.log_decay is not None:
        decay = jnp.maximum(tokens.log_decay, gpu_tile.LOWEST)
        decay = decay if decay.ndim == 4 else decay[..., None]
        lost = jnp.moveaxis(decay.reshape(decay.shape[0], slabs, plan.slab, *decay.shape[2:]).sum(2), 1, 0)[..., None, :]  # [slabs, B, M, 1, H or 1]
        more = state.memory.shape[2] - lost.shape[-1] if tokens.log_decay.ndim == 4 else 0
        lost = jnp.pad(lost, [(0, 0)] * 4 + [(0, more)])

    def step(state, change):
        lost, added = change
        memory, normalizer = gpu_tile.forgotten(*state, lost)
        after = State(memory + added.memory, None if normalizer is None else normalizer + added.normalizer)
        return after, state

    changes = lost, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), added)
    _, arriving = lax.scan(step, state, changes, reverse=reverse, unroll=True)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), arriving)


def _loop(count: int, body, carry):
    return lax.fori_loop(0, count, lambda n, carry: body(n.astype(jnp.int32), carry), carry)  # which may count in 64 bits


def _chunk_functions(plan, tokens, quick=True):
    """:func:`gpu_tile.read` and :func:`gpu_tile.write` of the call."""
    functions = [partial(function, narrow=_narrow(tokens)) for function in (gpu_tile.read, gpu_tile.write)]
    return [quickened(function, plan.interpret, EXACT) for function in functions] if quick else functions


def _pullback(function):
    return lambda arguments, cotangents: jax.vjp(function, *arguments)[1](cotangents)


def _factor(plan, denominator):
    """What a numerator is multiplied by, see :func:`pallas_kernels.linear_tile.divide`."""
    if plan.floor is not None:
        return plan.scale / jnp.maximum(jnp.abs(denominator * plan.scale), plan.floor)
    some = denominator != 0
    return jnp.where(some, 1 / jnp.where(some, denominator, 1), 0)


def _narrow(tokens):
    dtype = tokens.query.dtype
    return None if dtype == accumulator_dtype(dtype) else dtype


def _blank(state, count):
    """So many empty states, [B, M, count, ...]."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, shape=(*x.shape[:2], count, *x.shape[2:])), state)
