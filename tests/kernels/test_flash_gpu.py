"""The fused GPU kernels: interpreted against the definition, and lowered for an H200 where there is none."""


import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, assert_transforms, features, normal, sizes
from gpu_lowering import kernels

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from pallas_kernels.flash.gpu_quick import quickened
from pallas_kernels.flash.schedule import visits
from pallas_kernels.parts import Cover, Similarity, part
from pallas_kernels.tiles import TABLE


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case, x64):
    args, options = agreement.arrays(**sizes()), CASES[case]()
    with fused.forced(platform="gpu"):
        got = agreement.evaluate(*args, implementation="pallas", block_sizes=(128, 64), **options)
    agreement.assert_agree(got, agreement.reference(*args, **options), 1e-10)


@pytest.mark.parametrize("size, value_size", [(64, 96), (96, 64), (128, 128), (256, 256)])
def test_bfloat16_at_the_tiles_of_the_table(size, value_size):
    args = agreement.arrays(jnp.bfloat16, **sizes(batch=1, queries=150, keys=150, heads=2, kv_heads=1, size=size, value_size=value_size))
    exact = agreement.reference(*(x.astype(jnp.float32) for x in args), mask=masks.causal())
    with fused.forced(platform="gpu"):
        got = agreement.evaluate(*args, implementation="pallas", mask=masks.causal())
    assert got["out"].dtype == jnp.bfloat16 and got["r"].dtype == jnp.float32
    agreement.assert_agree(got, exact, 2e-2)


def test_rows_and_blocks_without_a_key():
    args = agreement.arrays(jnp.float32, batch=1, queries=100, keys=100, heads=2, kv_heads=2, size=8, value_size=8)
    options = dict(mask=masks.causal() & masks.lengths(query_lengths=30), scores=scores.bias(normal(100, 100)))
    with fused.forced(platform="gpu"):
        got = agreement.evaluate(*args, implementation="pallas", block_sizes=(32, 64), **options)
    agreement.assert_agree(got, agreement.reference(*args, **options), 1e-5)


def test_transformations():
    assert_transforms("gpu", 50)


@pytest.mark.parametrize("by_key", [False, True])
def test_visits_list_whole_tiles_before_partial_ones_and_no_empty_one(by_key):
    rng = np.random.default_rng(0)
    some = rng.random((2, 3, 1, 5, 4)) < 0.5
    every = some & (rng.random(some.shape) < 0.5)
    listed = jax.tree.map(np.asarray, visits(Cover(jnp.asarray(some), jnp.asarray(every)), by_key=by_key))
    some, every = (x[:, :, 0].swapaxes(-1, -2) if by_key else x[:, :, 0] for x in (some, every))
    for place in np.ndindex(some.shape[:-1]):
        order, full, active = listed.order[place], listed.full[place], listed.active[place]
        assert order[:full].tolist() == np.flatnonzero(every[place]).tolist()
        assert order[full:active].tolist() == np.flatnonzero(some[place] & ~every[place]).tolist()


def test_transcendental_functions_come_from_two_units():
    def tile(x, none, masked):
        x = jax.jit(jnp.exp)(x) + jax.grad(lambda x: jnp.exp(jax.nn.relu(x)).sum())(x) * jnp.tanh(x)
        return {"out": jax.nn.sigmoid(x) if masked else x}, none

    quick, x = quickened(tile, interpret=True), jnp.concatenate([normal(4, 4), jnp.full((1, 4), -1e30), jnp.full((1, 4), 80.0)])
    text = str(jax.make_jaxpr(lambda x: quick(x, None, True))(x))
    assert "exp2" in text and not {"exp", "tanh", "logistic"} & set(text.split())
    agreement.assert_agree(quick(x, None, True), tile(x, None, True), 1e-6)


def lower(length=256, size=64, value_size=None, dtype=jnp.bfloat16, **parts):
    """The number of kernels in the gradient of attention with these parts, 4 query heads on 2 key-value heads."""
    shapes = (1, length, 4, size), (1, length, 2, size), (1, length, 2, value_size or size)
    arrays = {name: parts.pop(name) for name in ("scores", "weights") if name in parts}

    def loss(query, key, value, arrays):
        return attnx.attention(query, key, value, implementation="pallas", **arrays, **parts).astype(jnp.float32).sum()

    return kernels(jax.grad(loss, (0, 1, 2, 3), allow_int=True), *(jax.ShapeDtypeStruct(s, dtype) for s in shapes), arrays)


