"""The decode kernel: interpreted against the definition, simulated with race detection, and compiled for a real TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from agreement import assert_agree
from decode_cases import BATCH, CASES, KV_HEADS, LENGTHS, SLOTS, agree, assert_cascade, assert_pages, caches, normal, run, shifted
from jax.experimental.pallas import tpu as pltpu
from tpu_compiler import needs_compiler, report

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.decode import decode


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    tokens, parts = CASES[case]
    agree((*caches(tokens=tokens), LENGTHS), 1e-11, **parts())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weigh", [weights.sigmoid(), weights.entmax15()])
def test_other_weights(weigh):
    agree((*caches(), LENGTHS), 1e-10, weights=weigh, return_residual=False)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_any_number_of_splits(kv_heads):
    """Shares that end inside a sequence, that hold several, or none; the last block reaches beyond the cache, where a tile holds NaN."""
    query, key, value = caches(kv_heads=kv_heads)
    for splits in (1, 7):
        agree((query, key, value, LENGTHS), 1e-11, block_size=128 // kv_heads, splits=splits, mask=masks.causal())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_pages(kv_heads):
    assert_pages(kv_heads, 16 * 4 // kv_heads, 128, "tpu")


@pytest.mark.usefixtures("x64")
def test_cascade_is_the_flat_call():
    assert_cascade("tpu")


@pytest.mark.parametrize("dtype, cache_dtype, tolerance", [(jnp.bfloat16, jnp.bfloat16, 2e-2), (jnp.float32, jnp.bfloat16, 1e-5)])
def test_bfloat16_caches(dtype, cache_dtype, tolerance):
    query, key, value = (x.astype(d) for x, d in zip(caches(jnp.float32), (dtype, cache_dtype, cache_dtype)))
    exact = run(*(x.astype(jnp.float32) for x in (query, key, value)), LENGTHS, implementation="reference", mask=masks.causal())
    with fused.forced():
        got = run(query, key, value, LENGTHS, implementation="pallas", mask=masks.causal())
    assert got.dtype == dtype
    assert_agree(got, exact, tolerance)


def test_simulated_core_has_no_races(capfd):
    """Memory spaces, copies and semaphores simulated; reading what was never written gives NaN."""
    args = (*caches(jnp.float32, tokens=2), LENGTHS)
    options = dict(mask=masks.causal(), scores=scores.bias(normal(2, SLOTS).astype(jnp.float32)))
    expected = run(*args, implementation="reference", **options)
    with fused.forced(pltpu.InterpretParams(detect_races=True)):
        got = run(*args, implementation="pallas", block_size=64, splits=3, **options)
    assert_agree(got, expected, 1e-5)
    assert "RACE" not in capfd.readouterr().out  # all that the simulator does about one is to print


def test_transformations():
    """One compilation for all lengths, vmap over caches, and steps of a mechanism."""
    query, key, value = caches(jnp.float32)
    traces = []

    @jax.jit
    def both(query, key, value, lengths):
        traces.append(lengths)
        one = lambda implementation: jax.vmap(lambda q, k, v, n: decode(q[None], k[None], v[None], n, implementation=implementation)[0])
        return one("pallas")(query, key, value, lengths), one("reference")(query, key, value, lengths)

    with fused.forced():
        for lengths in (LENGTHS, LENGTHS[::-1]):
            assert_agree(*both(query, key, value, lengths), 1e-5)
        assert len(traces) == 1
        mixers = [attnx.pairs(mask=masks.causal(), implementation=name) for name in ("pallas", "reference")]
        results = [jax.jit(mixer.step)(mixer.init(BATCH, 256, KV_HEADS, 8, 12, jnp.float32), query, key[:, :1], value[:, :1])[1] for mixer in mixers]
    assert_agree(*results, 1e-5)


def test_says_what_it_lacks():
    query, key, value = caches(jnp.float32)
    call = functools.partial(decode, query, key, value, LENGTHS, implementation="pallas")
    with pytest.raises(NotImplementedError, match="backend is 'cpu'"):
        call()
    with fused.forced():
        with pytest.raises(NotImplementedError, match="a multiple of 64"):
            call(block_size=100)
        with pytest.raises(NotImplementedError, match="axes of their own"):
            call(scores=scores.elementwise(shifted, attnx.Operand(jnp.ones((SLOTS, 1)), ("key", None)), jnp.ones(())))
        with pytest.raises(NotImplementedError, match="values of size 1"):
            decode(query, key, value[..., :1], LENGTHS, implementation="pallas")
    with fused.forced(interpret=False), pytest.raises(NotImplementedError, match="float16"):
        decode(query.astype(jnp.float16), key.astype(jnp.float16), value.astype(jnp.float16), LENGTHS, implementation="pallas")


@needs_compiler
def test_compiles_for_tpus():
    assert {name: error for name, error in report("compile_decode_for_tpu.py")["errors"].items() if error} == {}


@needs_compiler
def test_reads_the_cache_where_it_lies():
    """Compiled for a TPU it allocates next to nothing besides arguments and results: no copy in another layout, contiguous or in pages."""
    assert max(report("compile_decode_for_tpu.py")["temporary"]) < 2**19
