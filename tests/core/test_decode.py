"""Decoding agrees with the definition whatever the lengths, parts, pages, blocks and splits; a cascade is the flat call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import arrays, assert_agree

import attnx
from attnx import masks, scores, weights
from attnx.core.decode import cascade, decode
from pallas_kernels.decode.schedule import collect, share_out, unpack

BATCH, TOKENS, SLOTS, HEADS, PAGE = 4, 3, 22, 4, 2
LENGTHS = jnp.array([0, 1, 22, 9])


def recency(s, at, rate):
    return s - rate * at.head * (at.query - at.key)


def normal(*shape, seed=7):
    return jax.random.normal(jax.random.key(seed), shape, float)


CASES = {
    "softmax, sink, temperature, soft cap, biases, relative positions": lambda: dict(
        weights=weights.softmax(sink=jnp.arange(4.0), temperature=jnp.linspace(0.5, 2, TOKENS)),
        scores=(scores.soft_cap(1.0), scores.bias(normal(HEADS, TOKENS, SLOTS)), scores.t5_bias(normal(8, HEADS), max_distance=9),
                scores.elementwise(recency, jnp.array(0.1)))),
    "softpick, window, documents, slopes, operands of every kind": lambda: dict(
        weights=weights.softpick(),
        mask=masks.sliding_window(9) & masks.documents(jnp.ones((BATCH, TOKENS), int), jax.random.randint(jax.random.key(0), (BATCH, SLOTS), 0, 2)),
        scores=[scores.alibi(normal(HEADS)), *(scores.elementwise(added, attnx.Operand(normal(*shape), axes)) for shape, axes in OPERANDS)]),
    "sigmoid": lambda: dict(weights=weights.sigmoid(), mask=masks.causal()),
    "entmax": lambda: dict(weights=weights.entmax15(), mask=masks.sliding_window(8)),
}
OPERANDS = (((BATCH, SLOTS), ("batch", "key")), ((2, SLOTS), ("kv_head", "key")), ((BATCH, HEADS, TOKENS), ("batch", "head", "query")),
            ((BATCH, 2), ("batch", "kv_head")), ((TOKENS, SLOTS, 1), ("query", "key", None)))


def added(s, at, x):
    return s + (x[..., 0] if x.ndim > s.ndim else x)


def caches(kv_heads=2, dtype=jnp.float64, tokens=TOKENS):
    return arrays(dtype, batch=BATCH, queries=tokens, keys=SLOTS, heads=HEADS, kv_heads=kv_heads)[:3]


def paged(*caches):
    """The caches cut into pages, shuffled, with unused ones among them, and the table."""
    count = SLOTS // PAGE
    order = jax.random.permutation(jax.random.key(3), BATCH * count + 5)
    table = order[:BATCH * count].reshape(BATCH, count)
    cut = lambda x: jnp.full((order.size, PAGE, *x.shape[2:]), 1e3, x.dtype).at[table].set(x.reshape(BATCH, count, PAGE, *x.shape[2:]))
    used = jnp.arange(count) < -(-LENGTHS[:, None] // PAGE)
    return (*map(cut, caches), jnp.where(used, table, -7))


@functools.partial(jax.jit, static_argnames=("implementation", "splits", "block_size"))
def evaluate(query, key, value, lengths, page_table=None, implementation="blockwise", splits=None, block_size=None, **parts):
    """Output, residual (exponential weights) and gradients of a call."""
    exponential = isinstance(parts.get("weights", weights.softmax()), weights.Exponential)

    def loss(query, key, value, parts):
        result = decode(query, key, value, lengths, page_table=page_table, implementation=implementation, splits=splits, block_size=block_size,
                        return_residual=exponential, **parts)
        out, r = result if exponential else (result, jnp.zeros(()))
        return jnp.sin(out).sum() + jnp.sin(jnp.where(jnp.isfinite(r), r, 0)).sum(), (out, r)

    gradients, result = jax.grad(loss, (0, 1, 2, 3), has_aux=True, allow_int=True)(query, key, value, parts)
    return result, [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    """Forward and backward; lengths 0 and 1 among them, and blocks that do not divide the slots."""
    parts, (query, key, value) = CASES[case](), caches()
    expected = evaluate(query, key, value, LENGTHS, implementation="reference", **parts)
    assert_agree(evaluate(query, key, value, LENGTHS, block_size=4, splits=1, **parts), expected, 1e-11)


@pytest.mark.usefixtures("x64")
def test_pages():
    """Forward and backward, by way of a table whose entries beyond the lengths may be anything."""
    query, key, value = caches()
    parts = dict(mask=masks.sliding_window(9), scores=scores.bias(normal(HEADS, TOKENS, SLOTS)))
    expected = evaluate(query, key, value, LENGTHS, implementation="reference", **parts)
    *pages, table = paged(key, value)
    result, (dquery, *gradients, dbias) = evaluate(query, *pages, LENGTHS, table, block_size=6, **parts)
    seen = jnp.arange(SLOTS)[:, None, None] < LENGTHS[:, None, None, None]
    dkey, dvalue = [jnp.where(seen, g[table].reshape(x.shape), 0) for g, x in zip(gradients, (key, value))]
    assert_agree((result, [dquery, dkey, dvalue, dbias]), expected, 1e-11)


@pytest.mark.usefixtures("x64")
def test_any_number_of_splits():
    """Shares that end inside a sequence or at its end, that hold several sequences, or nothing."""
    call = jax.jit(functools.partial(decode, *caches(kv_heads=1), LENGTHS, mask=masks.causal(), weights=weights.softpick(), return_residual=True),
                   static_argnames=("implementation", "block_size", "splits"))
    for splits in (2, 5, 23):
        assert_agree(call(implementation="blockwise", block_size=3, splits=splits), call(implementation="reference"), 1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("splits", [1, 3, 50])
def test_shares_are_equal_and_hold_every_tile_once(splits):
    @jax.jit
    def run(some, every):
        work = share_out(some, every, splits)
        segments = jnp.arange(splits + 4)[:, None]  # their numbers for contents
        return work, collect(work, splits, jnp.left_shift(1, segments), jnp.zeros(1, int), jnp.bitwise_or)[:, 0]

    rng = np.random.default_rng(0)
    for some in (rng.random((5, 7)) < 0.5, np.zeros((5, 7), bool), np.ones((5, 7), bool)):
        every = some & (rng.random(some.shape) < 0.5)
        work, collected = run(some, every)
        place = np.arange(splits)[:, None] * int(work.share) + np.arange(int(work.share))
        own = place < work.count
        items = unpack(np.asarray(work.items)[place])
        visited = np.zeros(some.shape, int)
        np.add.at(visited, (items.batch[own], items.block[own]), 1 + items.full[own])
        assert (visited == np.where(some, 1 + every, 0)).all() and work.share == max(1, -(-some.sum() // splits))
        segments = np.zeros(5, int)
        np.bitwise_or.at(segments, items.batch[own], 1 << (np.arange(splits)[:, None] + items.batch)[own])
        assert collected.tolist() == segments.tolist()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_cascade_is_the_flat_call(implementation):
    """A prefix shared by the batch, of traced length, with parts that vary over it, over the batch and over the tokens."""
    query, key, value = caches()
    prefix = [normal(9, 2, size, seed=size) for size in (5, 3)]
    known, own = 9 + SLOTS, LENGTHS.at[0].set(TOKENS)
    columns = attnx.Operand(normal(BATCH, HEADS, known), ("batch", "head", "key"))
    parts = dict(mask=masks.sliding_window(14), weights=weights.softmax(sink=jnp.arange(4.0), temperature=jnp.linspace(0.5, 2, TOKENS)),
                 scores=(scores.elementwise(added, columns), scores.t5_bias(normal(8, HEADS), max_distance=9), scores.elementwise(by_batch)))

    @jax.jit
    def run(length):
        both = [jnp.concatenate([jnp.broadcast_to(p, (BATCH, *p.shape)), x], 1) for p, x in zip(prefix, (key, value))]
        at = jnp.concatenate([jnp.where(jnp.arange(9) < length, jnp.arange(9), -1), length + jnp.arange(SLOTS)])
        flat = decode(query, *both, length + own, key_positions=at, implementation="reference", return_residual=True, **parts)
        return cascade(query, *prefix, key, value, own, prefix_length=length, implementation=implementation, return_residual=True, block_size=4, **parts), flat

    for length in (9, 6, 0):
        got, flat = run(length)
        real = (own[:, None] - TOKENS + jnp.arange(TOKENS) >= 0)[..., None]  # no query lies in the prefix
        assert_agree([jnp.where(real[..., None], got[0], 0), jnp.where(real, got[1], 0)],
                     [jnp.where(real[..., None], flat[0], 0), jnp.where(real, flat[1], 0)], 1e-11)


def by_batch(s, at):
    return s + at.batch * (at.key % 3)


@pytest.mark.parametrize("dtype, cache_dtype", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.float8_e4m3fn)])
def test_narrow_and_wide_caches(dtype, cache_dtype):
    """Query and cache meet in the wider dtype of the two; the output has the query's."""
    query, key, value = (x.astype(d) for x, d in zip(caches(dtype=jnp.float32), (dtype, cache_dtype, cache_dtype)))

    @jax.jit
    def run(query, key, value):
        exact = decode(*(x.astype(jnp.float32) for x in (query, key, value)), LENGTHS, implementation="reference")
        return exact, [decode(query, key, value, LENGTHS, implementation=name) for name in ("reference", "blockwise")]

    exact, outputs = run(query, key, value)
    for out in outputs:
        assert out.dtype == dtype
        assert_agree(out, exact, 1e-5 if dtype == jnp.float32 else 2e-2)


