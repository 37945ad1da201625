"""The real TPU compiler, where there is no TPU, in a process of its own: it wants its environment set before it is loaded."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental import topologies

from attnx.core import operations
from experiments.tpu import ENVIRONMENT, TOPOLOGIES

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (pip install libtpu) is not installed")


@functools.cache
def report(script: str):
    """What a script beside this file prints as JSON in its last line."""
    environment = {**os.environ, **ENVIRONMENT, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, pathlib.Path(__file__).with_name(script)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# In the scripts


def compile_for(chip: str, function, *arguments):
    """``function`` compiled for a chip, at the shapes of the arguments."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with jax.default_device(device):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def compile_gradient(chip: str, function, *arguments):
    """``function`` and its gradient by all arguments, compiled."""
    def both(arguments, cotangents):
        result, pull = jax.vjp(function, *arguments)
        return result, pull(cotangents)

    return compile_for(chip, both, arguments, jax.eval_shape(function, *arguments))


def compile_call(executor, data, chip="v5e"):
    """A call of the pairs engine and its gradient on a chip, in the layout of the kernels."""
    return compile_gradient(chip, functools.partial(operations.output, executor), data)


def errors(cases: dict) -> dict:
    """What became of each of the calls: None, or the error."""
    found = {}
    for name, call in cases.items():
        try:
            call()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:2000]
    return found
