"""What rounding to few bits costs: fake quantisation of arrays, weights and whole models, and the outliers that make it costly.

The scheme is that of Bondarenko, Nagel, Blankevoort: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing" (2023,
arXiv 2306.12929): uniform, a range for each tensor, symmetric for weights, asymmetric for activations, these ranges being running averages of the
smallest and largest value over a few batches. One outlier widens the range of its tensor, and with it the step of everything else there.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, Float

from attnx.core.checks import check_integer, check_real

_LEAST = 1e-8  # range, so that steps are positive
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat")  # primitives that call a function once


@jax.custom_jvp
def _round(x):
    """Rounds; its gradient is that of the identity."""
    return jnp.round(x)


_round.defjvp(lambda primals, tangents: (_round(*primals), tangents[0]))


def _clip(q, least, most):
    """Clips integers; unlike that of ``jnp.clip`` the gradient is whole at the ends."""
    return jnp.where((q >= least) & (q <= most), q, jnp.clip(jax.lax.stop_gradient(q), least, most))


class Range(NamedTuple):
    """The smallest and the largest value that an array of a few bits can hold."""

    low: Float[Array, ""]
    high: Float[Array, ""]


def fake_quantize(x: Float[Array, "..."], bits: int = 8, *, range: Range | tuple | str = "minmax", percentile: float = 99.99,
                  symmetric: bool = False) -> Float[Array, "..."]:
    """Rounds to the nearest of 2^bits equally spaced values, of which 0 is one.

    ::

        q = clip(round(x / step) + zero, 0, 2^bits - 1),    step = (high - low) / (2^bits - 1),    zero = round(-low / step);    step (q - zero)
        q = clip(round(x / step), -2^(bits - 1), 2^(bits - 1) - 1),    step = max |x| / (2^(bits - 1) - 1);    step q          (symmetric)

    Args:
      x: of any shape; one step for all of it.
      bits: 2 or more.
      range: (low, high), made to include 0; or "minmax", of x itself; or "percentile".
      percentile: the share of x, in percent, that the last keeps at either end.
      symmetric: whether the range is (-max, max) and there is no offset.

    Returns:
      The shape and dtype of x. Gradients pass as if nothing were rounded, and are 0 where x is clipped.

    >>> import jax.numpy as jnp
    >>> fake_quantize(jnp.array([0.0, 0.2, 0.6, 1.5]), 2)
    Array([0. , 0. , 0.5, 1.5], dtype=float32)
    """
    x = check_real("x", x)
    check_integer("bits", bits, least=2)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    low, high = _range_of(jax.lax.stop_gradient(wide), range, percentile)
    if symmetric:
        most = 2 ** (bits - 1) - 1
        step = jnp.maximum(jnp.maximum(-low, high), _LEAST) / most
        return (step * _clip(_round(wide / step), -most - 1, most)).astype(x.dtype)
    step = (high - low) / (2**bits - 1)
    zero = jnp.round(-low / step)
    return (step * (_clip(_round(wide / step) + zero, 0, 2**bits - 1) - zero)).astype(x.dtype)


def _range_of(x, range, percentile):
    if isinstance(range, str):
        if range not in ("minmax", "percentile"):
            raise ValueError(f"range: expected a pair of numbers, 'minmax' or 'percentile', got {range!r}")
        range = (x.min(), x.max()) if range == "minmax" else jnp.percentile(x, jnp.array([100 - percentile, percentile], x.dtype))
    low, high = range
    return jnp.minimum(low, 0), jnp.maximum(high, _LEAST)


def quantize_weights(parameters: Any, bits: int = 8) -> Any:
    """Every matrix of a pytree (array of two or more axes) rounded symmetrically, each with one range; vectors stay as they are.

    >>> import jax.numpy as jnp
    >>> quantize_weights({"kernel": jnp.array([[0.1, -0.7]]), "bias": jnp.array([0.1])}, bits=3)
    {'bias': Array([0.1], dtype=float32), 'kernel': Array([[ 0. , -0.7]], dtype=float32)}
    """
    return jax.tree.map(lambda x: fake_quantize(x, bits, symmetric=True) if jnp.ndim(x) >= 2 else x, parameters)


def max_inf_norm(hidden: Float[Array, "... T D"]) -> Float[Array, ""]:
    """The largest absolute activation of each sequence, ``max over t and d of |h_td|``, averaged over sequences.

    >>> import jax.numpy as jnp
    >>> max_inf_norm(jnp.array([[[1.0, -5.0]], [[3.0, 2.0]]]))
    Array(4., dtype=float32)
    """
    hidden = check_real("hidden", hidden)
    return jnp.mean(jnp.max(jnp.abs(hidden), axis=(-2, -1)).astype(jnp.promote_types(hidden.dtype, jnp.float32)))


# Whole models -------------------------------------------------------------------------------------------------------


class Ranges(NamedTuple):
    """What :func:`calibrate` found: for each matrix product the ranges of its operands and its result."""

    products: tuple[tuple[Range, Range, Range], ...]


def calibrate(function: Callable, parameters: Any, batches: Iterable, *, momentum: float = 0.9) -> Ranges:
    """The ranges of activations in a model.

    Args:
      function: ``function(parameters, batch) -> array``, such as a model's logits, without loops (``scan``) around its products. Attention has to be the
        'reference' implementation, in which its weights exist.
      parameters: a pytree.
      batches: a few inputs, 16 in the paper, of one shape.
      momentum: of the running averages of smallest and largest values.

    Returns:
      What :func:`quantized` wants.
    """
    @jax.jit
    def observe(parameters, batch):
        seen = []

        def look(dot, operands, given):
            del given
            out = dot(*operands)
            seen.append(tuple(Range(x.min(), x.max()) for x in (*operands, out)))
            return out

        _run(function, look, parameters, batch)
        return tuple(seen)

    ranges = None
    for batch in batches:
        new = observe(parameters, batch)
        ranges = new if ranges is None else jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, ranges, new)
    if ranges is None:
        raise ValueError("batches: expected at least one, got none")
    return Ranges(ranges)


def quantized(function: Callable, ranges: Ranges, *, bits: int = 8, weight_bits: int = 8) -> Callable:
    """A model as it would compute in integers: what goes into its matrix products, and what comes out, is rounded.

    An operand that depends on parameters alone is a weight, rounded symmetrically in its own range; other operands (the weights of attention among them)
    and results are activations, rounded in the ranges of :func:`calibrate`. The last product, which makes the logits, is left alone.

    Args:
      function: as there.
      ranges: of that.
      bits: of activations.
      weight_bits: of weights.

    Returns:
      ``(parameters, batch) -> array``.

    >>> import jax, jax.numpy as jnp
    >>> model = lambda w, x: jax.nn.relu(x @ w[0]) @ w[1]
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 8, 8)), jax.random.normal(jax.random.key(1), (4, 8))
    >>> coarse, fine = (quantized(model, calibrate(model, w, [x]), bits=bits, weight_bits=bits)(w, x) for bits in (4, 8))
    >>> error = lambda y: float(jnp.abs(y - model(w, x)).max())
    >>> 0 < error(fine) < error(coarse) / 4
    True
    """
    def run(parameters, batch):
        count = iter(ranges.products)
        left = len(ranges.products)

        def rounded(dot, operands, given):
            nonlocal left
            *into, out = next(count)
            left -= 1
            if left == 0:
                return dot(*operands)
            operands = [fake_quantize(x, bits, range=tuple(range)) if activation else fake_quantize(x, weight_bits, symmetric=True)
                        for x, range, activation in zip(operands, into, given)]
            return fake_quantize(dot(*operands), bits, range=tuple(out))

        return _run(function, rounded, parameters, batch)

    return run


def _run(function, visit, parameters, batch):
    """Evaluates ``function(parameters, batch)`` with ``visit(dot, operands, depends on the batch)`` in place of its matrix products."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(parameters, batch)
    leaves = [(x, False) for x in jax.tree.leaves(parameters)] + [(x, True) for x in jax.tree.leaves(batch)]
    out = _evaluate(closed.jaxpr, [(x, False) for x in closed.consts], leaves, visit)
    return jax.tree.unflatten(jax.tree.structure(shape), [x for x, _ in out])


def _evaluate(jaxpr: Jaxpr, consts, arguments, visit):
    """Interprets a program; every value goes with whether it depends on the batch."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    read = lambda x: (x.val, False) if isinstance(x, Literal) else known[x]
    for equation in jaxpr.eqns:
        values, given = zip(*map(read, equation.invars)) if equation.invars else ((), ())
        inner = [x for x in equation.params.values() if isinstance(x, (ClosedJaxpr, Jaxpr))]
        if equation.primitive.name in _CALLS:
            closed = inner[0] if isinstance(inner[0], ClosedJaxpr) else ClosedJaxpr(inner[0], ())
            results = _evaluate(closed.jaxpr, [(x, False) for x in closed.consts], list(zip(values, given)), visit)
        else:
            if "dot_general" in str([inner, equation.params.get("branches")]):
                raise NotImplementedError(f"function: expected matrix products outside of loops and kernels, got some in a {equation.primitive.name!r}; "
                                          "attention has to be the 'reference' implementation")
            bind = partial(equation.primitive.bind, **equation.params)
            out = visit(bind, values, given) if equation.primitive.name == "dot_general" else bind(*values)
            results = [(x, any(given)) for x in (out if equation.primitive.multiple_results else [out])]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]
