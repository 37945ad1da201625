"""The kernels of the selected engine: interpreted against the definition, simulated with race detection, and compiled for a real TPU."""

import functools

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from cases import sizes as case_sizes
from jax.experimental.pallas import tpu as pltpu
from selected_cases import CASES, choice, evaluate
from tpu_compiler import needs_compiler, report

from attnx import masks, scores
from attnx.core import fused, selected_fused
from attnx.core.selected import selected_attention
from pallas_kernels.flash.schedule import EMPTY, FULL, PARTIAL, Listed, schedule, unpack
from pallas_kernels.parts import Cover


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case, x64):
    block_sizes, heads, scored, parts = CASES[case]
    sizes, options = case_sizes(), parts()
    indices, block_scores = choice(block_sizes, heads, sizes["queries"], sizes["keys"])
    args = *agreement.arrays(**sizes), indices, block_scores if scored else None
    with fused.forced():
        got = evaluate(*args, block_sizes=block_sizes, implementation="pallas", **options)
    agreement.assert_agree(got, evaluate(*args, block_sizes=block_sizes, implementation="reference", **options), 1e-10)


def test_bfloat16():
    args = agreement.arrays(jnp.bfloat16, batch=1, queries=130, keys=130, heads=2, kv_heads=1, size=16, value_size=16)
    table = choice((64, 64), 1, 130, 130, 1)
    exact = evaluate(*(x.astype(jnp.float32) for x in args), *table, block_sizes=(64, 64), implementation="reference")
    with fused.forced():
        got = evaluate(*args, *table, block_sizes=(64, 64), implementation="pallas")
    assert got[0][0].dtype == jnp.bfloat16 and got[0][1].dtype == jnp.float32
    agreement.assert_agree(got, exact, 2e-2)


def test_simulated_core_has_no_races(capfd):
    """Memory spaces, copies and semaphores simulated; reading what was never written gives NaN."""
    args = agreement.arrays(jnp.float32, batch=1, queries=200, keys=200, heads=2, kv_heads=1, size=8, value_size=8)
    args = *args, *choice((64, 64), 2, 200, 200, 1)
    options = dict(block_sizes=(64, 64), mask=masks.causal())
    with fused.forced(pltpu.InterpretParams(detect_races=True)):
        got = evaluate(*args, implementation="pallas", **options)
    agreement.assert_agree(got, evaluate(*args, implementation="reference", **options), 1e-5)
    assert "RACE" not in capfd.readouterr().out  # all that the simulator does about one is to print


def test_long_lists_one_by_one(x64, monkeypatch):
    """Batch elements and heads in turn, where scalar memory does not hold all lists; gradients of what they share add up."""
    monkeypatch.setattr(selected_fused, "SCALARS", 16)
    args = *agreement.arrays(queries=130, keys=130), *choice((32, 64), 2, 130, 130)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (2, 130), 0, 4))
    options = dict(block_sizes=(32, 64), mask=masks.documents(ids), scores=(scores.bias(normal(130, 130)), scores.alibi(normal(4))),
                   dropout_rate=0.3, dropout_key=jax.random.key(5))
    with fused.forced():
        got = evaluate(*args, implementation="pallas", **options)
    agreement.assert_agree(got, evaluate(*args, implementation="reference", **options), 1e-10)


def test_transformations(x64):
    """vmap, remat, second derivatives."""
    query, key, value, _ = agreement.arrays(batch=2, queries=130, keys=130, heads=2, kv_heads=1, size=4, value_size=4)
    indices, block_scores = choice((64, 64), 1, 130, 130)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, *args):
        def one(q, k, v, indices, block_scores):
            return selected_attention(q[None], k[None], v[None], indices[None], block_scores=block_scores[None], block_sizes=(64, 64),
                                      implementation=implementation)[0]

        many = jax.vmap(jax.checkpoint(one))
        penalty = lambda q: (jax.grad(lambda q: jnp.sin(one(q, *(x[0] for x in args[1:]))).sum())(q) ** 2).sum()
        return jax.grad(lambda q, e: jnp.sin(many(q, *args[1:4], e)).sum(), (0, 1))(args[0], args[4]), jax.grad(penalty)(args[0][0])

    args = query, key, value, indices, block_scores
    with fused.forced():
        got = gradients("pallas", *args)
    agreement.assert_agree(got, gradients("reference", *args), 1e-10)


