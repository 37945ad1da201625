"""What the TPU compiler has to be told on a machine without a TPU, and what it is given to compile."""

from collections.abc import Callable

ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "XLA_FLAGS": ""}
"""Variables to be set before libtpu is loaded; with the last but one several processes may compile at once, and flags of other compilers would be refused."""

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest topology of each kind of chip, as JAX names them."""


def gradient(attend: Callable, *arguments):
    """The forward and the backward pass of ``attend``, and its arguments with those of the backward pass."""
    import jax

    def both(arguments, cotangents):
        out, pull = jax.vjp(attend, *arguments)
        return out, pull(cotangents)

    return both, (arguments, jax.eval_shape(attend, *arguments))


def like(*shape, dtype="bfloat16"):
    """An array of which no more is known."""
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)
