"""The window kernels of a TPU: interpreted against the definition, simulated with race detection, and compiled for a real TPU."""

import functools

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler import needs_compiler, report
from window_cases import PARTS, REGIONS, SIZES, case, run

import attnx
from attnx.core import fused
from attnx.core.windows import window_attention
from pallas_kernels.tiles import TABLE


@pytest.fixture
def few_windows(monkeypatch):
    """Two windows a program, one at a time, so that sums pass between programs of few windows."""
    monkeypatch.setitem(TABLE, "window, tpu", tuple((fits, sizes._replace(windows=2, abreast=1)) for fits, sizes in TABLE["window, tpu"]))


@pytest.mark.parametrize("length, size, bias", SIZES["tpu"])
def test_agrees_with_the_definition(length, size, bias, x64):
    arguments = case(length, size, bias=bias)
    with fused.forced():
        got = run("pallas", *arguments)
    agreement.assert_agree(got, run("reference", *arguments), 1e-11)


@pytest.mark.parametrize("name", PARTS)
def test_parts(name, x64, few_windows):
    """Masks by window modulo their number, other weights, and scores; heads that do not fill the lanes of the last program."""
    arguments = case(9, 32, heads=5)
    parts = PARTS[name](5, 9)
    with fused.forced():
        got = run("pallas", *arguments, parts)
    agreement.assert_agree(got, run("reference", *arguments, parts), 1e-11)


@pytest.mark.parametrize("windows, heads, size, value_size", [(7, 2, 24, 40), (1, 1, 128, 128), (5, 8, 48, 48)])
def test_other_sizes(windows, heads, size, value_size, x64, few_windows):
    """Windows that no block divides; heads that divide no register, or are as wide as one."""
    arguments = case(4, size, windows=windows, heads=heads, value_size=value_size)
    with fused.forced():
        got = run("pallas", *arguments)
    agreement.assert_agree(got, run("reference", *arguments), 1e-11)


def test_bfloat16():
    arguments = case(49, 32, dtype=jnp.bfloat16)
    exact = run("reference", *(x.astype(jnp.float32) for x in arguments))
    with fused.forced():
        got = run("pallas", *arguments)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.bfloat16] * 4 + [jnp.float32]
    agreement.assert_agree(got, exact, 2e-2)


def test_simulated_core_has_no_races(capfd, few_windows):
    """Memory spaces, copies and semaphores simulated; reading what was never written gives NaN."""
    arguments, parts = case(9, 32, heads=5, dtype=jnp.float32), {"regions": REGIONS[:, :9]}
    with fused.forced(pltpu.InterpretParams(detect_races=True)):
        got = run("pallas", *arguments, parts)
    agreement.assert_agree(got, run("reference", *arguments, parts), 1e-5)
    assert "RACE" not in capfd.readouterr().out  # all that the simulator does about one is to print


def test_padded_rows_have_no_influence(x64):
    """A window of 49 tokens in one of 64 whose other rows, a region of their own, hold anything."""
    query, key, value, cotangent, bias = case(64, 32)
    ids = np.where(np.arange(64) < 49, 0, -1)[None]
    cotangent = cotangent * (ids[0] == 0)[:, None, None]
    garbage = lambda x: jnp.where(ids[0][:, None, None] == 0, x, 1e4 * jnp.sin(1e3 * x))
    cut = lambda x: x[:, :49]
    expected = run("reference", *map(cut, (query, key, value, cotangent)), bias[:, :49, :49])
    with fused.forced():
        out, (dq, dk, dv, dbias, _) = run("pallas", *map(garbage, (query, key, value)), cotangent, bias, {"regions": ids})
    agreement.assert_agree((cut(out), (*map(cut, (dq, dk, dv)), dbias[:, :49, :49], ())), expected, 1e-9)
    assert not jnp.any(dbias[:, :49, 49:])


