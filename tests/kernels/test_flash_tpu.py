"""The fused TPU kernels: interpreted against the definition, simulated with race detection, and compiled for a real TPU."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, normal, sizes
from jax.experimental.pallas import tpu as pltpu

import attnx
from attnx import masks, scores
from attnx.core import fused
from pallas_kernels.flash.schedule import EMPTY, FULL, PARTIAL, schedule, unpack
from pallas_kernels.parts import Cover


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case, x64):
    args, options = agreement.arrays(**sizes()), CASES[case]()
    with fused.forced():
        got = agreement.evaluate(*args, implementation="pallas", block_sizes=(128, 128), **options)
    agreement.assert_agree(got, agreement.reference(*args, **options), 1e-10)


def test_bfloat16_is_as_good_as_blockwise():
    args = agreement.arrays(jnp.bfloat16, batch=1, queries=130, keys=130, heads=2, kv_heads=1, size=16, value_size=16)
    exact = agreement.reference(*(x.astype(jnp.float32) for x in args), mask=masks.causal())
    with fused.forced():
        got = agreement.evaluate(*args, implementation="pallas", mask=masks.causal())
    assert got["out"].dtype == jnp.bfloat16 and got["r"].dtype == jnp.float32
    agreement.assert_agree(got, exact, 2e-2)


def test_simulated_core_has_no_races(capfd):
    """Memory spaces, copies and semaphores simulated; reading what was never written gives NaN."""
    args = agreement.arrays(jnp.float32, batch=1, queries=200, keys=200, heads=2, kv_heads=1, size=8, value_size=8)
    options = dict(mask=masks.causal() & masks.lengths(query_lengths=100), scores=scores.bias(normal(200, 200)))  # the second block has no tile
    with fused.forced(pltpu.InterpretParams(detect_races=True)):
        got = agreement.evaluate(*args, implementation="pallas", block_sizes=(128, 128), **options)
    agreement.assert_agree(got, agreement.reference(*args, **options), 1e-5)
    assert "RACE" not in capfd.readouterr().out  # all that the simulator does about one is to print


def test_transformations():
    """shard_map over the batch, vmap over traced documents, remat."""
    q, k, v, _ = agreement.arrays(jnp.float32, batch=2, queries=130, keys=130, heads=2, kv_heads=1, size=8, value_size=8)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (2, 130), 0, 3))

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

    with fused.forced():
        agreement.assert_agree(gradient("pallas", q, k, v), gradient("reference", q, k, v), 1e-5)


@pytest.mark.parametrize("by_key", [False, True])
def test_schedule_lists_every_tile_once(by_key):
    rng = np.random.default_rng(0)
    some = rng.random((2, 1, 1, 5, 4)) < 0.5
    some[0, :, :, 2] = False  # a row of tiles without any
    every = some & (rng.random(some.shape) < 0.5)
    listed = schedule(Cover(jnp.asarray(some), jnp.asarray(every)), by_key=by_key)
    kinds = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))[:, 0, 0]
    for steps, kind in zip(np.asarray(listed.steps)[:, 0], kinds.swapaxes(1, 2) if by_key else kinds):
        at = jax.tree.map(np.asarray, unpack(steps))
        visited = np.zeros_like(kind)
        np.add.at(visited, (at.outer, at.inner), at.kind)
        assert (visited == kind).all()
        for block in range(kind.shape[0]):  # its steps are consecutive, and framed
            (mine,) = np.nonzero((at.outer == block) & (at.first | at.last | (at.kind != EMPTY)))
            assert (np.diff(mine) == 1).all() and len(mine) >= 1
            assert at.first[mine].tolist() == [n == 0 for n in range(len(mine))] and at.last[mine].tolist() == [n == len(mine) - 1 for n in range(len(mine))]
        assert (np.diff(at.outer) >= 0).all()


def test_says_what_it_lacks():
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(NotImplementedError, match="backend is 'cpu'"):
        attnx.attention(x, x, x, implementation="pallas")
    with fused.forced(), pytest.raises(NotImplementedError, match="powers of two"):
        attnx.attention(x, x, x, implementation="pallas", block_sizes=(100, 128))
    with fused.forced(), pytest.raises(NotImplementedError, match="consecutive positions"):
        attnx.attention(x, x, x, implementation="pallas", scores=scores.t5_bias(jnp.zeros((32, 1))), query_positions=jnp.arange(4))


@functools.cache
def compiled():
    """What :mod:`compile_for_tpu` reports, from a process of its own: the TPU compiler wants its environment set before it is loaded."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
                   "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = pathlib.Path(__file__).with_name("compile_for_tpu.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (pip install libtpu) is not installed")


@needs_compiler
def test_compiles_for_v5e():
    assert {name: error for name, error in compiled()["errors"].items() if error} == {}


@needs_compiler
def test_no_memory_beyond_results_and_residuals():
    """What the compiled gradient allocates besides arguments and results does not grow with the sequence."""
    short, long = compiled()["temporary"]
    assert long <= short <= 2**19
