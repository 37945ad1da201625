"""What the modules of this package share: names of axes, dropout, a check."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen


def logical_axes(*names: str | None) -> dict[str, Any]:
    """Metadata that names the axes of a parameter: 'embed', 'heads', 'kv_heads', 'head_size', 'mlp', 'vocab', 'layers' or None.

    ``nnx.get_partition_spec(nnx.state(model))`` reads the names, through the rules of ``nnx.logical_axis_rules`` where they are set, which
    say what axis of the mesh each stands for. Building a model needs neither rules nor mesh.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Linear(8, 32, kernel_metadata=logical_axes('embed', 'mlp'), rngs=nnx.Rngs(0))
      >>> tuple(nnx.get_partition_spec(nnx.state(layer))['kernel'].get_value())
      ('embed', 'mlp')
    """
    return {"out_sharding": names, "eager_sharding": False}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks that an activation be sharded as its axes' names say: 'batch', 'sequence', 'heads', 'kv_heads', 'mlp', 'vocab' or None.

    Does nothing outside jit, without a mesh (``jax.set_mesh``) or without rules (``nnx.logical_axis_rules``). An axis that the mesh does
    not divide stays whole, as the one token of a decoding step does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not linen.get_logical_axis_rules() or not isinstance(x, jax.core.Tracer):
        return x
    spec = linen.logical_to_mesh_axes(names)
    sizes = [math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())) for axis in spec]
    return jax.lax.with_sharding_constraint(
        x, jax.sharding.PartitionSpec(*(axis if n % size == 0 else None for axis, n, size in zip(spec, x.shape, sizes))))


def rows(x: jax.Array) -> jax.Array:
    """[B, T, ...] as [B * T, ...], the form in which matrix products and their gradients need no transposition.

    XLA's CPU backend trains an MLP of this form more than twice as fast. Left alone under a mesh, which may shard both axes.
    """
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) if jax.sharding.get_abstract_mesh().empty else x


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry with probability ``rate`` and divides the rest by ``1 - rate``; the identity where ``key`` is None."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0)


def check_sequence(name: str, x: jax.Array, features: int):
    """Raises ValueError unless ``x`` is [B, T, features]."""
    if x.ndim != 3 or x.shape[-1] != features:
        raise ValueError(f"{name}: expected shape [B, T, D] with D = {features}, got {x.shape}")


def refuse(reason: str, **given):
    """Raises NotImplementedError, with the reason, for arguments that a module called like attention is given but has no use for."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, dict) or value):
            raise NotImplementedError(f"{name}: expected None, {reason}")
