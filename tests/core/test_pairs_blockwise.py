"""The fold over tiles against the materialised definition: output, residual and every gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from agreement import arrays, assert_agree, blockwise, reference

import attnx
from attnx import masks, scores, weights

T, S, N = 13, 11, 4  # no multiple of a block of 4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def integers(seed, shape, low, high):
    return jax.random.randint(jax.random.key(seed), shape, low, high)


def grows(at, rate):
    """A user's predicate: farther queries see farther back."""
    return at.key >= at.query - rate[0, 0, at.head % 2] * (1 + at.query // 3)


def fades(s, at, rate, depth):
    """A user's score change with a parameter handed over whole and one by columns."""
    return s * jnp.exp(-depth) - rate[0, 0, 0] * jnp.sin(at.key - 2.0 * at.query + at.batch)


# Each call covers several parts at once; a seed draws its arrays, so that one compilation serves several draws. Those that take an explicit
# mask besides serve the test of rows without keys too.
CALLS = {
    "plain softmax, full bias, MQA": (dict(kv_heads=1), lambda i: dict(scores=scores.bias(normal(i, 2, N, T, S)))),
    "causal, ALiBi, GQA, dropout": ({}, lambda i: dict(
        mask=masks.causal(), scores=scores.alibi(jnp.exp(normal(i, N))), dropout_rate=0.3, dropout_key=jax.random.key(i))),
    "window and documents, MHA": (dict(kv_heads=4), lambda i: dict(
        mask=masks.local(3, 1) & masks.documents(jnp.sort(integers(i, (2, T), 0, 4)), jnp.sort(integers(i + 9, (2, S), 0, 4))))),
    "a user's predicate and score change": ({}, lambda i: dict(
        mask=masks.causal() & masks.predicate(grows, integers(i, (2,), 0, 3)),
        scores=scores.elementwise(fades, normal(i, 1), attnx.Operand(normal(i + 9, 2, S, 2), ("batch", "key", "kv_head"))))),
    "sink and temperature, T5, lengths": ({}, lambda i, allowed: dict(
        weights=weights.softmax(sink=normal(i, N), temperature=jnp.exp(normal(i, 2, T, N) / 3)), scores=scores.t5_bias(normal(i, 8, N), max_distance=9),
        mask=masks.lengths(jnp.array([T, 12 - i]), jnp.array([4 * i, S - 1])) & masks.explicit(allowed))),
    "softpick, prefix, bias of columns": ({}, lambda i, allowed: dict(
        weights=weights.softpick(), mask=(masks.causal() | masks.prefix(jnp.array([6, i]))) & masks.explicit(allowed),
        scores=scores.bias(normal(i, N, 1, S)))),
    "sigmoid, other documents, soft cap": ({}, lambda i, allowed: dict(
        weights=weights.sigmoid(normal(i, N)), mask=~masks.documents(integers(i, (T,), 0, 2), integers(i + 9, (S,), 0, 2)) & masks.explicit(allowed),
        scores=scores.soft_cap(jnp.asarray(1.5 + i)))),
    "relu, bias of rows": ({}, lambda i, allowed: dict(weights=weights.relu(), mask=masks.explicit(allowed), scores=scores.bias(normal(i, T, 1)))),
    "clipped softmax, dilated": (dict(kv_heads=1), lambda i, allowed: dict(
        weights=weights.clipped_softmax(jnp.asarray(-0.03 - i / 20), jnp.asarray(1.1)), mask=masks.dilated(2) & masks.explicit(allowed))),
    "entmax-1.5, causal, bias of batches": ({}, lambda i, allowed: dict(
        weights=weights.entmax15(), mask=masks.causal() & masks.explicit(allowed), scores=scores.bias(normal(i, 2, 1, T, S)))),
    "sparsemax, columns or blocks, dropout": ({}, lambda i, allowed: dict(
        weights=weights.sparsemax(), dropout_rate=0.5, dropout_key=jax.random.key(i),
        mask=(masks.strided_columns(4, 2) | masks.within_blocks(3)) & masks.explicit(allowed))),
}


def takes_allowed(draw):
    return draw.__code__.co_argcount == 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_reference(name):
    """Ordinary, all-zero and huge dot products (+-1e4 and more)."""
    sizes, draw = CALLS[name]
    for seed, factor, tolerance in ((0, 1.0, 1e-12), (1, 1.0, 1e-12), (2, 0.0, 1e-12), (0, 2e4, 1e-9)):
        query, *rest = arrays(**sizes, seed=seed)
        call = draw(seed, normal(seed, T, S) > -0.5) if takes_allowed(draw) else draw(seed)
        assert_agree(blockwise(query * factor, *rest, **call), reference(query * factor, *rest, **call), tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("execute", [reference, blockwise])
@pytest.mark.parametrize("name", [name for name, (_, draw) in CALLS.items() if takes_allowed(draw)])
def test_rows_without_keys(name, execute):
    """Zeros and zero gradients; and whatever stands in places that no pair reads leaves everything else as it is."""
    sizes, draw = CALLS[name]
    dead = jnp.array([3, 8, 9, 10, 11])
    call = draw(0, jnp.ones((T, S), bool).at[dead].set(False).at[:, 5].set(False))
    query, key, value, cotangent = arrays(**sizes)
    usual = execute(query, key, value, cotangent, **call)
    assert (usual["out"][:, dead] == 0).all() and (usual["out"][:, 4] != 0).any()
    dq, dk, dv = usual["gradients"][:3]
    assert (dq[:, dead] == 0).all() and (dk[:, 5] == 0).all() and (dv[:, 5] == 0).all()
    loud = execute(query.at[:, dead].set(1e15), key.at[:, 5].set(-1e15), value.at[:, 5].set(1e15), cotangent, **call)
    assert_agree(loud, usual)


@jax.jit
def with_positions(query, key, value, table, query_positions, key_positions):
    """Causal softmax attention with a T5 bias, written out in positions."""
    offset = key_positions[:, None] - query_positions[..., None]
    allowed = (offset <= 0) & (query_positions >= 0)[..., None] & (key_positions >= 0)[:, None]
    bias = table[scores.t5_bucket(offset, table.shape[0], 9)].transpose(0, 3, 1, 2)
    return oracles.attend(oracles.softmax, query, key, value, allowed[:, None], change=lambda s: s + bias)


@pytest.mark.usefixtures("x64")
def test_positions():
    """Permuted, gapped and padded (-1) logical positions with a position bias and a mask that see them."""
    table, data = normal(0, 8, N), arrays()
    plain = [jnp.arange(T), jnp.arange(S)]
    shuffled = [jax.random.permutation(jax.random.key(i), p) for i, p in enumerate(plain)]
    padded = [jnp.where(integers(i, (2, p.size), 0, 3) == 0, -1, p) for i, p in enumerate(plain)]
    empty = [jnp.full((2, T), -1).at[0].set(jnp.arange(T)), jnp.full((2, S), -1).at[1].set(jnp.arange(S))]
    gapped = [100 + 7 * plain[0], 95 + 9 * plain[1]]
    for positions in (plain, shuffled, padded, empty, gapped):
        query, key = (jnp.broadcast_to(p, (2, p.shape[-1])) for p in positions)
        call = dict(scores=scores.t5_bias(table, max_distance=9), mask=masks.causal(), query_positions=query, key_positions=key)
        got = blockwise(*data, **call)
        assert_agree(got, reference(*data, **call), 1e-12)
        assert_agree(got["out"], with_positions(*data[:3], table, query, key), 1e-12)


@pytest.mark.usefixtures("x64")
def test_storage_order_does_not_matter():
    """Permuting tokens together with their positions permutes the output, dropout included."""
    q, k, v, _ = arrays()
    order, key_order = (jax.random.permutation(jax.random.key(i), n) for i, n in enumerate((T, S)))

    @jax.jit
    def attend(q, k, v, query_positions, key_positions):
        return attnx.attention(q, k, v, mask=masks.sliding_window(4), query_positions=query_positions, key_positions=key_positions,
                               dropout_rate=0.4, dropout_key=jax.random.key(2), implementation="blockwise", block_sizes=(4, 4))

    got = attend(q[:, order], k[:, key_order], v[:, key_order], order, key_order)
    assert_agree(got, attend(q, k, v, jnp.arange(T), jnp.arange(S))[:, order], 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [dict(queries=1, size=1, value_size=7, kv_heads=1), dict(keys=1, size=256, value_size=1, kv_heads=4)], ids=str)
def test_sizes(sizes):
    """One query, one key, head sizes 1 and 256, and values of another size."""
    data = arrays(**sizes)
    assert_agree(blockwise(*data, mask=masks.causal()), reference(*data, mask=masks.causal()), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block_sizes", [(1, 3), None], ids=str)
def test_block_sizes(block_sizes):
    """Tiles of one query, and chosen ones."""
    data = arrays(queries=8, keys=6)
    call = dict(mask=masks.causal(), scores=scores.t5_bias(normal(0, 8, N), max_distance=9))
    assert_agree(blockwise(*data, **call, block_sizes=block_sizes), reference(*data, **call), 1e-12)


@pytest.mark.parametrize("axis", ["batch", "queries", "keys", "heads", "size", "value_size"])
def test_empty_arrays(axis):
    """An axis of size 0: empty results, zeros where no key is, the mean where all scores are 0; and gradients to match."""
    sizes = dict(batch=2, queries=3, keys=3, heads=2, kv_heads=2, size=4, value_size=4) | {axis: 0} | ({"kv_heads": 1} if axis == "heads" else {})
    q, k, v, _ = arrays(jnp.float32, **sizes)

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out, r = attnx.attention(q, k, v, weights=weights.softmax(sink=0.0), implementation="blockwise", return_residual=True)
            return out.sum(), (out, r)

        (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return results, gradients, attnx.row_statistics(q, k, implementation="blockwise")

    (out, r), gradients, bare = run(q, k, v)
    assert out.shape == (*q.shape[:3], v.shape[3]) and r.shape == bare.shape == q.shape[:3]
    if axis == "keys":
        assert (out == 0).all() and (r == 0).all() and (bare == -jnp.inf).all()
    if axis == "size":
        np.testing.assert_allclose(out, np.broadcast_to(v.sum(1, keepdims=True) / 4, out.shape), rtol=1e-5)
        np.testing.assert_allclose(r, np.log(4), rtol=1e-6)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert all(np.isfinite(g).all() for g in gradients)


# Against the truth of the same inputs in float64. 16-bit weights are rounded once before they meet the values, results and gradients
# once more at the end: some 2^-8 (bfloat16) or 2^-11 (float16) of the largest entry.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1.5e-2, jnp.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
def test_dtypes(dtype):
    """Every result in its input's dtype, and right to rounding; statistics in float32; a float32 bias beside 16-bit queries."""
    data, bias = arrays(dtype), normal(0, N, T, S)
    results = [execute(*data, mask=masks.causal(), scores=scores.bias(bias)) for execute in (blockwise, reference)]
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (*data, bias)]
        truth = reference(*wide[:4], mask=masks.causal(), scores=scores.bias(wide[4]))
        for got in results:
            assert got["out"].dtype == dtype and got["r"].dtype == jnp.float32
            assert [g.dtype for g in got["gradients"]] == [dtype] * 3 + [jnp.float32]
            assert_agree(got | {"r": truth["r"]}, truth, TOLERANCE[dtype])
            assert_agree(got["r"], truth["r"], 2e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_numpy_arrays(implementation):
    """NumPy inputs, float64 by nature, are taken as JAX takes them."""
    query, key, value, _ = (np.asarray(x, np.float64) for x in arrays(jnp.float32, queries=T, keys=T))
    out, r = attnx.attention(query, key, value, mask=masks.documents(np.arange(T) // 5), key_positions=np.arange(T), implementation=implementation,
                             return_residual=True)
    assert isinstance(out, jax.Array) and out.dtype == r.dtype == jnp.float32
