"""Any mechanism inside Flax's own multi-head attention modules, nnx and linen."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.nnx.nn.dtypes import promote_dtype

from attnx import masks, scores
from attnx.mechanism import Mechanism, Pairs, Recurrent


def as_attention_fn(mechanism: Mechanism, *, is_causal: bool = False) -> Callable[..., jax.Array]:
    """A mechanism as the ``attention_fn`` of ``nnx.MultiHeadAttention`` and linen's ``MultiHeadDotProductAttention``.

    Linen hands its attention function no more than a dense mask, which hides that most of it is empty; causality stated here lets the
    mechanism skip what cannot be seen. A dense mask or bias that Flax hands over is added to the mechanism's own parts. Rows with nothing
    to attend to give zeros, where Flax averages all values.

    Args:
      mechanism: an :class:`attnx.Mechanism`. Masks, biases, causality and dropout of Flax's modules need one of the pairs engine; others have
        these, or not, of their own.
      is_causal: whether a query sees only keys up to its own position, besides what the mechanism's own mask says. (In Flax's decoding mode the
        one query has no such position and Flax's mask says everything: use a function without causality there.)

    Returns:
      A function ``(query [..., T, N, H], key [..., S, K, H], value [..., S, K, Hv], bias=None, mask=None, ...) -> [..., T, N, Hv]``.

    Raises:
      TypeError: for what is no mechanism. The function itself raises ValueError for shapes that do not fit, and NotImplementedError for
        what the mechanism cannot do or attnx does otherwise: ``precision`` (see ``jax.default_matmul_precision``), ``sow_weights`` (see
        hooks) and dropout patterns shared by heads and batch rows (``broadcast_dropout``).

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> window = as_attention_fn(attnx.pairs(mask=attnx.masks.sliding_window(64)))
      >>> layer = nnx.MultiHeadAttention(4, 32, attention_fn=window, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 100, 32))).shape
      (2, 100, 32)
    """
    if not callable(mechanism) or not hasattr(mechanism, "step"):
        raise TypeError(f"mechanism: expected an attnx.Mechanism, got {type(mechanism).__name__}")
    stated = is_causal

    def attention_fn(query, key, value, bias=None, mask=None, broadcast_dropout=True, dropout_rng=None, dropout_rate=0.0,
                     deterministic=False, dtype=None, precision=None, module=None, is_causal=False, qk_attn_weights_einsum=None,
                     attn_weights_value_einsum=None):
        _refuse(precision=precision, sow_weights=module, qk_attn_weights_einsum=qk_attn_weights_einsum,
                attn_weights_value_einsum=attn_weights_value_einsum)
        if query.ndim < 3 or key.ndim != query.ndim or value.ndim != query.ndim or not (
                query.shape[:-3] == key.shape[:-3] == value.shape[:-3]):
            raise ValueError("query, key, value: expected [..., T, N, H], [..., S, K, H], [..., S, K, Hv] with the same leading axes, "
                             f"got {query.shape}, {key.shape}, {value.shape}")
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        lead, sizes = query.shape[:-3], (query.shape[-2], query.shape[-3], key.shape[-3])
        drops = dropout_rate > 0.0 and not deterministic
        if drops and broadcast_dropout:
            raise NotImplementedError("broadcast_dropout: expected False with dropout_rate > 0, for weights are dropped independently "
                                      "in every head and batch row")
        causal = stated or is_causal
        if causal and sizes[1] != sizes[2]:
            raise ValueError(f"is_causal: expected as many queries as keys, got {sizes[1]} and {sizes[2]}; Flax's decoding mode wants a function "
                             "without causality, its mask says everything")
        asked = {"bias": bias is not None, "mask": mask is not None, "dropout_rate": drops,
                 "is_causal": causal and not isinstance(mechanism, Recurrent)}
        chosen = mechanism
        if isinstance(mechanism, Pairs):
            chosen = _with_parts(mechanism, None if bias is None else _pairwise("bias", bias, lead, sizes),
                                 None if mask is None else _pairwise("mask", mask, lead, sizes),
                                 causal, dropout_rate if drops else 0.0)
        elif any(asked.values()):
            raise NotImplementedError(f"{', '.join(k for k, v in asked.items() if v)}: {type(mechanism).__name__} has no place for it; "
                                      "give it to the mechanism itself, or use one of the pairs engine (attnx.pairs)")
        query, key, value = (x.reshape(math.prod(lead), *x.shape[-3:]) for x in (query, key, value))
        out = chosen(query, key, value, dropout_key=dropout_rng if drops else None)
        return out.reshape(*lead, *out.shape[1:])

    return attention_fn


def _refuse(**arguments):
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: expected None, got {value!r:.60}; an attention_fn made by attnx.nn.as_attention_fn has no "
                                      "place for it (jax.default_matmul_precision sets precisions, hooks of attnx.nn show weights)")


def _with_parts(mechanism, bias, mask, is_causal, dropout_rate):
    """The pairs mechanism with Flax's dense bias and mask, causality and dropout rate besides its own parts."""
    allowed = mechanism.mask
    if is_causal:
        allowed = masks.causal() & allowed
    if mask is not None:
        allowed = masks.explicit(mask.astype(bool)) & allowed
    return dataclasses.replace(mechanism, mask=allowed, dropout_rate=dropout_rate,
                               scores=mechanism.scores if bias is None else (*mechanism.scores, scores.bias(bias)))


def _pairwise(name, x, lead, sizes):
    """An array that broadcasts to [..., N, T, S] as [B or 1, N or 1, T or 1, S or 1]."""
    full = (*lead, *sizes)
    shape = (1,) * (len(full) - jnp.ndim(x)) + jnp.shape(x)
    if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full)):
        raise ValueError(f"{name}: expected a shape that broadcasts to [..., N, T, S] = {full}, got {jnp.shape(x)}")
    x = jnp.reshape(x, shape)
    if any(n != 1 for n in shape[:-3]):
        x = jnp.broadcast_to(x, lead + shape[-3:])
    return x.reshape(math.prod(x.shape[:-3]), *shape[-3:])
