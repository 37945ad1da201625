"""The exponential, the logistic function and the hyperbolic tangent from the two units that a GPU has for such: 2^x and 1/x.

A tile of softmax spends more issue slots on its exponentials than on everything else, so this decides how busy the matrix units can be kept: two
instructions for e^x where the mathematical library takes eight, five for tanh where it takes some twenty. Parts go on writing ``jnp.exp``; it is replaced in
the traced tile function, after differentiation. In units of 2^-23 the error is at most about |x| + 2 of the result for e^x, and 2 of 1 for the others.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Literal

_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"}


def quickened(function: Callable, interpret, exact=()) -> Callable:
    """``function`` with these functions of float32 replaced; arrays among its positional arguments are traced, all else is static.

    ``interpret``: whether the units are to be emulated, in any dtype. ``exact``: primitives to be left as they are.
    """
    functions = {primitive: quick for primitive, quick in _functions(interpret).items() if primitive not in exact}

    def evaluate(jaxpr, inputs):
        values = dict(zip([*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars], [*jaxpr.consts, *inputs]))
        read = lambda x: x.val if isinstance(x, Literal) else values[x]
        for eqn in jaxpr.jaxpr.eqns:
            inputs = [read(x) for x in eqn.invars]
            if eqn.primitive in functions and (interpret or eqn.outvars[0].aval.dtype == jnp.float32):
                found = [functions[eqn.primitive](*inputs)]
            elif eqn.primitive.name in _CALLS:
                found = evaluate(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"], inputs)
            else:
                found = eqn.primitive.bind(*inputs, **eqn.params)
                found = found if eqn.primitive.multiple_results else [found]
            values.update(zip(eqn.outvars, found))
        return [read(x) for x in jaxpr.jaxpr.outvars]

    def run(*args, **static):
        leaves, tree = jax.tree.flatten(args)
        traced = [n for n, x in enumerate(leaves) if isinstance(x, jax.Array)]

        def flat(*arrays):
            given = dict(zip(traced, arrays))
            return function(*jax.tree.unflatten(tree, [given.get(n, x) for n, x in enumerate(leaves)]), **static)

        arrays = [leaves[n] for n in traced]
        jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(jaxpr, arrays))

    return run


def _functions(interpret):
    def unit(name, emulated):
        def apply(x):
            if interpret:
                return emulated(x)
            return plgpu.elementwise_inline_asm(f"{name}.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1,
                                                result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)])[0]
        return apply

    power, inverse = unit("ex2", jnp.exp2), unit("rcp", lambda x: 1 / x)
    exp = lambda x: power(x * (1 / math.log(2)))
    return {lax.exp_p: exp, lax.logistic_p: lambda x: inverse(1 + exp(-x)), lax.tanh_p: lambda x: 1 - 2 * inverse(1 + exp(2 * x))}
