"""Chosen key blocks against the pairs engine under the equivalent mask, written out densely here: output, residual and every gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import arrays, assert_agree

import attnx
from attnx import masks, scores, weights
from attnx.core.selected import selected_attention
from pallas_kernels.parts import Exponential

T, S, N, K, M = 13, 11, 4, 2, 5  # no multiple of a block


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def table(block_sizes, heads=K, batch=2, seed=0):
    """Any blocks, so with duplicates, and numbers of none on both sides; of the first query block's row, nothing else."""
    blocks = -(-S // block_sizes[1])
    indices = jax.random.randint(jax.random.key(seed), (batch, heads, -(-T // block_sizes[0]), M), -2, blocks + 1)
    return indices.at[:, -1, 0].set(-1)


def equivalent(indices, block_scores, block_sizes):
    """Mask and bias [B, N, T, S]: of each row the chosen blocks and, of those that come several times, the first score."""
    (bq, bk), indices = block_sizes, np.asarray(indices)
    hot = indices[..., None] == np.arange(-(-S // bk))
    first = hot & (np.cumsum(hot, axis=3) == 1)

    def pairs(x):
        x = jnp.repeat(jnp.repeat(x, bq, axis=2), bk, axis=3)[:, :, :T, :S]
        return jnp.broadcast_to(jnp.repeat(x, N // x.shape[1], axis=1), (2, N, T, S))

    return pairs(jnp.asarray(first.any(3))), pairs((block_scores[..., None] * first).sum(3))


def as_pairs(query, key, value, indices, block_scores, block_sizes, mask=None, scores=(), **options):
    allowed, bias = equivalent(indices, block_scores, block_sizes)
    scores = (*scores, attnx.scores.bias(bias))
    return attnx.attention(query, key, value, mask=masks.explicit(allowed) & mask, scores=scores, implementation="reference", **options)


def gathered(query, key, value, indices, block_scores, block_sizes, **options):
    return selected_attention(query, key, value, indices, block_sizes=block_sizes, block_scores=block_scores, implementation="gathered", **options)


def evaluate(attend, operands, indices, block_sizes, cotangent, case):
    """Output, residual and the gradients by q, k, v, the blocks' scores and the parts' arrays."""
    exponential = isinstance(case.get("weights", weights.softmax()), Exponential)
    rest = {name: x for name, x in case.items() if name not in ("scores", "weights")}

    def loss(operands, parts):
        out = attend(*operands[:3], indices, operands[3], block_sizes, return_residual=exponential, **parts, **rest)
        out, r = out if exponential else (out, jnp.zeros(()))
        return jnp.vdot(out, cotangent) + jnp.sum(jnp.sin(jnp.where(jnp.isfinite(r), r, 0))), (out, r)

    parts = {name: case[name] for name in ("scores", "weights") if name in case}
    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(operands, parts)
    return results, jax.tree.leaves(gradients)


def seen(s, at, rate, column):
    """A user's score with a parameter for each head, one for each key and head, and positions."""
    return s * rate + column * jnp.cos(at.key - at.query)


CASES = {
    "one choice for all heads, causal inside blocks": ((1, 1), 1, {}, dict(mask=masks.causal())),
    "blocks of keys, sigmoid, documents": ((1, 4), K, {}, dict(
        weights=weights.sigmoid(normal(1, N)), mask=masks.documents(jnp.arange(T) // 5, jnp.arange(S) // 5) | masks.local(1, 0))),
    "blocks of queries, each head for itself, softpick": ((4, 1), N, {}, dict(weights=weights.softpick(), scores=(scores.bias(normal(2, N, T, S)),))),
    "blocks larger than lengths, entmax, T5": ((8, 16), N, {}, dict(
        weights=weights.entmax15(), mask=masks.causal(), scores=(scores.t5_bias(normal(3, 8, N), max_distance=9),))),
    "odd blocks, sink and temperature, a user's score, dropout": ((4, 3), K, {}, dict(
        weights=weights.softmax(sink=normal(4, N), temperature=jnp.exp(normal(5, 2, T, N) / 3)), dropout_rate=0.3, dropout_key=jax.random.key(6),
        scores=(scores.soft_cap(jnp.asarray(2.0)), scores.elementwise(seen, attnx.Operand(normal(7, N), ("head",)),
                                                                      attnx.Operand(normal(8, 2, S, K), ("batch", "key", "kv_head")))))),
    "positions in another order and padding, MQA": ((3, 2), 1, dict(kv_heads=1), dict(
        mask=masks.causal(), scores=(scores.t5_bias(normal(9, 8, N), max_distance=5),),
        query_positions=jnp.array([*range(4, T), 3, -1, 1, -1]), key_positions=jnp.stack([jnp.arange(S)[::-1], jnp.arange(-2, S - 2)]))),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_equivalent_mask(name):
    block_sizes, heads, sizes, case = CASES[name]
    case = jax.tree.map(lambda x: x.astype(jnp.float64) if getattr(x, "dtype", None) == jnp.float32 else x, case)  # made before x64
    *operands, cotangent = arrays(queries=T, keys=S, heads=N, **sizes)
    indices = table(block_sizes, heads)
    operands = (*operands, normal(10, *indices.shape))
    expected = evaluate(as_pairs, operands, indices, block_sizes, cotangent, case)
    assert_agree(evaluate(gathered, operands, indices, block_sizes, cotangent, case), expected, 1e-12)
    assert not np.asarray(expected[0][0])[:, :block_sizes[0], N - N // heads:].any()  # the row of no blocks


@pytest.mark.usefixtures("x64")
def test_reference_execution_is_the_equivalent_mask():
    query, key, value, cotangent = arrays(queries=T, keys=S, heads=N)
    indices = table((4, 3))
    operands = (query, key, value, normal(10, *indices.shape))

    def materialised(*args, block_sizes=(4, 3), **options):
        return selected_attention(*args[:4], block_scores=args[4], block_sizes=args[5], implementation="reference", **options)

    case = dict(mask=masks.causal())
    assert_agree(evaluate(materialised, operands, indices, (4, 3), cotangent, case), evaluate(as_pairs, operands, indices, (4, 3), cotangent, case))


@pytest.mark.usefixtures("x64")
def test_second_derivatives():
    query, key, value, _ = arrays(queries=T, keys=S, heads=N)
    indices = table((4, 3))

    def twice(attend):
        def penalty(query, block_scores):
            first = jax.grad(lambda q: jnp.sin(attend(q, key, value, indices, block_scores, (4, 3))).sum())(query)
            return (first**2).sum()
        return jax.jit(jax.grad(penalty, argnums=(0, 1)))(query, normal(10, *indices.shape))

    assert_agree(twice(gathered), twice(as_pairs))


def test_bfloat16():
    query, key, value, _ = arrays(jnp.bfloat16, queries=T, keys=S, heads=N)
    attend = jax.jit(lambda *qkv: selected_attention(*qkv, table((4, 3)), block_sizes=(4, 3), return_residual=True))
    out, r = attend(query, key, value)
    assert out.dtype == jnp.bfloat16 and r.dtype == jnp.float32
    expected, _ = attend(*(x.astype(jnp.float32) for x in (query, key, value)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)


def test_new_tables_and_scores_are_not_traced_anew():
    traced = []

    def counted(s, at):
        traced.append(None)
        return s

    query, key, value, _ = arrays(jnp.float32, queries=T, keys=S, heads=N)
    counts = []
    for seed in range(3):
        indices = table((4, 3), seed=seed)
        selected_attention(query, key, value, indices, block_sizes=(4, 3), block_scores=normal(seed, *indices.shape), scores=scores.elementwise(counted))
        counts.append(len(traced))
    assert counts == [counts[0]] * 3 and counts[0] > 0


@pytest.mark.usefixtures("x64")
def test_vmap_and_shard_map():
    query, key, value, cotangent = arrays(queries=T, keys=S, heads=N)
    indices = table((4, 3))
    operands = (query, key, value, normal(10, *indices.shape), cotangent)
    slope = jnp.ones(N)

    def gradient(slope, indices, query, key, value, block_scores, cotangent):
        def loss(slope, *operands):
            return jnp.vdot(gathered(*operands[:3], indices, operands[3], (4, 3), mask=masks.causal(), scores=scores.alibi(slope)), cotangent)
        return jax.grad(loss, argnums=range(5))(slope, query, key, value, block_scores)

    expected = jax.jit(gradient)(slope, indices, *operands)
    one = jax.jit(jax.vmap(lambda slope, *xs: gradient(slope, *(x[None] for x in xs)), in_axes=(None, *(0,) * 6)))(slope, indices, *operands)
    assert_agree((one[0].sum(0), *(x[:, 0] for x in one[1:])), expected)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    along, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    shards = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, *(along,) * 6), out_specs=(whole, *(along,) * 4))
    assert_agree(jax.jit(shards)(slope, indices, *operands), expected)


def test_sizes_of_zero():
    query, key, value, _ = arrays(jnp.float32, queries=T, keys=S, heads=N)
    nothing = selected_attention(query, key, value, table((4, 3))[..., :0], block_sizes=(4, 3))
    assert nothing.shape == (2, T, N, 3) and not nothing.any()
    assert not selected_attention(query, key[:, :0], value[:, :0], table((4, 3)), block_sizes=(4, 3)).any()
    assert selected_attention(query[:, :0], key, value, table((4, 3))[:, :, :0], block_sizes=(4, 3)).shape == (2, 0, N, 3)


@pytest.mark.usefixtures("optimised")
def test_memory_is_linear_in_the_length():
    """Forward and backward; what a step gathers is of constant size, and the rest a few copies of the inputs."""
    def temporary(length):
        spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        indices, block_scores = spec(1, 1, length // 16, 4, dtype=jnp.int32), spec(1, 1, length // 16, 4)
        loss = lambda q, k, v, indices, extra: selected_attention(q, k, v, indices, block_sizes=(16, 16), block_scores=extra, mask=masks.causal()).sum()
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 4)))
        compiled = gradient.lower(*(spec(1, length, 2, 32),) * 3, indices, block_scores).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    assert long - short <= 10 * 4 * (8192 - 2048) * 2 * 32


Q = jnp.ones((2, 6, 4, 8))
KV = jnp.ones((2, 5, 2, 8))
INDICES = jnp.zeros((2, 2, 3, 1), int)
WRONG = {
    r"indices: expected integers, got float32\[2, 2, 3, 1\]": dict(indices=INDICES * 1.0),
    r"indices: expected shape \[2, 1 or 2 or 4, 3, M\] .* got int32\[2, 3, 3, 1\]": dict(indices=jnp.zeros((2, 3, 3, 1), int)),
    r"indices: expected shape .* got int32\[2, 2, 2, 1\]": dict(indices=INDICES[:, :, :2]),
    r"indices: expected shape .* got int32\[2, 2, 3\]": dict(indices=INDICES[..., 0]),
    r"block_scores: expected shape \[2, 2, 3, 1\] as indices, got float32\[2, 2, 3, 2\]": dict(block_scores=jnp.ones((2, 2, 3, 2))),
    r"block_scores: expected real numbers": dict(block_scores=INDICES > 0),
    r"block_sizes: expected a pair": dict(block_sizes=2),
    r"block_sizes: expected an integer of at least 1, got 0": dict(block_sizes=(2, 0)),
    r"key: expected head size 8": dict(key=KV[..., :4]),
    r"value: expected an array, got": dict(value=None),
    r"mask: expected a mask": dict(mask=jnp.ones((6, 5), bool)),
    r"return_residual: expected weights of the exponential family": dict(weights=weights.sigmoid(), return_residual=True),
    r"implementation: expected one of 'reference', 'gathered', 'pallas' or None, got 'blockwise'": dict(implementation="blockwise"),
    r"implementation='pallas': .* use 'gathered' or None": dict(implementation="pallas"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_say_what_is_wrong(message):
    call = dict(query=Q, key=KV, value=KV, indices=INDICES, block_sizes=(2, 2)) | WRONG[message]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        selected_attention(**call)
