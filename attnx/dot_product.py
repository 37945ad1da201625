"""``jax.nn.dot_product_attention`` on the pairs engine: the same signature and semantics in O(T) memory."""

import jax
import jax.numpy as jnp

from attnx import masks, scores
from attnx.core.attention import IMPLEMENTATIONS, attention
from attnx.core.checks import as_array, check_choice, check_integer, check_integers, describe


def dot_product_attention(query, key, value, bias=None, mask=None, *, scale=None, is_causal=False, query_seq_lengths=None,
                          key_value_seq_lengths=None, local_window_size=None, implementation=None, return_residual=False):
    """Softmax attention with the signature of ``jax.nn.dot_product_attention``.

    ::

        out = softmax(scale * query key^T + bias, over allowed keys) value

    Args:
      query: [B, T, N, H] or [T, N, H].
      key, value: [B, S, K, H] or [S, K, H], N a multiple of K (grouped and multi-query attention).
      bias: broadcasts to [B, N, T, S], added to the scaled scores.
      mask: booleans that broadcast to [B, N, T, S], true where a pair is allowed.
      scale: 1 / sqrt(H) by default.
      is_causal: allow ``j <= i`` only.
      query_seq_lengths, key_value_seq_lengths: int32 [B]; what lies beyond is padding, and padded queries give zeros.
      local_window_size: ``(left, right)``, or one number for both: allow ``i - left <= j <= i + right``.
      implementation: None or "xla" (the blockwise fold), "cudnn", or any name that :func:`attnx.attention` knows.
      return_residual: also return the log of the normaliser, [B, T, N] in the key's dtype, without gradient.

    Returns:
      The query's shape and dtype, or the pair (output, residual).

    Two differences from jax.nn: memory is O(T), not O(T S); and a query without any allowed key gives zeros, where jax.nn
    averages all values. Raises ValueError or TypeError naming the argument.

    >>> import attnx, jax.numpy as jnp
    >>> x = jnp.ones((2, 16, 4, 8))
    >>> attnx.dot_product_attention(x, x, x, is_causal=True).shape
    (2, 16, 4, 8)
    """
    check_choice("implementation", implementation, ("xla", *IMPLEMENTATIONS))
    query, key, value = (as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim not in (3, 4):
            raise ValueError(f"{name}: expected [B, T, N, H] or [T, N, H], got {describe(x)}")
    shape = query.shape
    query, key, value = (x[None] if x.ndim == 3 else x for x in (query, key, value))
    if value.shape != key.shape:
        raise ValueError(f"value: expected the key's shape {list(key.shape)}, got {describe(value)}")
    parts = [masks.causal()] if is_causal else []
    if local_window_size is not None:
        window = tuple(local_window_size) if isinstance(local_window_size, (tuple, list)) else (local_window_size,) * 2
        if len(window) != 2:
            raise ValueError(f"local_window_size: expected (left, right) or one number for both, got {local_window_size}")
        parts.append(masks.local(*(check_integer("local_window_size", size, least=0) for size in window)))
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    for name, x in lengths.items():
        if x is not None and check_integers(name, x, ranks=(1,)).shape != (query.shape[0],):
            raise ValueError(f"{name}: expected int32 [{query.shape[0]}], got {describe(jnp.asarray(x))}")
    if any(x is not None for x in lengths.values()):
        parts.append(masks.lengths(query_seq_lengths, key_value_seq_lengths))
    if mask is not None:
        mask = as_array("mask", mask, "booleans")
        if mask.dtype != bool:
            raise TypeError(f"mask: expected booleans (additive masks are biases), got {describe(mask)}")
        parts.append(masks.explicit(_four("mask", mask, query, key)))
    allowed = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    extra = () if bias is None else scores.bias(_four("bias", as_array("bias", bias), query, key))
    out = attention(query, key, value, scores=extra, mask=allowed, scale=scale, return_residual=return_residual,
                    implementation="blockwise" if implementation == "xla" else implementation)
    if not return_residual:
        return out.reshape(shape)
    out, residual = out
    return out.reshape(shape), jax.lax.stop_gradient(residual.astype(key.dtype)).reshape(shape[:-1])


def _four(name, x, query, key):
    """``x`` with leading axes of size 1 up to [B, N, T, S], each axis 1 or whole."""
    full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full)):
        raise ValueError(f"{name}: expected a shape that broadcasts to [B, N, T, S] = {list(full)}, got {describe(x)}")
    return x.reshape(shape)
