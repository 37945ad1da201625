"""Where supported versions of jax differ in what they call the mesh axes over which an array varies."""

import jax


def varying_axes(*trees) -> frozenset:
    """The mesh axes over which any array of the trees varies, inside ``shard_map`` with its checks on; empty elsewhere."""
    axes = frozenset()
    for x in jax.tree.leaves(trees):
        kind = jax.typeof(x)
        kind = getattr(kind, "manual_axis_type", None) or kind
        axes |= getattr(kind, "varying", None) or getattr(kind, "vma", None) or frozenset()
    return axes


def results_like(arrays, read):
    """The shapes of a kernel's results, which vary over the mesh axes over which what it reads does."""
    varying = varying_axes(read)
    per_device = {"manual_axis_type": jax.sharding.ManualAxisType(varying=varying)} if varying else {}
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, **per_device) for x in arrays]
