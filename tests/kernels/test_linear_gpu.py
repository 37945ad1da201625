"""The recurrent engine's GPU kernels: interpreted against the definition, and lowered for an H200 where there is none."""

import functools

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import kernels
from linear_cases import case, run

from attnx.core import fused
from attnx.core.linear import LinearState, linear_attention
from pallas_kernels import linear_tile
from pallas_kernels.linear import gpu, gpu_tile

LENGTH = 70


@pytest.fixture(autouse=True)
def short_slabs(monkeypatch):
    """Few chunks a slab, so that states pass between slabs of short sequences."""
    monkeypatch.setattr(gpu, "SHORTEST", 2)
    monkeypatch.setattr(gpu, "PROGRAMS", 20)


@pytest.mark.parametrize("name", ["constant", "per head, shared state, documents", "per channel, documents"])
def test_agrees_with_the_definition(name, x64):
    arguments = case(name, length=LENGTH)
    with fused.forced(platform="gpu"):
        got = run("pallas", *arguments)
    agreement.assert_agree(got, run("parallel", *arguments), 1e-11)


@pytest.mark.parametrize("name, size", [("per channel, shared state", 96), ("no decay, normalised", 256)])
def test_bfloat16(name, size):
    arrays, cotangents, segments, options = case(name, jnp.bfloat16, length=65, size=size, value_size=128)
    arrays = tuple(x if x is None or isinstance(x, LinearState) else x / size**0.25 for x in arrays[:2]) + arrays[2:]
    exact = run("recurrent", *jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents)), segments, options)
    with fused.forced(platform="gpu"):
        got = run("pallas", arrays, cotangents, segments, options)
    assert [x.dtype for x in jax.tree.leaves(got[1])] == [x.dtype for x in jax.tree.leaves(arrays)]
    assert got[0][0].dtype == jnp.bfloat16 and got[0][1].memory.dtype == jnp.float32
    agreement.assert_agree(got, exact, 2e-2)


@pytest.mark.parametrize("channels", [1, 5])
def test_every_strength_of_decay_to_rounding(channels):
    """As :mod:`pallas_kernels.linear_tile` has it, in float32."""
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.normal(size=(32, 5)), jnp.float32) for _ in range(2))
    decay = random.choice(np.array([0, -1e-6, np.log(0.9), np.log(1e-4), -80, -1e4, -1e30, -np.inf], np.float32), (32, channels))
    expected = jax.jit(linear_tile.weigh)(*(x[None] for x in (query, key, decay if channels > 1 else decay.T)))
    given = jnp.maximum(decay if channels > 1 else decay.T, gpu_tile.LOWEST)
    found = jax.jit(functools.partial(gpu_tile.scores, narrow=None))(query, key, given)
    np.testing.assert_allclose(found, expected.scores[0], atol=2e-6)
    for x, reach, like in ((query, gpu_tile.since, expected.query), (key, gpu_tile.until, expected.key)):
        np.testing.assert_allclose(gpu_tile.decayed(x, reach(32), given), like[0], atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (1, 0, 2, 4), (1, 1, 1, 1)])
def test_small_and_empty(shape):
    x = jnp.ones(shape)
    call = functools.partial(linear_attention, x, x, x, normalize=True, return_state=True, feature_map=jnp.exp)
    with fused.forced(platform="gpu"):
        got = call(implementation="pallas")
    agreement.assert_agree(got, call(implementation="chunked"), 1e-6)


def lower(decay=None, length=256, size=64, value_size=64, dtype=jnp.bfloat16, axes=(), **options):
    """The number of kernels in the gradient, 4 query heads on 2 key heads."""
    shapes = (1, length, 4, size), (1, length, 2, size), (1, length, 2, value_size)

    def loss(query, key, value, log_decay):
        return (linear_attention(query, key, value, log_decay=log_decay, implementation="pallas", **options).astype(jnp.float32) ** 2).sum()

    decay = None if decay is None else jax.ShapeDtypeStruct(decay, jnp.float32)
    return kernels(jax.grad(loss, (0, 1, 2, 3)[: 3 + (decay is not None)]), *(jax.ShapeDtypeStruct(s, dtype) for s in shapes), decay)


LOWERED = {  # forward, kept states, backward; and one sweep each where the sequence is cut
    "no decay, normalised": (dict(normalize=True, size=128, value_size=128), 3 + 2),
    "per head": (dict(decay=(1, 256, 4), length=256), 5),
    "per channel, head size 96, one slab": (dict(decay=(1, 17, 2, 96), length=17, size=96), 3),
    "float32, head size 256": (dict(dtype=jnp.float32, size=256, length=64, decay=(4,)), 5),
}


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_lowers_for_an_h200(name):
    options, count = LOWERED[name]
    assert lower(**options) == count


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_transformations_lower():
    """shard_map, with what varies over devices checked, vmap and remat."""
    spec = jax.sharding.PartitionSpec("data")

    def one(x, decay):
        return linear_attention(x[None], x[None], x[None], log_decay=decay, implementation="pallas")[0]

    def loss(x, decay):
        many = jax.vmap(jax.checkpoint(one), (0, None))
        return (jax.shard_map(many, in_specs=(spec, None), out_specs=spec)(x, decay).astype(jnp.float32) ** 2).sum()

    shapes = jax.ShapeDtypeStruct((4, 128, 1, 32), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.float32)
    assert kernels(jax.grad(loss, argnums=(0, 1)), *shapes, axes=("data",)) >= 5


def test_says_what_it_lacks():
    x = jnp.ones((1, 4, 1, 8))
    with fused.forced(platform="gpu"):
        with pytest.raises(NotImplementedError, match="'chunked' serves"):
            linear_attention(x, x, x, is_causal=False, implementation="pallas")
        with pytest.raises(NotImplementedError, match="at least 16, got 8"):
            linear_attention(x, x, x, chunk_size=8, implementation="pallas")
        with pytest.raises(NotImplementedError, match="size 512 at the most.*got 600"):
            linear_attention(*[jnp.ones((1, 4, 1, 600))] * 3, implementation="pallas")
    with fused.forced(interpret=False, platform="gpu"), pytest.raises(NotImplementedError, match="not in float16"):
        linear_attention(*[x.astype(jnp.float16)] * 3, implementation="pallas")
    with fused.forced(interpret=False, platform="gpu"), pytest.raises(NotImplementedError, match="first derivatives only; use 'chunked'"):
        loss = lambda x: jnp.sum(linear_attention(x, x, x, implementation="pallas") ** 2)
        jax.eval_shape(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x))), x)
