"""The ``cudnn`` execution: jax.nn's fused attention, for the calls that it can express, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from attnx.core.checks import describe

_WORKS = "use 'blockwise' or None"


def as_jax_nn(*, scores, mask, weights, products, dropout_rate, positions) -> dict:
    """The call's parts as keyword arguments of ``jax.nn.dot_product_attention``; NotImplementedError names what has no such form."""
    if not products.exact:
        raise NotImplementedError(f"implementation='cudnn' lacks {describe(products)}; {_WORKS}")
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


def serves(query, key, value, **parts) -> bool:
    """Whether cuDNN is the best for a call, its kernels known to exist: 16-bit self-attention, whole, causal or local, on an NVIDIA GPU."""
    if jax.default_backend() not in ("gpu", "cuda") or not jax.devices()[0].device_kind.startswith("NVIDIA"):
        return False
    try:
        arguments = as_jax_nn(**parts)
    except NotImplementedError:
        return False
    (_, t, _, h), same = query.shape, query.dtype == key.dtype == value.dtype
    return (arguments.keys() <= {"is_causal", "local_window_size"} and same and query.dtype in (jnp.bfloat16, jnp.float16)
            and t == key.shape[1] > 0 and h == value.shape[3] <= 128 and h % 8 == 0)


def attention(query, key, value, *, scale, return_residual, **parts):
    """See :func:`attnx.attention`."""
    arguments = as_jax_nn(**parts)
    if jax.default_backend() not in ("gpu", "cuda"):
        raise NotImplementedError(f"implementation='cudnn' needs an NVIDIA GPU, the backend is {jax.default_backend()!r}; {_WORKS}")
    return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn", return_residual=return_residual, **arguments)
