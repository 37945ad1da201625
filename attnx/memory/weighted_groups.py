"""Weighted grouped heads: a trained multi-head layer is given fewer key-value heads, each a learned combination of those that it replaces.

Chinnakonduru, Mohapatra: "Weighted Grouped Query Attention in Transformers" (2024, arXiv 2407.10855). Grouped attention takes the mean of the projections of m = N / G
heads that follow each other; here weights, trained with the rest from that mean on, say how much of each:

    W_K,g = sum over h in group g of  w_h * W_K,h,        W_V,g likewise with weights of its own

w_h is a number ("scalar"), one for each channel of the head ("column") or one for each channel of the model ("row"). The combination is of projections, not of keys,
so it folds into constants: decoding costs what grouped attention costs, with a cache of G heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes, rows
from attnx.nn.frozen import release

VARIANTS = ("scalar", "column", "row")
INITIAL = ("mean", "half", "normal")


def weighted_group_kv(key_kernel: Float[Array, "D N H"], value_kernel: Float[Array, "D N Hv"], key_weight: Float[Array, "N X"],
                      value_weight: Float[Array, "N X"], groups: int, *, variant: str = "scalar") -> tuple[Float[Array, "D G H"], Float[Array, "D G Hv"]]:
    """The projections of G key-value heads, made of those of N.

    ::

        W_g = sum over h in group g of w_h * W_h,       group g: heads g N / G .. (g + 1) N / G - 1

    Args:
      key_kernel: [D, N, H].
      value_kernel: [D, N, Hv].
      key_weight, value_weight: [N, 1] for "scalar"; [N, H] and [N, Hv] for "column"; [N, D] for "row".
      groups: G, a divisor of N.
      variant: what the weights' second axis is.

    Returns:
      ``([D, G, H], [D, G, Hv])`` in the kernels' dtypes.

    Raises:
      ValueError: shapes that do not fit.

    Cost: O(N D H), once; or in each call while the weights are trained.

    >>> kernel = jnp.arange(4.0).reshape(1, 4, 1)
    >>> key, value = weighted_group_kv(kernel, kernel, jnp.full((4, 1), 0.5), jnp.ones((4, 1)), 2)
    >>> key.ravel().tolist(), value.ravel().tolist()
    ([0.5, 2.5], [1.0, 5.0])
    """
    _check_groups(key_kernel.shape[1], groups)
    return (combine("key_weight", key_kernel, key_weight, groups, variant), combine("value_weight", value_kernel, value_weight, groups, variant))


def combine(name: str, kernel: Float[Array, "D N H"], weight: Float[Array, "N X"], groups: int, variant: str) -> Float[Array, "D G H"]:
    """One of the two projections of :func:`weighted_group_kv`; ``name`` is that of the weight in errors."""
    shape = (kernel.shape[1], _width(kernel.shape, variant))
    if jnp.shape(weight) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} for the {variant} variant of kernels {list(kernel.shape)}, got {list(jnp.shape(weight))}")
    weighted = kernel * (weight.T[..., None] if variant == "row" else weight).astype(kernel.dtype)
    return weighted.reshape(kernel.shape[0], groups, -1, kernel.shape[2]).sum(axis=2)


def _width(shape, variant):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    return {"scalar": 1, "column": shape[-1], "row": shape[-3]}[variant]


def _check_groups(heads, groups):
    checks.check_integer("groups", groups, least=1)
    if heads % groups:
        raise ValueError(f"groups: expected a divisor of the {heads} heads, got {groups}")


class WeightedGQA(Attention):
    """Grouped attention, to itself or to a context, whose G key-value heads are combined of N in each call; made of a trained layer by :func:`convert_mha_to_gqa`.

    All N projections of the layer stay and stay trainable, besides ``key_weight`` and ``value_weight``; the cache has G heads. :meth:`fold` ends the training.

    Args:
      layer: an :class:`attnx.nn.Attention` with as many key-value heads as query heads. Its parameters are shared.
      groups: G.
      variant: of the weights, see :func:`weighted_group_kv`.
      init: "mean" (1 / m each, which is grouped attention), "half" (0.5 each, as released: with m = 4 that doubles keys and values), or "normal" (random).
      rngs: for "normal".

    Raises:
      ValueError: groups that do not divide N, a layer whose heads are grouped already, biases with "row".
    """

    def __init__(self, layer: Attention, groups: int, *, variant: str = "scalar", init: str = "mean", rngs: nnx.Rngs | None = None):
        _check_groups(layer.num_heads, groups)
        if layer.num_kv_heads != layer.num_heads:
            raise ValueError(f"layer: expected as many key-value heads as query heads, got {layer.num_kv_heads} and {layer.num_heads}")
        if variant == "row" and layer.key.bias is not None:
            raise ValueError("variant: 'row' weighs channels of the model, which biases do not have; use 'scalar' or 'column', got a layer with biases")
        if init not in INITIAL:
            raise ValueError(f"init: expected one of {', '.join(map(repr, INITIAL))}, got {init!r}")
        if init == "normal" and rngs is None:
            raise ValueError("rngs: expected nnx.Rngs with init='normal', got None")
        for name in ("features", "num_heads", "head_size", "value_size", "context_features", "dtype", "query", "key", "value", "out", "mechanism", "position"):
            setattr(self, name, getattr(layer, name))
        for name in ("query_norm", "key_norm", "output_norm", "gate"):
            setattr(self, name, nnx.data(getattr(layer, name)))
        self.num_kv_heads, self.variant = groups, variant
        value = {"mean": groups / layer.num_heads, "half": 0.5}.get(init)

        def weight(kernel):
            shape, dtype = (*kernel.shape[:-3], layer.num_heads, _width(kernel.shape, variant)), kernel.dtype
            made = jnp.full(shape, value, dtype) if rngs is None or value is not None else nnx.initializers.normal(1.0)(rngs.params(), shape, dtype)
            return nnx.Param(made, **(logical_axes("heads", None) if len(shape) == 2 else {}))

        self.key_weight, self.value_weight = weight(layer.key.kernel[...]), weight(layer.value.kernel[...])

    def _grouped(self, name):
        """Kernel [D, G, H] and bias [G, H] or None of keys or values."""
        project, weight = getattr(self, name), getattr(self, f"{name}_weight")[...]

        def one(kernel, bias, weight):
            combined = combine(f"{name}_weight", kernel, weight, self.num_kv_heads, self.variant)
            return combined, None if bias is None else (bias * weight).reshape(self.num_kv_heads, -1, combined.shape[2]).sum(axis=1)

        arrays = project.kernel[...], None if project.bias is None else project.bias[...], weight
        return (jax.vmap(one) if arrays[0].ndim == 4 else one)(*arrays)  # layers that one scan evaluates lead

    def _key_value(self, context):
        def project(name):
            kernel, bias = self._grouped(name)
            dtype = self.dtype or jnp.promote_types(context.dtype, kernel.dtype)
            out = jnp.einsum("...e,ekh->...kh", rows(context).astype(dtype), kernel.astype(dtype))
            out = out if bias is None else out + bias.astype(dtype)
            return out.reshape(*context.shape[:2], *out.shape[-2:])

        key, value = project("key"), project("value")
        return key if self.key_norm is None else self.key_norm(key), value

    def fold(self) -> Attention:
        """A plain layer of G key-value heads that finds the same, its projections combined once and for all."""
        kernels = {name: self._grouped(name) for name in ("key", "value")}
        biased = kernels["key"][1] is not None
        layer = Attention(self.features, self.num_heads, mechanism=release(self.mechanism), head_size=self.head_size, value_size=self.value_size, use_bias=biased,
                          num_kv_heads=self.num_kv_heads, context_features=self.context_features, dtype=self.dtype, rngs=nnx.Rngs(0))
        for name, (kernel, bias) in kernels.items():
            project = getattr(layer, name)
            project.kernel = nnx.Param(kernel, **logical_axes("embed", "kv_heads", "head_size") if kernel.ndim == 3 else {})
            if bias is not None:
                project.bias = nnx.Param(bias, **logical_axes("kv_heads", "head_size") if bias.ndim == 2 else {})
        for name in ("query", "out", "mechanism", "position"):
            setattr(layer, name, getattr(self, name))
        for name in ("query_norm", "key_norm", "output_norm", "gate"):
            setattr(layer, name, nnx.data(getattr(self, name)))
        return layer


def _replace(module: Any, kind: type, make) -> Any:
    """The module with every attention layer of that very kind replaced by ``make(layer)``, in place; or what takes its own place."""
    if type(module) is kind:
        return make(module)
    for _, parent in list(nnx.iter_modules(module)):
        for name, child in list(vars(parent).items()):
            if type(child) is kind:
                setattr(parent, name, nnx.data(make(child)))
    return module


def convert_mha_to_gqa(module: nnx.Module, groups: int, *, variant: str = "scalar", init: str = "mean", rngs: nnx.Rngs | None = None) -> nnx.Module:
    """A trained model whose attention layers are :class:`WeightedGQA`, ready to be tuned.

    Args:
      module: an :class:`attnx.nn.Attention`, or any module that holds some as attributes, changed in place.
      groups, variant, init, rngs: as for :class:`WeightedGQA`.

    Returns:
      The module, or what takes the place of an attention layer. :func:`fold_gqa` at once, with ``init="mean"``, makes plain grouped attention of it.

    >>> import attnx
    >>> layer = Attention(32, 8, mechanism=attnx.pairs(), rngs=nnx.Rngs(0))
    >>> weighted = convert_mha_to_gqa(layer, 2)
    >>> x = jnp.ones((1, 3, 32))
    >>> bool(jnp.allclose(fold_gqa(weighted)(x), weighted(x), atol=1e-6)), weighted.init_state(1, 16).mechanism.key.shape
    (True, (1, 16, 2, 4))
    """
    return _replace(module, Attention, lambda layer: WeightedGQA(layer, groups, variant=variant, init=init, rngs=rngs))


def fold_gqa(module: nnx.Module) -> nnx.Module:
    """The model with every :class:`WeightedGQA` layer folded, see :meth:`WeightedGQA.fold`."""
    return _replace(module, WeightedGQA, lambda layer: layer.fold())
