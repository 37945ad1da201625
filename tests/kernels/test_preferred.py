"""What ``implementation=None`` picks: kernels where they serve the call on the platform at hand, and nothing that raises elsewhere."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

import attnx
from attnx import masks, scores
from attnx.core import cudnn, fused, linear_fused
from attnx.core.linear import linear_attention
from attnx.core.selected import selected_attention
from pallas_kernels import native, tiles

INDICES = jnp.zeros((1, 1, 2, 1), jnp.int32)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


QUERY, KEY = array(2, 16, 4, 8), array(2, 16, 2, 8)
ONES = array(2, 16, 2, 1)  # values that are no matrix to the kernels


def pairs(query, key, value, **options):
    return attnx.attention(query, key, value, mask=masks.causal(), **options)


def selected(query, key, value, **options):
    return selected_attention(query, key, value, INDICES, block_sizes=(8, 8), **options)


def linear(query, key, value, **options):
    return linear_attention(query, key, value, **options)


def linear_not_causal(query, key, value, **options):
    return linear_attention(query, key, value, is_causal=False, **options)


def decode(query, key, value, **options):
    return attnx.decode(query[:, :1], key, value, 16, **options)


CALLS = {"pairs": (pairs, KEY, ONES), "selected": (selected, KEY, ONES), "decode": (decode, KEY, ONES), "linear": (linear, KEY, None)}


def kernels(function, *args, **options):
    """Whether tracing a call meets a kernel."""
    return "pallas_call" in str(jax.make_jaxpr(lambda *args: function(*args, **options))(*args))


@pytest.mark.parametrize("engine", CALLS)
def test_none_picks_kernels_that_serve(engine):
    function, value, lacking = CALLS[engine]
    assert not kernels(function, QUERY, KEY, value)
    with fused.forced():
        assert kernels(function, QUERY, KEY, value)
        assert not kernels(function, QUERY, KEY, value, implementation="chunked" if engine == "linear" else "reference")
        function, value = (linear_not_causal, value) if lacking is None else (function, lacking)
        assert not kernels(function, QUERY, KEY, value)
        with pytest.raises(NotImplementedError, match="implementation='pallas'"):
            kernels(function, QUERY, KEY, value, implementation="pallas")


def test_one_token_of_a_recurrence_takes_the_step():
    with fused.forced():
        assert not kernels(linear, array(2, 1, 4, 8), array(2, 1, 2, 8), array(2, 1, 2, 8))


def test_more_tiles_than_a_schedule_holds():
    x = array(1, 2**19, 1, 8)
    with fused.forced():
        assert not kernels(pairs, x, x, x)
        with pytest.raises(NotImplementedError, match="tiles exceed"):
            kernels(pairs, x, x, x, implementation="pallas")


def test_a_mesh_comes_first():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with fused.forced(), jax.set_mesh(mesh):
        assert not kernels(pairs, QUERY, KEY, KEY)
        assert kernels(pairs, QUERY, KEY, KEY, implementation="pallas")


def test_gpu(monkeypatch):
    """cuDNN first, for what it is known to serve; then the kernels."""
    with fused.forced(platform="gpu"):
        assert kernels(pairs, QUERY, KEY, KEY)

    class Device:
        device_kind, platform = "NVIDIA H200", "gpu"

    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(cudnn, "attention", lambda query, *_, **kwargs: asked.append(kwargs) or query)
    half = array(2, 16, 4, 8, dtype=jnp.bfloat16)
    attend = lambda q, **options: attnx.attention(q, q, q, **options)
    for options in ({}, dict(mask=masks.causal()), dict(mask=masks.local(3, 2))):
        jax.eval_shape(lambda q, options=options: attend(q, **options), half)
    assert len(asked) == 3 and {kwargs["return_residual"] for kwargs in asked} == {False}
    with fused.forced(platform="gpu"):
        for x, options in ((QUERY, {}), (half, dict(scores=scores.alibi(4))), (half, dict(return_residual=True)), (half, dict(query_positions=jnp.arange(16)))):
            assert kernels(attend, x, **options)
    assert len(asked) == 3


def test_the_language_of_the_recurrent_engine(monkeypatch):
    """Pallas, unless Triton is named, or installed and in the table for the device."""
    x = array(2, 16, 4, 8)
    chosen = lambda implementation=None: linear_fused.choose_kernel(implementation, x, x, None, 8, True, None)[0]
    for context, backend in ((fused.forced(platform="gpu"), "'gpu' emulated"), (fused.forced(interpret=False), "'tpu'"), (contextlib.nullcontext(), "'cpu'")):
        with context, pytest.raises(NotImplementedError, match=f"implementation='triton'.* are for a GPU, the backend is {backend}; use 'pallas'"):
            jax.eval_shape(lambda q: linear(q, q, q, implementation="triton"), x)
    with fused.forced(interpret=False, platform="gpu"):
        monkeypatch.setattr(native, "_missing", lambda: ["jax-triton"])
        with pytest.raises(NotImplementedError, match=r"needs jax-triton; pip install attnx\[cuda\]"):
            chosen("triton")
        monkeypatch.setitem(tiles.TABLE, "linear language, gpu", ((("", 64, 4), tiles.Languages("triton", "pallas", "pallas")), *tiles.TABLE["linear language, gpu"]))
        assert chosen() == "pallas"
        monkeypatch.setattr(native, "_missing", lambda: [])
        assert chosen() == chosen("triton") == "triton" and chosen("pallas") == "pallas"
        assert linear_fused.choose_kernel(None, x, x, array(2, 16, 4), 8, True, None)[0] == "pallas"
        with pytest.raises(NotImplementedError, match="not in float16"):
            linear_fused.choose_kernel("triton", array(2, 16, 4, 8, dtype=jnp.float16), x, None, 8, True, None)
