"""Calls that between them use every kind of part and operand: what each kernel is held against the definition on."""

import functools

import agreement
import jax
import jax.numpy as jnp

import attnx
from attnx import masks, scores, weights
from attnx.core import fused

BATCH, QUERIES, KEYS, HEADS = 2, 200, 300, 4


def gap(s, at, row, column):
    return s + row - column


def affine(s, at, numbers, features):
    return s * numbers[..., 0] + features[..., 1]


def normal(*shape, seed=7):
    return jax.random.normal(jax.random.key(seed), shape, float)


def documents():
    ids = [jnp.sort(jax.random.randint(jax.random.key(n), (BATCH, length), 0, 4)) for n, length in ((1, QUERIES), (2, KEYS))]
    return masks.documents(*ids)


def columns():
    """A row operand by head, a column operand by head, and one by key-value head."""
    by_head = attnx.Operand(normal(BATCH, HEADS, QUERIES), ("batch", "head", "query")), attnx.Operand(normal(HEADS, KEYS), ("head", "key"))
    by_kv_head = attnx.Operand(normal(2, QUERIES), ("kv_head", "query")), attnx.Operand(normal(BATCH, KEYS), ("batch", "key"))
    return scores.elementwise(gap, *by_head), scores.elementwise(gap, *by_kv_head)


def features(keys=KEYS):
    """Operands with a trailing axis: handed over whole, and by key."""
    return scores.elementwise(affine, jnp.array([0.5, 2.0]), attnx.Operand(normal(keys, 2), ("key", None)))


CASES = {
    "softmax, documents, column and offset operands": lambda: dict(
        mask=documents() & masks.causal(), scores=(*columns(), scores.t5_bias(normal(32, HEADS), max_distance=20))),
    "softpick, offset operand, slope, dropout": lambda: dict(
        weights=weights.softpick(), mask=documents(), scores=(scores.t5_bias(normal(32, HEADS), max_distance=20), scores.alibi(normal(HEADS))),
        dropout_rate=0.3, dropout_key=jax.random.key(5)),
    "sink, temperature, biases, boolean mask": lambda: dict(
        weights=weights.softmax(sink=jnp.arange(4.0), temperature=jnp.linspace(0.5, 2, QUERIES)), mask=masks.explicit(normal(HEADS, QUERIES, KEYS) > 0),
        scores=(scores.bias(normal(HEADS, QUERIES, KEYS)), scores.bias(normal(BATCH, 1, QUERIES, KEYS)))),
    "clipped softmax, features, given positions": lambda: dict(
        weights=weights.clipped_softmax(), scores=(features(), scores.soft_cap(3.0)), mask=masks.sliding_window(150),
        query_positions=jnp.arange(QUERIES)[::-1] + 50, key_positions=jnp.arange(KEYS).at[-1].set(-1)),
    "entmax": lambda: dict(weights=weights.entmax15(), mask=masks.causal()),
}


def sizes(**changed):
    """The arguments of :func:`agreement.arrays` that the cases are for."""
    return {**dict(batch=BATCH, queries=QUERIES, keys=KEYS, heads=HEADS, kv_heads=2, size=16, value_size=24), **changed}


def assert_transforms(platform, length):
    """That the kernels of a platform obey shard_map over the batch, vmap over traced documents, remat."""
    q, k, v, _ = agreement.arrays(jnp.float32, batch=2, queries=length, keys=length, heads=2, kv_heads=1, size=8, value_size=8)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (2, length), 0, 3))

    def one(q, k, v, ids, implementation):
        return attnx.attention(q[None], k[None], v[None], mask=masks.documents(ids), implementation=implementation)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(implementation, *args):
        def local(q, k, v, ids):
            return jax.vmap(jax.checkpoint(functools.partial(one, implementation=implementation)))(q, k, v, ids)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        # the interpreter of kernels, unlike their compiler, cannot have scalars checked that differ between devices
        sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.grad(lambda q, k, v: jnp.sum(sharded(q, k, v, ids) ** 2), (0, 1, 2))(*args)

    with fused.forced(platform=platform):
        agreement.assert_agree(gradient("pallas", q, k, v), gradient("reference", q, k, v), 1e-5)
