"""The ``cudnn`` execution: jax.nn's fused attention, for the calls that it can express, on NVIDIA GPUs."""

import jax

from attnx.core.checks import describe

_WORKS = "use 'blockwise' or None"


def as_jax_nn(*, scores, mask, weights, dropout_rate, positions) -> dict:
    """The call's parts as keyword arguments of ``jax.nn.dot_product_attention``; NotImplementedError names what has no such form."""
    if dropout_rate:
        raise NotImplementedError(f"implementation='cudnn' lacks this library's dropout (dropout_rate={dropout_rate}); {_WORKS}")
    if any(p is not None for p in positions):
        raise NotImplementedError(f"implementation='cudnn' lacks logical positions; {_WORKS}")
    arguments = {}
    for part in (*scores, *([] if mask is None else [mask]), weights):
        expressed = part.as_jax_nn()
        if expressed is None or expressed.keys() & arguments.keys():
            raise NotImplementedError(f"implementation='cudnn' lacks {describe(part)}; {_WORKS}")
        arguments |= expressed
    return arguments


def attention(query, key, value, *, scale, return_residual, **parts):
    """See :func:`attnx.attention`."""
    arguments = as_jax_nn(**parts)
    if jax.default_backend() not in ("gpu", "cuda"):
        raise NotImplementedError(f"implementation='cudnn' needs an NVIDIA GPU, the backend is {jax.default_backend()!r}; {_WORKS}")
    return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn", return_residual=return_residual, **arguments)
