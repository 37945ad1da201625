"""The fused TPU kernels: interpreted against the definition, simulated with race detection, and compiled for a real TPU."""


import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, assert_transforms, normal, sizes
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler import needs_compiler, report

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
    assert_transforms("tpu", 130)


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


@needs_compiler
def test_compiles_for_tpus():
    assert {name: error for name, error in report("compile_for_tpu.py")["errors"].items() if error} == {}


@needs_compiler
def test_no_memory_beyond_results_and_residuals():
    """What the compiled gradient allocates besides arguments and results does not grow with the sequence."""
    short, long = report("compile_for_tpu.py")["temporary"]
    assert long <= short <= 2**19
