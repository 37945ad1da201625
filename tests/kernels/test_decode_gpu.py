"""The decode kernel for GPUs: interpreted against the definition, and lowered for an H200 where there is none."""

import functools

import jax
import jax.numpy as jnp
import pytest
from agreement import assert_agree
from decode_cases import BATCH, CASES, KV_HEADS, LENGTHS, SLOTS, agree, assert_cascade, assert_pages, caches, run, shifted
from gpu_lowering import kernels

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.decode import decode

GPU = functools.partial(agree, platform="gpu")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    """In few shares, so that these end inside a sequence, and hold several."""
    tokens, parts = CASES[case]
    GPU((*caches(tokens=tokens), LENGTHS), 1e-11, splits=3, **parts())


@pytest.mark.usefixtures("x64")
def test_weights_that_do_not_merge():
    GPU((*caches(kv_heads=1), LENGTHS), 1e-10, weights=weights.entmax15(), return_residual=False)


@pytest.mark.usefixtures("x64")
def test_pages():
    assert_pages(2, 8, 32, "gpu")


@pytest.mark.usefixtures("x64")
def test_cascade_is_the_flat_call():
    assert_cascade("gpu")


@pytest.mark.parametrize("size, dtype, cache_dtype, tolerance", [
    (96, jnp.bfloat16, jnp.bfloat16, 2e-2), (256, jnp.float32, jnp.bfloat16, 1e-5)])
def test_bfloat16_caches(size, dtype, cache_dtype, tolerance):
    """Also: more rows than a tile has, and blocks, shares as they come."""
    arrays = caches(jnp.float32, size=size, tokens=40 if size == 96 else 1)
    query, key, value = (x.astype(d) for x, d in zip(arrays, (dtype, cache_dtype, cache_dtype)))
    exact = run(*(x.astype(jnp.float32) for x in (query, key, value)), LENGTHS, implementation="reference", mask=masks.causal())
    with fused.forced(platform="gpu"):
        got = run(query, key, value, LENGTHS, implementation="pallas", mask=masks.causal())
    assert got.dtype == dtype
    assert_agree(got, exact, tolerance)


def lower(batch=2, slots=1024, heads=8, kv_heads=2, size=128, dtype=jnp.bfloat16, page=None, tokens=1, **options):
    """The number of kernels of a step."""
    shape = jax.ShapeDtypeStruct
    pool = (batch, slots) if page is None else (batch * slots // page + 3, page)
    args = [shape((batch, tokens, heads, size), dtype), *[shape((*pool, kv_heads, size), dtype)] * 2, shape((batch,), jnp.int32)]
    table = None if page is None else shape((batch, slots // page), jnp.int32)
    arrays = {name: options.pop(name) for name in ("scores", "weights") if name in options}
    return kernels(lambda *args: decode(*args[:4], page_table=args[4], implementation="pallas", **args[5], **options), *args, table, arrays)


LOWERED = {
    "grouped heads": dict(),
    "pages, window, head size 96": dict(page=16, size=96, mask=masks.sliding_window(100)),
    "float32, odd length, several tokens": dict(dtype=jnp.float32, slots=1001, tokens=3, mask=masks.causal()),
    "head size 256, softpick, slopes, offset table": dict(
        size=256, weights=weights.softpick(), scores=(scores.alibi(8), scores.t5_bias(jnp.ones((32, 8), jnp.float32)))),
    "bias, boolean mask": dict(scores=scores.bias(jnp.ones((8, 1, 1024), jnp.bfloat16)), mask=masks.explicit(jnp.ones((1, 1024), bool))),
}


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_lowers_for_an_h200(name):
    assert lower(**LOWERED[name]) == 1


def test_says_what_it_lacks():
    query, key, value = caches(jnp.float32)
    call = functools.partial(decode, query, key, value, LENGTHS, implementation="pallas")
    with fused.forced(platform="gpu"):
        with pytest.raises(NotImplementedError, match="power of two and at least 16, got 100"):
            call(block_size=100)
        with pytest.raises(NotImplementedError, match="values of size 1"):
            decode(query, key, value[..., :1], LENGTHS, implementation="pallas")
    with fused.forced(interpret=False, platform="gpu"):
        with pytest.raises(NotImplementedError, match="axes of their own"):
            call(scores=scores.elementwise(shifted, attnx.Operand(jnp.ones((SLOTS, 1)), ("key", None)), jnp.ones(())))
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
            decode(*caches(), LENGTHS, implementation="pallas")


def test_steps_of_a_mechanism():
    query, key, value = caches(jnp.float32)
    mixers = [attnx.pairs(mask=masks.causal(), implementation=name) for name in ("pallas", "reference")]
    with fused.forced(platform="gpu"):
        results = [jax.jit(mixer.step)(mixer.init(BATCH, 64, KV_HEADS, 8, 12, jnp.float32), query, key[:, :1], value[:, :1])[1] for mixer in mixers]
    assert_agree(*results, 1e-5)
