"""Lowering for a GPU where there is none."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from attnx.core import fused


def lowered(function, *args, axes=()):
    """``function`` lowered for an H200, or for two along each of the mesh ``axes``."""
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((2,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes), abstract_device=device)
    with fused.forced(interpret=False, platform="gpu"), jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


def kernels(function, *args, axes=()):
    """How many kernels of Pallas it becomes."""
    return lowered(function, *args, axes=axes).as_text().count("__gpu$xla.gpu.triton")