def test_shards_of_batch_and_heads(x64):
    """Under shard_map, each device with its own part of the table; a table that all share is read by all."""
    query, key, value, _ = agreement.arrays(batch=2, queries=130, keys=130, heads=4, kv_heads=2, size=4, value_size=4)
    indices, block_scores = choice((64, 64), 2, 130, 130)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens, table = jax.P("data", None, "tensor"), jax.P("data" if indices.shape[0] > 1 else None, "tensor")

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def gradients(implementation, sharded, *args):
        def attend(q, k, v, indices, block_scores):
            return selected_attention(q, k, v, indices, block_scores=block_scores, block_sizes=(64, 64), implementation=implementation)

        if sharded:  # the interpreter of kernels lacks the types that the checks look at
            attend = jax.shard_map(attend, mesh=mesh, in_specs=(tokens, tokens, tokens, table, table), out_specs=tokens, check_vma=False)
        return jax.value_and_grad(lambda q, k, v, e: jnp.sin(attend(q, k, v, args[3], e)).sum(), (0, 1, 2, 3))(*args[:3], args[4])

    args = query, key, value, indices, block_scores
    with fused.forced():
        got = gradients("pallas", True, *args)
    agreement.assert_agree(got, gradients("reference", False, *args), 1e-10)


@pytest.mark.parametrize(("by_key", "varies"), [(True, (True, True, False)), (False, (False, True, True))])
def test_schedule_of_a_list(by_key, varies):
    """The list, spelled out as a table."""
    rng, (nq, nk, share) = np.random.default_rng(0), (5, 4, 2)
    blocks = np.where(rng.random((2, 1, 2, nq, 2 * nk)) < 0.6, np.arange(2 * nk) // 2, nk)  # each named up to twice
    some, every = rng.random((2, 1, 1, nq, 1)) < 0.9, rng.random((1, 1, 1, nq, 1)) < 0.7
    times = ((blocks[..., None] == np.arange(nk)) & some[..., None]).sum(-2)  # [2, 1, 2, nq, nk]
    full = (times == share) & every
    axes = tuple(axis for axis in range(3) if not varies[axis])
    kinds = np.where(times.any(axes, keepdims=True), np.where(full.all(axes, keepdims=True), FULL, PARTIAL), EMPTY)
    kinds = kinds.reshape(-1, nq, nk).swapaxes(1, 2) if by_key else kinds.reshape(-1, nq, nk)
    cover = Cover(jnp.asarray(some), jnp.asarray(every))
    listed = jax.jit(lambda blocks, cover: schedule(Listed(blocks, cover, share, nk), by_key=by_key, varies=varies))(jnp.asarray(blocks, jnp.int32), cover)
    lists = np.asarray(listed.steps).reshape(len(kinds), -1)
    assert lists.shape[1] == nq * nk + (nk if by_key else nq)
    for steps, kind in zip(lists, kinds, strict=True):
        at = jax.tree.map(np.asarray, unpack(steps))
        real = at.first | at.last | (at.kind != EMPTY)
        visits = np.stack([at.outer, at.inner, at.kind], 1)[real].tolist()
        outer, inner = np.nonzero(kind)
        expected = [[a, b, kind[a, b]] for a, b in zip(outer, inner)] + [[a, 0, EMPTY] for a in np.nonzero(~kind.any(1))[0]]
        assert visits == sorted(expected)
        edge = np.diff(at.outer[real]) > 0
        assert at.first[real].tolist() == [True, *edge] and at.last[real].tolist() == [*edge, True]
        assert len(visits) <= listed.count


def test_says_what_it_lacks():
    x, table = jnp.ones((1, 16, 1, 8)), jnp.zeros((1, 1, 1, 1), int)
    call = functools.partial(selected_attention, x, x, x, table, implementation="pallas")
    with pytest.raises(NotImplementedError, match="backend is 'cpu'"):
        call(block_sizes=(16, 16))
    with fused.forced(), pytest.raises(NotImplementedError, match="powers of two and at least 8"):
        call(block_sizes=(16, 12))
    with fused.forced(), pytest.raises(NotImplementedError, match="consecutive positions"):
        call(block_sizes=(16, 16), scores=scores.t5_bias(jnp.zeros((32, 1))), query_positions=jnp.arange(16))


@needs_compiler
def test_compiles_for_tpus():
    assert {name: error for name, error in report("compile_selected_for_tpu.py")["errors"].items() if error} == {}


@needs_compiler
def test_no_memory_beyond_results_and_residuals():
    """What the compiled gradient allocates besides arguments and results does not grow with the sequence."""
    short, long = report("compile_selected_for_tpu.py")["temporary"]
    assert long <= short <= 2**20