def test_sharded_over_the_batch():
    query, key, value = caches(dtype=jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(functools.partial(decode, mask=masks.causal(), block_size=8, splits=3), mesh=mesh, in_specs=jax.sharding.PartitionSpec("data"),
                            out_specs=jax.sharding.PartitionSpec("data"))
    assert_agree(jax.jit(sharded)(query, key, value, LENGTHS), decode(query, key, value, LENGTHS, mask=masks.causal(), implementation="reference"), 1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch, tokens, slots, known", [(0, 1, 4, 2), (2, 0, 4, 2), (2, 1, 4, 0), (2, 1, 0, 1), (1, 1, 1, 0)])
def test_sizes_of_zero_and_one(batch, tokens, slots, known):
    query, key, value, _ = arrays(batch=batch, queries=tokens, keys=slots)
    prefix = [normal(known, 2, size, seed=size) for size in (5, 3)]
    calls = functools.partial(decode, query, key, value, slots), functools.partial(cascade, query, *prefix, key, value, slots)
    assert_agree(*jax.jit(lambda: [[call(implementation=name) for call in calls] for name in (None, "reference")])(), 1e-11)


def test_reads_the_cache_where_it_lies(optimised):
    """Compiled, it holds a few blocks of a long cache, never a copy."""
    query, cache = jax.ShapeDtypeStruct((1, 1, 8, 32), jnp.float32), jax.ShapeDtypeStruct((1, 8192, 8, 32), jnp.float32)
    compiled = jax.jit(decode).lower(query, cache, cache, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8192 * 8 * 32 * 4 / 2


@pytest.mark.parametrize("change, message", [
    (dict(query=jnp.ones((4, 5))), "query: expected shape"),
    (dict(key_cache=jnp.ones((3, 8, 2, 5))), "key_cache: expected batch size 4"),
    (dict(key_cache=jnp.ones((4, 8, 3, 5))), "divides the query's 4"),
    (dict(key_cache=jnp.ones((4, 8, 2, 6))), "head size 5"),
    (dict(value_cache=jnp.ones((4, 9, 2, 5))), "value_cache: expected shape"),
    (dict(lengths=jnp.ones(3, int)), "lengths: expected shape"),
    (dict(page_table=jnp.ones((3, 2), int)), "page_table: expected shape"),
    (dict(page_table=jnp.ones((4, 2), int), block_size=3), "block_size: expected a multiple"),
    (dict(splits=0), "splits: expected an integer"),
    (dict(key_positions=jnp.ones(7, int)), "key_positions: expected shape"),
    (dict(weights=weights.sigmoid(), return_residual=True), "return_residual"),
    (dict(implementation="magic"), "implementation"),
])
def test_wrong_arguments(change, message):
    good = dict(query=jnp.ones((4, 1, 4, 5)), key_cache=jnp.ones((4, 8, 2, 5)), value_cache=jnp.ones((4, 8, 2, 5)), lengths=jnp.ones(4, int))
    with pytest.raises(ValueError, match=message):
        decode(**good | change)


def test_says_what_it_lacks():
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(NotImplementedError, match="splits"):
        decode(x, x, x, 4, weights=weights.sigmoid(), splits=2)
    with pytest.raises(ValueError, match="exponential"):
        cascade(x, x[0], x[0], x, x, 4, weights=weights.sigmoid())
    with pytest.raises(TypeError, match="lengths"):
        decode(x, x, x, 4.0)
