"""Calls of decoding that between them use everything its kernels serve."""

import functools

import jax
import jax.numpy as jnp
from agreement import arrays, assert_agree

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.decode import cascade, decode

BATCH, SLOTS, HEADS, KV_HEADS = 4, 200, 4, 2
LENGTHS = jnp.array([200, 0, 1, 130])


def shifted(s, at, row, column):
    return s + row - column + at.head * (at.key % 3)


def by_batch(s, at):
    return s + at.batch * (at.key % 3)


def normal(*shape, seed=7):
    return jax.random.normal(jax.random.key(seed), shape, float)


def caches(dtype=float, *, tokens=1, heads=HEADS, kv_heads=KV_HEADS, slots=SLOTS, size=8):
    return arrays(dtype, batch=BATCH, queries=tokens, keys=slots, heads=heads, kv_heads=kv_heads, size=size, value_size=size + 4)[:3]


@functools.partial(jax.jit, static_argnames=("implementation", "splits", "block_size", "return_residual"))
def run(*args, **options):
    return decode(*args, **options)


def agree(args, tolerance, block_size=64, splits=None, return_residual=True, platform="tpu", **parts):
    expected = run(*args, implementation="reference", return_residual=return_residual, **parts)
    with fused.forced(platform=platform):
        got = run(*args, implementation="pallas", block_size=block_size, splits=splits, return_residual=return_residual, **parts)
    assert_agree(got, expected, tolerance)


CASES = {
    "softmax, sink, soft cap": (2, lambda: dict(weights=weights.softmax(sink=jnp.arange(4.0)), scores=scores.soft_cap(1.0))),
    "softpick, window, slopes": (1, lambda: dict(weights=weights.softpick(), mask=masks.sliding_window(50), scores=scores.alibi(HEADS))),
    "temperature, row and column operands, relative positions": (3, lambda: dict(
        weights=weights.softmax(temperature=jnp.linspace(0.5, 2, 3)), mask=masks.causal(), scores=(
            scores.t5_bias(normal(8, HEADS), max_distance=9),
            scores.elementwise(shifted, attnx.Operand(normal(BATCH, 3), ("batch", "query")), attnx.Operand(normal(KV_HEADS, SLOTS), ("kv_head", "key")))))),
    "bias, boolean mask": (2, lambda: dict(scores=scores.bias(normal(HEADS, 2, SLOTS)), mask=masks.explicit(normal(2, SLOTS) > 0))),
}


def assert_pages(kv_heads, page, block_size, platform):
    """Pages in any order, several in a tile; entries of the table beyond the length may be anything."""
    query, key, value = caches(tokens=2, kv_heads=kv_heads)
    slots = -(-SLOTS // page)
    table = jax.random.permutation(jax.random.key(3), BATCH * slots + 5)[:BATCH * slots].reshape(BATCH, slots)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, slots * page - SLOTS), (0, 0), (0, 0))).reshape(BATCH, slots, page, *x.shape[2:])
        return jnp.full((BATCH * slots + 5, *x.shape[2:]), 1e3).at[table].set(x)

    used = jnp.arange(slots) < -(-LENGTHS[:, None] // page)
    parts = dict(mask=masks.sliding_window(100), scores=scores.alibi(normal(HEADS)))
    expected = run(query, key, value, LENGTHS, implementation="reference", **parts)
    with fused.forced(platform=platform):
        got = run(query, cut(key), cut(value), LENGTHS, page_table=jnp.where(used, table, 2**30), block_size=block_size, implementation="pallas", **parts)
    assert_agree(got, expected, 1e-11)


def assert_cascade(platform):
    """A prefix read once is as good as one in every cache."""
    query, key, value = caches(tokens=2)
    prefix, lengths = [normal(70, KV_HEADS, size, seed=size) for size in (8, 12)], LENGTHS.at[1:3].set(2)
    both = [jnp.concatenate([jnp.broadcast_to(p, (BATCH, *p.shape)), x], 1) for p, x in zip(prefix, (key, value))]
    parts = dict(mask=masks.sliding_window(90), weights=weights.softpick(), scores=scores.elementwise(by_batch))
    with fused.forced(platform=platform):
        got = jax.jit(functools.partial(cascade, implementation="pallas", block_size=64, return_residual=True))(query, *prefix, key, value, lengths, **parts)
    assert_agree(got, run(query, *both, 70 + lengths, implementation="reference", return_residual=True, **parts), 1e-11)
