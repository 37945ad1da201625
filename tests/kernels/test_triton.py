"""Kernels in Triton itself: their source interpreted against the definition, and compiled to machine code for an H200 where there is none."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from attnx import masks
from attnx.core import fused
from attnx.core.linear import linear_attention
from attnx.products import sage_attention

HERE = pathlib.Path(__file__).parent
NEEDED = "triton", "jax_triton", "jax_cuda12_plugin"
SHARED = 227 * 1024  # bytes of shared memory that a program can have

if any(importlib.util.find_spec(name) is None for name in NEEDED):
    pytest.skip(f"needs {', '.join(NEEDED)}", allow_module_level=True)

from triton_compiled import programs  # noqa: E402

from pallas_kernels.linear import gpu  # noqa: E402
from pallas_kernels.quantised.triton_launch import Codes, attend  # noqa: E402


def interpreted(script):
    """What a script prints, in a process whose kernels are interpreted."""
    paths = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    run = subprocess.run([sys.executable, HERE / script], env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_recurrent_engine_agrees_with_the_definition():
    found = interpreted("interpret_linear.py")
    assert len(found) == 6 and max(case["slabs"] for case in found.values()) > 1
    for name, case in found.items():
        assert max(case["errors"]) < {"float32": 1e-6, "float16": 1e-3}[case["dtype"]], name


def test_quantised_attention_agrees_with_the_definition():
    found = interpreted("interpret_quantised.py")
    assert len(found["kernel"]) == 5
    for name, case in found["kernel"].items():
        assert case["error"] < (1e-4 if "float16" in name else 1e-6) and case["residual"] < 2e-6 and case["nothing"], name
    for values, (out, residual) in found["sage"].items():  # there e4m3 weights have a scale for each row, not one of all
        assert out < {"float16": 5e-4, "int8": 2e-5, "float8": 2**-4}[values] and residual < 2e-5, values


def shapes(decay=None, length=16384, heads=4, key_heads=4, size=128, dtype=jnp.bfloat16):
    """Arguments of the recurrent engine: query, key, value, and log-decays of the key's heads."""
    shape = jax.ShapeDtypeStruct
    arrays = [shape((1, length, n, size), dtype) for n in (heads, key_heads, key_heads)]
    return arrays + ([] if decay is None else [shape((1, length, key_heads, *(size,) * (decay == "channel")), jnp.float32)])


def recurrence(query, key, value, log_decay=None, **options):
    return linear_attention(query, key, value, log_decay=log_decay, implementation="triton", **options)


