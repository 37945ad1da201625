"""The recurrent engine's TPU kernels: interpreted against the definition, simulated with race detection, and compiled for a real TPU."""

import functools

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from linear_cases import CASES, case, run
from tpu_compiler import needs_compiler, report

from attnx.core import fused
from attnx.core.linear import LinearState, linear_attention
from pallas_kernels.tiles import TABLE


@pytest.fixture(autouse=True)
def short_slabs(monkeypatch):
    """Two chunks a slab, so that states pass between slabs of short sequences."""
    monkeypatch.setitem(TABLE, "linear, tpu", tuple((fits, slab._replace(chunks=2)) for fits, slab in TABLE["linear, tpu"]))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, x64):
    arguments = case(name)
    with fused.forced():
        got = run("pallas", *arguments)
    agreement.assert_agree(got, run("parallel", *arguments), 1e-11)


@pytest.mark.parametrize("name, size", [("constant", 64), ("per channel, shared state", 96), ("no decay, normalised", 256)])
def test_bfloat16(name, size):
    arrays, cotangents, segments, options = case(name, jnp.bfloat16, length=257, size=size, value_size=64)
    arrays = tuple(x if x is None or isinstance(x, LinearState) else x / size**0.25 for x in arrays[:2]) + arrays[2:]
    exact = run("recurrent", *jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents)), segments, options)
    with fused.forced():
        got = run("pallas", arrays, cotangents, segments, options)
    assert [x.dtype for x in jax.tree.leaves(got[1])] == [x.dtype for x in jax.tree.leaves(arrays)]
    assert got[0][0].dtype == jnp.bfloat16 and got[0][1].memory.dtype == jnp.float32
    agreement.assert_agree(got, exact, 2e-2)


def test_simulated_core_has_no_races(capfd):
    """Memory spaces, copies and semaphores simulated; reading what was never written gives NaN."""
    arguments = case("per head, shared state, documents", np.float32)
    with fused.forced(pltpu.InterpretParams(detect_races=True)):
        got = run("pallas", *arguments)
    agreement.assert_agree(got, run("recurrent", *arguments), 1e-5)
    assert "RACE" not in capfd.readouterr().out  # all that the simulator does about one is to print


def test_transformations(x64):
    """A sequence over two devices, vmap, remat; features of the caller."""
    (query, key, value, log_decay, _), _, segments, options = case("per head, shared state, documents", length=256)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))

    def attend(query, key, value, log_decay, segments, **extra):
        one = lambda *x: linear_attention(*(x[None] for x in x[:3]), log_decay=x[3][None], segment_ids=x[4][None], feature_map=jnp.exp, **options, **extra)[0]
        return jax.vmap(jax.checkpoint(one))(query, key, value, log_decay, segments)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(implementation, *arrays):
        def loss(*arrays):
            tokens = jax.sharding.PartitionSpec(None, "sequence")
            local = functools.partial(attend, implementation=implementation, axis_name="sequence")
            # the interpreter of kernels, unlike their compiler, cannot have scalars checked that differ between devices
            local = jax.shard_map(local, mesh=mesh, in_specs=tokens, out_specs=tokens, check_vma=False)
            return jnp.sum(jnp.sin((local if implementation == "pallas" else attend)(*arrays, segments)))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    with fused.forced():
        got = gradient("pallas", query, key, value, log_decay)
    agreement.assert_agree(got, gradient(None, query, key, value, log_decay), 1e-11)


def test_shards_of_a_batch_are_typed():
    """With the checks of shard_map on, which the interpreter of kernels lacks: traced as for a TPU."""
    mesh, spec = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")

    def loss(x, decay):
        attend = lambda x, decay: linear_attention(x, x, x, log_decay=decay, implementation="pallas")
        return jax.shard_map(attend, mesh=mesh, in_specs=(spec, None), out_specs=spec)(x, decay).sum()

    with fused.forced(interpret=False):
        gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), jnp.ones((2, 4, 1, 8)), jnp.zeros(1))
    assert [g.shape for g in gradients] == [(2, 4, 1, 8), (1,)]


@pytest.mark.parametrize("batch, length, heads, size", [(0, 5, 2, 4), (1, 0, 2, 4), (1, 1, 1, 1), (2, 3, 2, 1)])
def test_small_and_empty(batch, length, heads, size):
    query, key = jnp.ones((batch, length, heads, size)), jnp.ones((batch, length, 1, size))
    with fused.forced():
        got = linear_attention(query, key, key, normalize=True, return_state=True, implementation="pallas")
    agreement.assert_agree(got, linear_attention(query, key, key, normalize=True, return_state=True, implementation="chunked"), 1e-6)


def test_says_what_it_lacks():
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(NotImplementedError, match="backend is 'cpu'"):
        linear_attention(x, x, x, implementation="pallas")
    with fused.forced(), pytest.raises(NotImplementedError, match="'chunked' serves"):
        linear_attention(x, x, x, is_causal=False, implementation="pallas")
    with fused.forced(), pytest.raises(NotImplementedError, match="at least 128, got 64"):
        linear_attention(x, x, x, chunk_size=64, implementation="pallas")
    with fused.forced(interpret=False), pytest.raises(NotImplementedError, match="not in float16"):
        linear_attention(*[x.astype(jnp.float16)] * 3, implementation="pallas")
    with fused.forced(interpret=False), pytest.raises(NotImplementedError, match="keys of size 1"):
        linear_attention(*[x[..., :1]] * 3, implementation="pallas")
    with fused.forced(interpret=False), pytest.raises(NotImplementedError, match="first derivatives only; use 'chunked'"):
        loss = lambda x: jnp.sum(linear_attention(x, x, x, implementation="pallas") ** 2)
        jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x))), x)


# Compiled -----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_compiles_for_tpus():
    assert {name: error for name, error in report("compile_linear_for_tpu.py")["errors"].items() if error} == {}


@needs_compiler
def test_no_memory_beyond_results_and_residuals():
    """The gradient allocates, besides arguments and results, one state for each slab."""
    for temporary, states in report("compile_linear_for_tpu.py")["memory"]:
        assert temporary <= states + 2**16
