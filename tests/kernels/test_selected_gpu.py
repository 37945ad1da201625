"""The selected engine's GPU kernels: interpreted against the definition, and lowered for an H200 where there is none."""

import functools

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from cases import sizes as case_sizes
from gpu_lowering import kernels
from selected_cases import CASES, choice, evaluate

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.selected import selected_attention
from pallas_kernels.flash.schedule import Listed, lists, spread_out
from pallas_kernels.parts import Cover


@pytest.mark.parametrize("case", list(CASES)[1:])  # the first differs from these in nothing that a GPU minds
def test_agrees_with_the_definition(case, x64):
    block_sizes, heads, scored, parts = CASES[case]
    sizes, options = case_sizes(), parts()
    indices, block_scores = choice(block_sizes, heads, sizes["queries"], sizes["keys"])
    args = *agreement.arrays(**sizes), indices, block_scores if scored else None
    with fused.forced(platform="gpu"):
        got = evaluate(*args, block_sizes=block_sizes, implementation="pallas", **options)
    agreement.assert_agree(got, evaluate(*args, block_sizes=block_sizes, implementation="reference", **options), 1e-10)


def test_bfloat16():
    args = agreement.arrays(jnp.bfloat16, batch=1, queries=130, keys=130, heads=2, kv_heads=1, size=96, value_size=64)
    table = choice((64, 64), 1, 130, 130, 1)
    exact = evaluate(*(x.astype(jnp.float32) for x in args), *table, block_sizes=(64, 64), implementation="reference")
    with fused.forced(platform="gpu"):
        got = evaluate(*args, *table, block_sizes=(64, 64), implementation="pallas")
    assert got[0][0].dtype == jnp.bfloat16 and got[0][1].dtype == jnp.float32
    agreement.assert_agree(got, exact, 2e-2)


@pytest.mark.parametrize("by_key", [False, True])
def test_lists_of_a_choice(by_key):
    """Whole tiles before partial ones, a list for each head, as a table spells it out."""
    rng, (nq, nk, share) = np.random.default_rng(0), (5, 4, 2)
    blocks = np.where(rng.random((2, 2, 3, nq, 2 * nk)) < 0.6, np.arange(2 * nk) // 2, nk)  # each named up to twice
    some, every = rng.random((2, 1, 1, nq, 1)) < 0.9, rng.random((1, 1, 1, nq, 1)) < 0.7
    times = ((blocks[..., None] == np.arange(nk)) & some[..., None]).sum(-2)
    full = (times == share) & every
    listed = Listed(jnp.asarray(blocks, jnp.int32), Cover(jnp.asarray(some), jnp.asarray(every)), share, nk)
    assert (np.asarray(spread_out(listed).some) == (times > 0)).all()
    found = jax.tree.map(np.asarray, jax.jit(lambda blocks, cover: lists(Listed(blocks, cover, share, nk), by_key=by_key))(*listed[:2]))
    turned = lambda x: (x.swapaxes(-1, -2) if by_key else x).reshape(2, 6, nk if by_key else nq, -1)
    times, full = turned(times), turned(full)
    for b, head, block in np.ndindex(times.shape[:3]):
        order, (first, middle, last) = found.order[b, head], (x[b, head, block] for x in found[1:])
        assert order[first:middle].tolist() == np.flatnonzero(full[b, head, block]).tolist()
        assert order[middle:last].tolist() == np.flatnonzero((times > 0)[b, head, block] & ~full[b, head, block]).tolist()


def lower(length=256, heads=1, size=64, dtype=jnp.bfloat16, blocks=(64, 64), scored=True, **parts):
    """The number of kernels in the gradient, 4 query heads on 2 key-value heads."""
    shape = jax.ShapeDtypeStruct
    indices = shape((1, heads, -(-length // blocks[0]), 3), jnp.int32)
    arrays = {name: parts.pop(name) for name in ("scores", "weights") if name in parts}

    def loss(query, key, value, block_scores, arrays, indices):
        out = selected_attention(query, key, value, indices, block_sizes=blocks, block_scores=block_scores, implementation="pallas", **arrays, **parts)
        return out.astype(jnp.float32).sum()

    qkv = [shape((1, length, n, size), dtype) for n in (4, 2, 2)]
    return kernels(jax.grad(loss, (0, 1, 2, 3, 4), allow_int=True), *qkv, shape(indices.shape, jnp.float32) if scored else None, arrays, indices)


LOWERED = {
    "a choice for each key-value head, head size 128": (dict(heads=2, size=128, mask=masks.causal()), 3),
    "one for all, head size 96, odd length, small blocks": (dict(length=201, size=96, blocks=(16, 32), mask=masks.causal()), 3),
    "each head for itself, softpick, slopes, a bias": (
        dict(heads=4, scored=False, weights=weights.softpick(), scores=(scores.alibi(normal(4)), scores.bias(normal(256, 256)))), 4),
    "head size 256, offset table, dropout": (
        dict(size=256, scores=scores.t5_bias(normal(32, 4)), dropout_rate=0.1, dropout_key=jax.random.key(0)), 4),
}


@pytest.mark.parametrize("case", LOWERED)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_lowers_for_an_h200(case):
    parts, count = LOWERED[case]
    assert lower(**parts) == count


def affine(s, at, numbers):
    return s * numbers[..., 0]


def test_says_what_it_lacks():
    x, table = jnp.ones((1, 16, 1, 8)), jnp.zeros((1, 1, 1, 1), int)
    call = functools.partial(selected_attention, x, x, x, table, implementation="pallas")
    with fused.forced(platform="gpu"):
        with pytest.raises(NotImplementedError, match="powers of two and at least 16, got \\(16, 8\\)"):
            call(block_sizes=(16, 8))
        with pytest.raises(NotImplementedError, match="consecutive positions"):
            call(block_sizes=(16, 16), scores=scores.t5_bias(jnp.zeros((32, 1))), query_positions=jnp.arange(16))
        with pytest.raises(NotImplementedError, match="values or heads of size 1"):
            selected_attention(x, x, x[..., :1], table, block_sizes=(16, 16), implementation="pallas")
    with fused.forced(interpret=False, platform="gpu"):
        with pytest.raises(NotImplementedError, match="axes of their own"):
            call(block_sizes=(16, 16), scores=scores.elementwise(affine, attnx.Operand(jnp.ones((16, 2)), ("key", None))))
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="not in float64"):
            wide = jnp.ones((1, 16, 1, 8))
            selected_attention(wide, wide, wide, table, block_sizes=(16, 16), implementation="pallas")