COMPILED = {  # options of shapes, bytes that may spill, options of the call
    "no decay": (dict(), 0, {}),
    "no decay, normalised, queries on one state": (dict(heads=16), 0, dict(normalize=True)),
    "per head": (dict(decay="head"), 128, {}),
    "per head, head size 64": (dict(decay="head", size=64), 0, {}),
    "per channel": (dict(decay="channel"), 128, {}),
    "per channel, head size 96": (dict(decay="channel", size=96), 128, {}),
    "per head, float32": (dict(decay="head", dtype=jnp.float32), 128, {}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_the_recurrent_engine_compiles_for_an_h200(name):
    sizes, spills, options = COMPILED[name]
    states, forward = programs(functools.partial(recurrence, **options), *shapes(**sizes))
    assert states.spills <= spills and forward.spills <= spills and max(states.shared, forward.shared) <= SHARED
    assert forward.count(r"wgmma\.mma_async|mma\.sync") > states.count(r"wgmma\.mma_async|mma\.sync") > 0
    if sizes.get("decay") != "channel" and "dtype" not in sizes:  # as large, and in as few bits, as a warp group multiplies
        assert forward.count(r"mma\.sync") == 0
    assert len(forward.code) > len(states.code) > 0


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_gradients_are_those_of_pallas():
    def loss(*arrays):
        return (recurrence(*arrays).astype(jnp.float32) ** 2).sum()

    arrays = shapes("head", length=2048, size=64)
    gradient = jax.grad(loss, (0, 1, 2, 3))
    assert len(programs(gradient, *arrays)) == 2
    with fused.forced(interpret=False, platform="gpu"):
        assert str(jax.make_jaxpr(gradient)(*arrays)).count("pallas_call[") == 3  # the kept states, the changes of states, the gradients


def test_transformations_compile(monkeypatch):
    """shard_map, with what varies over devices checked, vmap of some arguments, remat and scan: one kernel, of as many programs."""
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    spec = jax.sharding.PartitionSpec("data")

    def one(x, decay):
        return recurrence(x[None], x[None], x[None], decay)[0]

    def many(x, decay):
        mapped = jax.vmap(jax.vmap(jax.checkpoint(one), (0, None)), (0, None))
        return jax.lax.scan(lambda carry, _: (mapped(carry, decay), None), x, None, length=2)[0]

    call = jax.shard_map(many, in_specs=(spec, None), out_specs=spec)
    assert len(programs(call, jax.ShapeDtypeStruct((4, 3, 64, 1, 32), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.float32), axes=("data",))) == 1


def coded(values, size, shares, heads=4, key_heads=2, length=1000):
    shape = jax.ShapeDtypeStruct
    arrays = [shape((1, length, heads, size), jnp.int8), shape((1, -(-length // shares[0]), heads, 1), jnp.float32)]
    arrays += [shape((1, length, key_heads, size), jnp.int8), shape((1, -(-length // shares[1]), key_heads, 1), jnp.float32)]
    arrays.append(shape((1, length, key_heads, size), values))
    return arrays + ([shape((1, -(-length // 64), key_heads, size), jnp.float32)] if jnp.dtype(values).itemsize == 1 else [])


QUANTISED = {  # dtype and head size of the values, tokens that share a scale, products with the values, bytes that may spill
    "bfloat16": (jnp.bfloat16, 128, (128, 64), "bf16.bf16", 0),
    "float16, scales of tokens": (jnp.float16, 64, (1, 1), "f16.f16", 0),
    "int8": (jnp.int8, 64, (128, 64), "s8.s8", 0),
    "e4m3": (jnp.float8_e4m3fn, 128, (128, 64), "e4m3.e4m3", 256),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_attention_compiles_for_an_h200(name):
    dtype, size, shares, product, spills = QUANTISED[name]

    def call(query, query_scales, key, key_scales, value, value_scales=None):
        value = value if value_scales is None else Codes(value, value_scales, 64)
        return attend(Codes(query, query_scales, shares[0]), Codes(key, key_scales, shares[1]), value, scale=size**-0.5, dtype=jnp.bfloat16, is_causal=True,
                      lengths=jnp.array([900]), return_residual=True)

    (program,) = programs(call, *coded(dtype, size, shares))
    assert program.spills <= spills and program.shared <= SHARED and program.count(r"mma\.sync") == 0
    scores, values, both = (program.count(rf"wgmma\.mma_async.*{kind}") for kind in (r"s32\.s8\.s8", product, ""))
    assert scores > 0 and values > 0 and both == (scores if product == "s8.s8" else scores + values)


def test_sage_attention_compiles_with_its_gradient():
    x, y = (jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def loss(query, key, value, values):
        return sage_attention(query, key, value, is_causal=True, values=values, implementation="triton").astype(jnp.float32).sum()

    for values in (None, "int8"):
        assert len(programs(jax.value_and_grad(functools.partial(loss, values=values), (0, 1, 2)), x, y, y)) == 1


def test_says_what_it_lacks():
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match="quantised attention in Triton itself are for a GPU, the backend is 'cpu'"):
        sage_attention(x, x, x, implementation="triton")
    with fused.forced(interpret=False, platform="gpu"):
        for options, message in ((dict(mask=masks.sliding_window(2)), "is_causal and no other masks"), (dict(values="float16 sums"), "values='float16 sums'"),
                                 (dict(scores=None), "scores=None"), (dict(block_sizes=(64, 64), values="float16"), "a multiple of 128 tokens of the query, got 64"),
                                 (dict(), "values in float16 and bfloat16, .* got float32")):
            with pytest.raises(NotImplementedError, match=message):
                sage_attention(x, x, x, implementation="triton", **options)