def test_transformations(x64, few_windows):
    """vmap, remat, and a batch over two devices."""
    query, key, value, _, bias = case(9, 32, windows=4)
    mesh, spec = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(implementation, *arrays):
        def attend(query, key, value, bias):
            one = lambda *x: window_attention(*x, bias=bias, regions=REGIONS[:2, :9], implementation=implementation)
            return jax.vmap(jax.checkpoint(one))(*(x.reshape(2, -1, *x.shape[1:]) for x in (query, key, value)))

        # the interpreter of kernels, unlike their compiler, cannot have scalars checked that differ between devices
        sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec("data"),) * 3 + (spec(),), out_specs=spec("data"), check_vma=False)
        return jax.grad(lambda *x: jnp.sum(jnp.sin(sharded(*x))), argnums=(0, 1, 2, 3))(*arrays)

    arrays = (*(jnp.concatenate([x, -x]) for x in (query, key, value)), bias)
    with fused.forced():
        got = gradient("pallas", *arrays)
    agreement.assert_agree(got, gradient("reference", *arrays), 1e-11)


def test_shards_of_a_batch_are_typed():
    """With the checks of shard_map on, which the interpreter of kernels lacks: traced as for a TPU."""
    mesh, spec = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")

    def loss(x, bias):
        attend = lambda x, bias: window_attention(x, x, x, bias=bias, implementation="pallas")
        return jax.shard_map(attend, mesh=mesh, in_specs=(spec, None), out_specs=spec)(x, bias).sum()

    with fused.forced(interpret=False):
        gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), jnp.ones((2, 4, 2, 8)), jnp.zeros((2, 4, 4)))
    assert [g.shape for g in gradients] == [(2, 4, 2, 8), (2, 4, 4)]


def test_none_picks_kernels_that_serve():
    def kernels(value, **options):
        return "pallas_call" in str(jax.make_jaxpr(lambda x, value: window_attention(x, x, value, **options))(jnp.ones((2, 4, 2, 8)), value))

    value = jnp.ones((2, 4, 2, 8))
    assert not kernels(value)
    with fused.forced():
        assert kernels(value) and not kernels(value, implementation="blockwise") and not kernels(value[..., :1])


def test_says_what_it_lacks():
    x = jnp.ones((2, 4, 2, 8))
    with pytest.raises(NotImplementedError, match="backend is 'cpu'"):
        window_attention(x, x, x, implementation="pallas")
    refused = {
        "256 tokens at the most, got 300": ([jnp.ones((1, 300, 1, 8))] * 3, {}),
        "as many heads of keys": ([x, x[:, :, :1], x[:, :, :1]], {}),
        "heads of size 1": ([x, x, x[..., :1]], {}),
        "exponential family": ([x] * 3, {"weights": attnx.weights.sparsemax()}),
        "no sink": ([x] * 3, {"weights": attnx.weights.softmax(sink=0.0)}),
    }
    for message, (arrays, options) in refused.items():
        with fused.forced(), pytest.raises(NotImplementedError, match=message):
            window_attention(*arrays, implementation="pallas", **options)
    with fused.forced(interpret=False), pytest.raises(NotImplementedError, match="not in float16"):
        window_attention(*[x.astype(jnp.float16)] * 3, implementation="pallas")
    with fused.forced(interpret=False), pytest.raises(NotImplementedError, match="first derivatives only; use 'reference'"):
        loss = lambda x: jnp.sum(window_attention(x, x, x, implementation="pallas") ** 2)
        jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x))), x)


# Compiled -----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_compiles_for_every_chip():
    assert {name: error for name, error in report("compile_window_for_tpu.py")["errors"].items() if error} == {}


@needs_compiler
def test_keeps_nothing_but_inputs():
    """Forward and backward pass want no scratch memory, not even that of one array of tokens."""
    memory, tokens = report("compile_window_for_tpu.py")["memory"]
    assert memory < tokens / 4
