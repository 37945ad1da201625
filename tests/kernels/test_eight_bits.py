"""Rounded products as a part: in every execution and kernel, with other parts, and compiled for accelerators that need not be there."""

import dataclasses

import agreement
import jax
import jax.numpy as jnp
import pytest
from gpu_lowering import kernels
from tpu_compiler import needs_compiler, report

import attnx
from attnx import masks, products, scores, weights
from attnx.core import fused
from pallas_kernels.products import Rounded, multiply

SIZES = dict(queries=200, keys=300, size=16, value_size=24)


@dataclasses.dataclass(frozen=True)
class Sixteenths(Rounded):
    """Every operand of all six products to a multiple of 1/16: what a fold rounds is what the definition rounds, whatever the tile."""

    def product(self, name, a, b, contract, *, transposed=False):
        if name == "values":  # of weights that a running maximum scales
            return multiply(a, b, contract)
        return multiply(*(jnp.round(16 * x) / 16 for x in (a, b)), contract)


def parts():
    ids = [jnp.sort(jax.random.randint(jax.random.key(n), (2, length), 0, 3)) for n, length in ((1, 200), (2, 300))]
    return dict(mask=masks.documents(*ids), scores=scores.soft_cap(5.0))


def test_six_products(x64):
    """Folds and kernels of both platforms, untransposed tiles and transposed ones, round each product by its name; groups of queries share keys."""
    args = agreement.arrays(**SIZES)
    rounded = dict(parts(), products=Sixteenths())
    expected = agreement.evaluate(*args, implementation="blockwise", block_sizes=(128, 128), **rounded)
    exact = agreement.evaluate(*args, implementation="blockwise", block_sizes=(128, 128), **parts())
    for a, b in zip(expected["gradients"], exact["gradients"]):
        assert jnp.abs(a - b).max() > 1e-3
    for platform in ("tpu", "gpu"):
        agreement.evaluate.clear_cache()
        with fused.forced(platform=platform):
            agreement.assert_agree(agreement.evaluate(*args, implementation="pallas", **rounded), expected, 1e-9)
    agreement.evaluate.clear_cache()


@pytest.mark.parametrize("chosen", [products.int8(), products.float8("token", "float8"), products.int8(None, "int8")], ids=["int8", "float8", "int8 values"])
def test_tiles_do_not_matter(x64, chosen):
    """Scales are those of stated blocks: larger tiles hold several, and the definition all."""
    args = agreement.arrays(**SIZES)
    given = dict(mask=masks.causal(), products=chosen)
    expected = agreement.evaluate(*args, implementation="blockwise", block_sizes=(128, 512), **given)
    others = [agreement.reference(*args, **given)]
    if chosen != products.int8(None, "int8"):  # weights relative to the largest score so far
        others.append(agreement.evaluate(*args, implementation="blockwise", block_sizes=(256, 64), **given))
    for other in others:
        agreement.assert_agree({name: other[name] for name in ("out", "r")}, {name: expected[name] for name in ("out", "r")})
        for a, b in zip(other["gradients"], expected["gradients"]):
            assert jnp.linalg.norm(a - b) <= 1e-9 + 0.02 * jnp.linalg.norm(b)  # by definition weights are rounded relative to each row's largest, backward too


def test_refusals():
    x = jnp.ones((1, 300, 2, 16))
    for match, error, call in (
        ("products: expected products", TypeError, lambda: attnx.attention(x, x, x, products="int8")),
        (r"block_sizes: expected multiples of the blocks \(128, 64\)", ValueError,
         lambda: attnx.attention(x, x, x, products=products.int8(), block_sizes=(64, 64), implementation="blockwise")),
        ("implementation='cudnn' lacks Quantised", NotImplementedError, lambda: attnx.attention(x, x, x, products=products.int8(), implementation="cudnn")),
        ("products: int8 weights at a fixed scale are at most 1.*got weights=Relu", NotImplementedError,
         lambda: attnx.attention(x, x, x, weights=weights.relu(), products=products.int8(None, "int8"))),
        ("dropout_rate=0.5", NotImplementedError,
         lambda: attnx.attention(x, x, x, dropout_rate=0.5, dropout_key=jax.random.key(0), products=products.int8(None, "int8"))),
        ("dtype: expected one of", ValueError, lambda: products.float8(dtype="float8")),
    ):
        with pytest.raises(error, match=match):
            call()


def test_mechanism():
    """A mechanism reads token by token with the same products, by a cache."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 9, 2, 16))
    mechanism = attnx.pairs(mask=masks.causal(), products=products.int8("token"))
    whole, state, out = mechanism(q, k, v), mechanism.init(1, 9, 2, 16, 16, jnp.float32), []
    for t in range(9):
        state, y = mechanism.step(state, q[:, t:t + 1], k[:, t:t + 1], v[:, t:t + 1])
        out.append(y)
    agreement.assert_agree(jnp.concatenate(out, 1), whole, 1e-6)
    assert jnp.abs(whole - attnx.pairs(mask=masks.causal())(q, k, v)).max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"scores": "token", "values": "int8"}, {"values": "float16 sums"}], ids=str)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_lowers_for_an_h200(options):
    q, k = jnp.zeros((1, 512, 2, 80), jnp.bfloat16), jnp.zeros((1, 512, 1, 80), jnp.bfloat16)
    assert kernels(lambda *args: products.sage_attention(*args, is_causal=True, implementation="pallas", **options), q, k, k) == 1


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_gradients_lower_for_an_h200():
    x = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    loss = lambda *args: attnx.attention(*args, mask=masks.causal(), products=products.int8("block", "int8"), implementation="pallas").astype(jnp.float32).sum()
    assert kernels(jax.grad(loss, argnums=(0, 1, 2)), x, x, x) == 3


@needs_compiler
def test_compiles_for_tpus():
    """Of three generations; float16 is refused, by name."""
    found = report("compile_eight_bits_for_tpu.py")
    assert {name: error for name, error in found["errors"].items() if error} == {}
    assert "NotImplementedError: implementation='pallas': a TPU lacks float16" in found["float16"]