def gap(s, at, row, column):
    return s + row - column


def columns(length):
    return scores.elementwise(gap, attnx.Operand(normal(4, length), ("head", "query")), attnx.Operand(normal(1, length), ("batch", "key")))


LOWERED = {
    "causal, head size 128": (dict(size=128, mask=masks.causal()), 3),
    "head size 96, value size 64, odd length": (dict(length=201, size=96, value_size=64, mask=masks.causal()), 3),
    "head size 256, whole": (dict(size=256), 3),
    "float32": (dict(dtype=jnp.float32, mask=masks.causal()), 3),
    "documents, columns, slopes, offset table": (
        dict(mask=masks.documents(jnp.zeros((1, 256), jnp.int32)), scores=(columns(256), scores.alibi(normal(4)), scores.t5_bias(normal(32, 4)))), 4),
    "softpick, soft cap, dropout, given positions": (
        dict(weights=weights.softpick(), scores=scores.soft_cap(jnp.float32(30)), mask=masks.sliding_window(100), dropout_rate=0.1,
             dropout_key=jax.random.key(0), query_positions=jnp.arange(256), key_positions=jnp.arange(256)), 3),
    "sink, temperature, bias, boolean mask": (
        dict(weights=weights.softmax(sink=normal(4), temperature=jnp.ones(256)), scores=scores.bias(normal(4, 256, 256)),
             mask=masks.explicit(jnp.ones((256, 256), bool))), 4),
    "entmax": (dict(weights=weights.entmax15(), mask=masks.causal()), 7),
}


@pytest.mark.parametrize("case", LOWERED)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_lowers_for_an_h200(case):
    parts, kernels = LOWERED[case]
    assert lower(**parts) == kernels


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_neighbourhoods_with_biases_lower():
    def loss(query, key, value, bias):
        return masks.neighborhood_attention(query, key, value, 7, bias=bias).astype(jnp.float32).sum()

    arrays = [jax.ShapeDtypeStruct((1, 14, 20, 2, 32), jnp.bfloat16)] * 3
    assert kernels(jax.grad(loss, (0, 1, 2, 3)), *arrays, jax.ShapeDtypeStruct((2, 13, 13), jnp.float32)) == 3


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_transformations_lower():
    """As above, with what varies over devices checked."""
    def one(x):
        return attnx.attention(x[None], x[None], x[None], mask=masks.causal(), implementation="pallas")[0]

    def loss(x):
        spec = jax.sharding.PartitionSpec("data")
        return jax.shard_map(jax.vmap(jax.checkpoint(one)), in_specs=spec, out_specs=spec)(x).astype(jnp.float32).sum()

    assert kernels(jax.grad(loss), jax.ShapeDtypeStruct((4, 128, 2, 64), jnp.bfloat16), axes=("data",)) == 3


def test_tiles_are_powers_of_two_that_products_can_be_made_of():
    for _, tiles in TABLE["flash, gpu"]:
        for tile in tiles:
            assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.bq, tile.bk))


@part
class Dot(Similarity):
    def pair(self, q, k, at):
        return q @ k.T


def test_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match="axes of their own"):
        lower(scores=features(256))
    with pytest.raises(NotImplementedError, match="not in float64"), jax.enable_x64(True):
        lower(dtype=jnp.float64)
    with pytest.raises(NotImplementedError, match="got head size 24"):
        lower(size=24, scores=Dot())
    with pytest.raises(NotImplementedError, match="heads of size 1"):
        lower(size=1, value_size=16)
    x = jnp.ones((1, 4, 1, 8))
    with fused.forced(platform="gpu"), pytest.raises(NotImplementedError, match="at least 16"):
        attnx.attention(x, x, x, implementation="pallas", block_sizes=(8, 16))
    with pytest.raises(ValueError, match="platform"), fused.forced(platform="rocm"):
        pass
