"""The decode kernel for GPUs: interpreted against the definition, and lowered for an H200 where there is none."""

import functools

import jax
import jax.numpy as jnp
import pytest
from agreement import assert_agree
from decode_cases import CASES, LENGTHS, SLOTS, agree, assert_cascade, assert_pages, caches, run, shifted
from gpu_lowering import kernels

import attnx
from attnx import masks, scores, weights
from attnx.core import cached_fused, fused
from attnx.core.decode import decode


@pytest.fixture(autouse=True)
def few_shares(monkeypatch):
    """So that they end inside a sequence, and hold several."""
    monkeypatch.setattr(cached_fused, "PROGRAMS", 6)


GPU = functools.partial(agree, platform="gpu")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    tokens, parts = CASES[case]
    GPU((*caches(tokens=tokens), LENGTHS), 1e-11, **parts())


@pytest.mark.usefixtures("x64")
def test_weights_that_do_not_merge():
    GPU((*caches(kv_heads=1), LENGTHS), 1e-10, weights=weights.entmax15(), return_residual=False)


@pytest.mark.usefixtures("x64")
def test_pages():
    assert_pages(2, 8, 32, "gpu")


@pytest.mark.usefixtures("x64")
def test_cascade_is_the_flat_call():
    assert_cascade("gpu")


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float32, 1e-5)])
def test_bfloat16_caches(dtype, tolerance):
    """Also: more rows than a tile has, and blocks as they come."""
    query, key, value = (x.astype(d) for x, d in zip(caches(jnp.float32, size=96, tokens=40), (dtype, jnp.bfloat16, jnp.bfloat16)))
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
