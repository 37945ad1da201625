"""Kernels written in Triton itself, called through jax-triton; nothing else in the library needs either package.

A call becomes a custom call with PTX that Triton has compiled for the GPU at hand, or for sm_90 where a function is lowered for one without it.
"""

import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from pallas_kernels.compat import varying_axes

HOPPER = 90


def installed() -> bool:
    """Whether Triton and jax-triton are."""
    return not _missing()


def _missing():
    return [name for name, module in (("triton", "triton"), ("jax-triton", "jax_triton")) if importlib.util.find_spec(module) is None]


def check_installed():
    """Raises NotImplementedError where they are not."""
    missing = _missing()
    if missing:
        raise NotImplementedError(f"implementation='triton': needs {' and '.join(missing)}; pip install attnx[cuda]")


def call(kernel: Callable, inputs: Sequence, outputs: Sequence, *, grid: tuple[int, ...], name: str, warps: int, stages: int, scalars: Sequence[int] = (), **constants):
    """``kernel(*inputs, *scalars, *outputs, **constants)`` for every program of ``grid``.

    Args:
      inputs: arrays, or None for one that is not read.
      outputs: shapes (``jax.ShapeDtypeStruct``), or None for one that is not written; None is returned for it.
      scalars: integers that the kernel is not compiled anew for.
    """
    import jax_triton

    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    given = next(x for x in inputs if x is not None)
    results = jax_triton.triton_call(
        *(given if x is None else x for x in inputs), *scalars, kernel=kernel, name=name, out_shape=[nothing if x is None else x for x in outputs],
        grid=grid, num_warps=warps, num_stages=stages, compute_capability=None if jax.default_backend() == "gpu" else HOPPER, **constants)
    varying = tuple(sorted(varying_axes(inputs)))
    results = [lax.pcast(x, varying, to="varying") if varying else x for x in results]
    return [None if shape is None else x for shape, x in zip(outputs, results)]


def by_batch(function: Callable) -> Callable:
    """``function`` of arrays [B, ...], whose results all have that axis, under ``jax.vmap`` too: mapped axes are more of a batch."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, *arrays):
        def widen(x, has):
            x = x if has else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = by_batch(function)(*jax.tree.map(widen, arrays, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results), jax.tree.map(lambda _: True, results)

    return mapped


def precision(dtype) -> str:
    """How matrix products of float32 are made, as in Pallas: of operands of three decimal digits, unless ``jax.default_matmul_precision`` says exactly."""
    wanted = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return "ieee" if wanted in ("highest", "float32") and dtype == jnp.float32 else "tf32"
