"""One program on one device, one host or a pod: a mesh, and rules that say which axis of it each logical axis is cut over.

Parameters name their axes ('embed', 'heads', 'mlp', ...), as do activations ('batch', 'sequence', ...); see :mod:`attnx.nn`. With
``sequence`` above 1 a mechanism has to be one that can exchange what it needs between devices, such as ring attention.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "sequence", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("sequence", "sequence"),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_size", None),
    ("layers", None),
)
"""(logical axis, axes of the mesh): batches are cut over data and fsdp, parameters over fsdp and tensor."""


def make_mesh(data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the axes (data, fsdp, sequence, tensor).

    Args:
      data: replicas of the model that share each batch.
      fsdp: devices over which batches and parameters are cut.
      sequence: devices over which sequences are cut.
      tensor: devices over which heads and hidden sizes are cut.
      devices: to use; by default all.

    Raises:
      ValueError: where the product of the sizes is not the number of devices.

    Example:
      >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, sequence, tensor)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise ValueError(f"mesh: expected sizes whose product is the number of devices, {len(devices)}, got "
                         + ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes)))
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


@contextlib.contextmanager
def use(mesh: Mesh, rules=RULES) -> Iterator[None]:
    """Within it, activations are constrained to ``mesh`` by ``rules``: build, lower and call sharded functions here."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        yield


def shardings(mesh: Mesh, tree, rules=RULES) -> Any:
    """How to shard a tree of variables that name their axes, such as a :class:`TrainState`; what names none is replicated.

    An axis that the mesh does not divide stays whole.

    Args:
      mesh: from :func:`make_mesh`.
      tree: arrays or ``jax.ShapeDtypeStruct``, in nnx variables where they are named.
      rules: as :data:`RULES`.

    Returns:
      The tree, with a ``NamedSharding`` for each array.
    """
    axes = dict(rules)

    def variable(x):
        names = x.get_metadata().get("out_sharding") if isinstance(x, nnx.Variable) else None
        return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(mesh, axes, names or (), leaf.shape)), x)

    return jax.tree.map(variable, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _spec(mesh, axes, names, shape):
    spec = []
    for name, size in zip(names, shape):
        axis = axes.get(name)
        parts = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
        spec.append(axis if size % parts == 0 else None)
    return PartitionSpec(*spec)


class Placement:
    """How batches [B, ...] lie on a mesh: cut over their first axis.

    Args:
      mesh: from :func:`make_mesh`.
      batch_size: B, of all processes together.
      rules: as :data:`RULES`.

    Attributes:
      sharding: of each array of a batch.
      process_index, process_count: which share of each batch this process has to read (see :func:`attnx.training.batches`). Processes that
        differ only in what part of a sequence or of the parameters they hold read the same.

    Raises:
      ValueError: for a batch that the mesh does not divide.
    """

    def __init__(self, mesh: Mesh, batch_size: int, rules=RULES):
        axes = dict(rules)["batch"]
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if batch_size % parts:
            raise ValueError(f"batch_size: expected a multiple of {parts} = {' x '.join(axes)} of the mesh, got {batch_size}")
        self.batch_size, self.sharding = batch_size, NamedSharding(mesh, PartitionSpec(axes))
        rows = [index[0].indices(batch_size) for index in self.sharding.addressable_devices_indices_map((batch_size,)).values()]
        first, last = min(row[0] for row in rows), max(row[1] for row in rows)
        self.process_count = batch_size // (last - first)
        self.process_index = first // (last - first)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's share of a batch, as part of the global arrays."""
        return {name: jax.make_array_from_process_local_data(self.sharding, x, (self.batch_size, *x.shape[1:]))
                for name, x in batch.items()}
