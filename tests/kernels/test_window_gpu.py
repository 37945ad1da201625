"""The window kernels of a GPU: interpreted against the definition, and lowered for an H200 where there is none."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_lowering import kernels
from window_cases import PARTS, SIZES, case, run

import attnx
from attnx.core import fused
from attnx.core.windows import window_attention
from pallas_kernels.tiles import TABLE
from pallas_kernels.window import gpu


@pytest.fixture
def few_programs(monkeypatch):
    """Gradients in groups of four windows, the last of them smaller."""
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    monkeypatch.setitem(TABLE, "window, gpu", tuple((fits, sizes._replace(windows=4)) for fits, sizes in TABLE["window, gpu"]))


@pytest.mark.parametrize("length, size, bias", SIZES["gpu"])
def test_agrees_with_the_definition(length, size, bias, x64):
    arguments = case(length, size, bias=bias, windows=2)
    with fused.forced(platform="gpu"):
        got = run("pallas", *arguments)
    agreement.assert_agree(got, run("reference", *arguments), 1e-11)


@pytest.mark.parametrize("name", ["shifted", "mask", "offsets, elementwise weights", "soft cap, a bias a window"])
def test_parts(name, x64, few_programs):
    arguments, parts = case(9, 24, value_size=40), PARTS[name](3, 9)
    with fused.forced(platform="gpu"):
        got = run("pallas", *arguments, parts)
    agreement.assert_agree(got, run("reference", *arguments, parts), 1e-11)


def test_bfloat16():
    arguments = case(49, 32, windows=2, dtype=jnp.bfloat16)
    exact = run("reference", *(x.astype(jnp.float32) for x in arguments))
    with fused.forced(platform="gpu"):
        got = run("pallas", *arguments)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.bfloat16] * 4 + [jnp.float32]
    agreement.assert_agree(got, exact, 2e-2)


def test_steps_along_the_features_change_nothing():
    """16 features at a time, or all."""
    arguments = case(49, 64, windows=2, dtype=jnp.float32)
    with fused.forced(platform="gpu"):
        agreement.assert_agree(*(run("pallas", *arguments, chunk_size=chunk) for chunk in (16, 64)), 1e-6)


def lower(length, size, dtype=jnp.bfloat16, **parts):
    """The number of kernels in the gradient."""
    x, bias = jax.ShapeDtypeStruct((64, length, 3, size), dtype), jax.ShapeDtypeStruct((3, length, length), jnp.float32)

    def loss(query, key, value, bias):
        return (window_attention(query, key, value, bias=bias, implementation="pallas", **parts).astype(jnp.float32) ** 2).sum()

    return kernels(jax.grad(loss, (0, 1, 2, 3)), x, x, x, bias)


@pytest.mark.parametrize("length, size, dtype, parts", [
    (49, 32, jnp.bfloat16, {"regions": np.zeros((4, 49), np.int32)}),
    (64, 24, jnp.float32, {"mask": np.ones((4, 64, 64), bool), "weights": attnx.weights.softpick()}),
    (81, 64, jnp.float16, {"mask": attnx.masks.causal(), "scores": attnx.scores.soft_cap(30.0)}),
])
def test_lowers(length, size, dtype, parts):
    assert lower(length, size, dtype, **parts) == 2


def test_says_what_it_lacks():
    x = jnp.ones((2, 129, 2, 8))
    with fused.forced(platform="gpu"), pytest.raises(NotImplementedError, match="128 tokens at the most, got 129"):
        window_attention(x, x, x, implementation="pallas")
