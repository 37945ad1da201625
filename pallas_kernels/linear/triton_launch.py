"""Calls of the recurrent engine's kernel in Triton itself (:mod:`pallas_kernels.linear.triton_kernel`), in place of Pallas' forward programs."""

import math
from functools import partial

import jax

from pallas_kernels import native
from pallas_kernels.linear.arrays import State
from pallas_kernels.linear.gpu_launch import slabs_of, width
from pallas_kernels.tiles import power

KINDS = {None: 0, "head": 1, "channel": 2}  # of decay

# Tokens of a chunk, and queries of a product, at the most. As in Pallas' kernel, what the compiler for sm_90 makes of them decides.
CHUNKS = {None: 64, "head": 64, "channel": 16}
ROWS = {None: 128, "head": 64, "channel": 64}


def choose_tile(plan, tokens, decay: str | None) -> tuple[int, int, int]:
    """``(tokens of a chunk, queries of a state that are read together, warps)`` of a call."""
    size, groups = power(tokens.query.shape[3]), tokens.query.shape[2] // plan.states
    together = min(power(groups, 1), 1 if decay == "channel" and size > 128 else 4)
    most = 16 if size > 256 else 32 if decay and tokens.query.dtype.itemsize > 2 else CHUNKS[decay]
    chunk = math.gcd(plan.slab, max(16, min(most, ROWS[decay] // together)))
    return chunk, together, 8 if size * plan.columns > 8192 or chunk * together > 64 or decay == "channel" and size > 128 else 4


def forward(plan, tokens, arriving, read: bool = True):
    """``(out, denominators [B, M, G, T] or None, states that leave the slabs)`` given those that arrive at them [B, M, slabs, ...]; of states alone without ``read``."""
    return native.by_batch(partial(_call, plan, read))(tokens, arriving)


def _call(plan, read, tokens, arriving):
    from pallas_kernels.linear.triton_kernel import linear_forward

    (b, t, n, size), (kv_heads, value_size), states = tokens.query.shape, tokens.value.shape[2:], plan.states
    decay = None if tokens.log_decay is None else "channel" if tokens.log_decay.ndim == 4 else "head"
    shape, slabs = jax.ShapeDtypeStruct, slabs_of(plan, tokens)
    chunk, together, warps = choose_tile(plan, tokens, decay)
    blocks = width(plan, tokens.value) // plan.columns
    like = jax.tree.map(lambda x: shape(x.shape, x.dtype), arriving)
    normalized = arriving.normalizer is not None
    outputs = [shape((b, t, n, value_size), tokens.query.dtype) if read else None,
               shape((b, states, n // states, t), arriving.memory.dtype) if read and normalized else None, *like]
    out, denominators, *last = native.call(
        linear_forward, [*tokens, *arriving], outputs, grid=(blocks * states * b, slabs, 1), name="linear_forward" if read else "linear_states",
        warps=warps, stages=2, scalars=(t, plan.slab // chunk),
        STATES=states, KEY_HEADS=kv_heads, GROUPS=n // states, TOGETHER=together, SIZE=size, SIZE_BLOCK=power(size), VALUE_SIZE=value_size, COLUMNS=plan.columns,
        BLOCKS=blocks, CHUNK=chunk, LEVELS=chunk.bit_length() - 1, DECAY=KINDS[decay], NORMALIZE=normalized, SCALE=plan.scale, FLOOR=plan.floor, READ=read,
        PRECISION=native.precision(tokens.query.dtype))
    return out, denominators, State(*last)
