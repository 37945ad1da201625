"""The protocol of products: in what precision the matrix products of a tile are computed.

Attention has two products forward and four more backward, each named for what it yields:

    name       operands                      result             untransposed tile [bq, bk]
    scores     query, key                    q k^T              contract (1, 1)
    values     weights, value                p v                contract (1, 0)
    dp         cotangent, value              do v^T             contract (1, 1)
    dv         weights, cotangent            p^T do             contract (0, 0)
    dq         slopes, key                   ds k               contract (1, 0)
    dk         slopes, query                 ds^T q             contract (0, 0)

In a transposed tile [bk, bq] weights and slopes come transposed, and the operands of ``scores`` and ``dp`` in the other order.

:class:`Products` multiplies operands as they are. A :class:`Rounded` one rounds operands first, whatever number format that is to, and every execution of
attention then does the same with every mask, score and weight.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def accumulator_dtype(dtype):
    """The dtype in which scores, statistics and sums of ``dtype`` inputs are kept: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def multiply(a, b, contract):
    """The product over axis ``contract[0]`` of ``a``, in the dtype of ``b``, and ``contract[1]`` of ``b``, accumulated in at least float32."""
    return lax.dot_general(a.astype(b.dtype), b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=accumulator_dtype(b.dtype))


@dataclasses.dataclass(frozen=True)
class Products:
    """Products of operands as they are, weights and slopes in the dtype of what they multiply, accumulated in at least float32. Hashable, free of arrays."""

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded beyond the dtypes of the arrays."""
        return True

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows of queries and of keys that share a scale, powers of two: a tile holds whole numbers of them, or all there are."""
        return 1, 1

    @property
    def cut(self) -> bool:
        """Whether sums over the tokens of a tile are cut into those of its blocks."""
        return False

    @property
    def any_scale(self) -> bool:
        """Whether queries may be scaled before they are rounded as well as scores afterwards."""
        return True

    @property
    def dtypes(self) -> frozenset[str]:
        """The dtypes that operands and sums are rounded to, which not every kernel has."""
        return frozenset()

    def check(self, parts) -> None:
        """Raises NotImplementedError for static ``parts`` (:class:`pallas_kernels.static.Parts`) whose products would be wrong, say with weights out of range."""

    def dot(self, name: str, a, b, contract: tuple[int, int], *, transposed: bool = False):
        """The named product over axis ``contract[0]`` of ``a`` and ``contract[1]`` of ``b``, in the dtype in which ``b``'s sums are kept."""
        return multiply(a, b, contract)

    def weigh(self, weights, unit, v):
        """``dot('values', ...)`` of weights that are multiples of ``unit``, [rows, 1], where they are rounded."""
        return self.dot("values", weights, v, (1, 0))


@dataclasses.dataclass(frozen=True)
class Rounded(Products):
    """Products of rounded operands: subclasses say how in :meth:`product`, jnp only.

    Rounding has no slope, so the gradient of a product is that of the operands as they came, made of the products that are named for it (Bengio,
    Léonard, Courville: "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation", 2013, arXiv 1308.3432). Reverse mode only.
    """

    @property
    def exact(self):
        return False

    def product(self, name: str, a, b, contract: tuple[int, int], *, transposed: bool = False):
        """As :meth:`Products.dot`, without a derivative."""
        raise NotImplementedError

    def dot(self, name, a, b, contract, *, transposed=False):
        return _straight_through(_Named(self, name, tuple(contract), transposed), a, b)

    def weigh(self, weights, unit, v):
        """``dot('values', ...)`` of weights that are rounded as multiples of ``unit``, [rows, 1], while gradients are made of them as they are."""
        return _weigh(self, weights, unit, v)


class _Named(NamedTuple):
    """Which product of whose."""

    products: Rounded
    name: str
    contract: tuple[int, int]
    transposed: bool

    def of(self, name, a, b, contract):
        return self.products.dot(name, a, b, contract, transposed=self.transposed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(which: _Named, a, b):
    return which.products.product(which.name, a, b, which.contract, transposed=which.transposed)


def _forward(which, a, b):
    return _straight_through(which, a, b), (a, b)


def _backward(which, saved, g):
    a, b = saved
    if which.name == "values":
        da, db = which.of("dp", g, b, (1, 1)), which.of("dv", a, g, (0, 0))
    elif which.name == "scores" and which.transposed:
        da, db = which.of("dk", g, b, (1, 0)), which.of("dq", g, a, (0, 0))
    elif which.name == "scores":
        da, db = which.of("dq", g, b, (1, 0)), which.of("dk", g, a, (0, 0))
    else:
        da, db = jax.vjp(lambda a, b: multiply(a, b, which.contract), a, b)[1](g)
    return da.astype(a.dtype), db.astype(b.dtype)


_straight_through.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weigh(products: Rounded, weights, unit, v):
    return products.product("values", weights / unit, v, (1, 0)) * unit


def _weigh_forward(products, weights, unit, v):
    out = _weigh(products, weights, unit, v)
    return out, (weights, unit, v, out)


def _weigh_backward(products, saved, g):
    weights, unit, v, out = saved
    dp = products.dot("dp", g, v, (1, 1)).astype(weights.dtype)
    dunit = (jnp.sum(g * out, axis=1, keepdims=True) - jnp.sum(dp * weights, axis=1, keepdims=True)) / unit  # by what rounding changed: <do, o> is the output's
    return dp, dunit.astype(unit.dtype), products.dot("dv", weights, g, (0, 0)).astype(v.dtype)


_weigh.defvjp(_weigh_forward, _weigh_backward)
