"""Slim attention: half the cache, exactly, because values can be had from keys; and caches of inputs, where those are smaller still.

Graef, Wasielewski: "Slim attention: cut your context memory in half without loss of accuracy -- K-cache is all you need for MHA" (2025, arXiv 2503.05840). With as many
key heads as query heads and a square projection W_K, the keys of all heads together say what the values are:

    V_i = (K - b_K) W_K^-1 W_V,i + b_V,i  =  K W_KV,i + b_i                 W_KV = W_K^-1 W_V, computed once in float64

Head i needs the keys of *all* heads, as they are before norms and rotary positions, so that is what the cache holds. For one query the cheap order is to weigh first,
``(w_i K) W_KV,i`` ("late"); for many to make the values first ("early"). Where W_K is not square (grouped heads, heads wider than the model, cross-attention)
the inputs X of the projections may be the smaller thing to keep: ``(q W_K,i^T) X^T`` and ``(w_i X) W_V,i`` (:func:`x_attend`).
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import cache, checks
from attnx.core.attention import attention
from attnx.core.halves import attention_weights
from attnx.mechanism import Pairs
from attnx.nn.attention import Attention, CrossState, SelfState
from attnx.nn.frozen import release

ILL = 1e6  # condition number from which single precision may show


class SlimWeights(NamedTuple):
    """From keys to values.

    Attributes:
      kernel: [N H, N, Hv], W_KV.
      bias: [N, Hv], or None.
      condition: the condition number of W_K.
    """

    kernel: Float[Array, "D N Hv"]
    bias: Float[Array, "N Hv"] | None
    condition: float = 1.0

    def values(self, key: Float[Array, "B S N H"]) -> Float[Array, "B S N Hv"]:
        """The values of keys."""
        value = jnp.einsum("bsd,dnv->bsnv", key.reshape(*key.shape[:2], -1), self.kernel.astype(key.dtype))
        return value if self.bias is None else value + self.bias.astype(value.dtype)


def slim_from_mha(key_kernel, value_kernel, key_bias=None, value_bias=None) -> SlimWeights:
    """What makes values of keys: ``W_KV = W_K^-1 W_V`` and ``b_V - b_K W_KV``.

    Args:
      key_kernel: real [D, N, H] with N H = D.
      value_kernel: real [D, N, Hv].
      key_bias: real [N, H], or None.
      value_bias: real [N, Hv], or None.

    Returns:
      :class:`SlimWeights` in the dtype of ``key_kernel``, computed in float64 on the host.

    Raises:
      ValueError: W_K is not square, as with grouped heads, or singular. Warns where its condition number is above 1e6.

    Cost: O(D^3), once.

    >>> import numpy as np
    >>> slim_from_mha(2 * np.eye(4).reshape(4, 2, 2), np.eye(4).reshape(4, 2, 2)).kernel[0, 0].tolist()
    [0.5, 0.0]
    """
    kernel, value = np.asarray(key_kernel), np.asarray(value_kernel)
    if kernel.ndim != 3 or kernel.shape[0] != kernel.shape[1] * kernel.shape[2]:
        raise ValueError(f"key_kernel: expected shape [D, N, H] with N H = D, which has an inverse, got {list(kernel.shape)}; with fewer key heads than query heads, or "
                         "heads of another size, keep the projections' inputs instead (attnx.memory.x_attend) where they are smaller")
    if value.ndim != 3 or value.shape[:2] != kernel.shape[:2]:
        raise ValueError(f"value_kernel: expected shape {[*kernel.shape[:2], 'Hv']}, got {list(value.shape)}")
    square = kernel.reshape(len(kernel), -1).astype(np.float64)
    condition = float(np.linalg.cond(square))
    if not condition < 1 / np.finfo(np.float64).eps:
        raise ValueError(f"key_kernel: expected an invertible matrix, got a condition number of {condition:.1e}")
    if condition > ILL:
        warnings.warn(f"key_kernel: condition number {condition:.1e}; values computed from keys in single precision will be inexact", stacklevel=2)
    inner = np.linalg.solve(square, value.reshape(len(value), -1).astype(np.float64))
    bias = None
    if key_bias is not None or value_bias is not None:
        bias = np.zeros(inner.shape[1]) if value_bias is None else np.asarray(value_bias, np.float64).reshape(-1)
        bias = bias if key_bias is None else bias - np.asarray(key_bias, np.float64).reshape(-1) @ inner
        bias = bias.reshape(value.shape[1:]).astype(kernel.dtype)
    return SlimWeights(jnp.asarray(inner.reshape(value.shape).astype(kernel.dtype)), None if bias is None else jnp.asarray(bias), condition)


def slim_attend(query: Float[Array, "B t N H"], key: Float[Array, "B S N H"], slim: SlimWeights, *, option: str | None = None, scale: float | None = None,
                position: Callable | None = None, query_positions: Int[Array, "*B t"] | None = None, key_positions: Int[Array, "*B S"] | None = None, **parts):
    """Attention whose values are made of its keys.

    ::

        out_i = sum over j of w_ij (k_j W_KV + b)             w: softmax attention's, of position(q, k)

    Args:
      query: [B, t, N, H].
      key: [B, S, N, H], as projected: before ``position``.
      slim: see :func:`slim_from_mha`.
      option: "late" (weigh the keys, then project: O(t N S D) and O(N t S) memory), "early" (project, then attend: O(S D N Hv)), None for the cheaper.
      scale: 1 / sqrt(H) by default.
      position: ``(query, key, query_positions, key_positions) -> (query, key)``, such as :class:`attnx.positions.Rotary`.
      query_positions, key_positions: as in :func:`attnx.attention`.
      **parts: scores, mask, weights as there.

    Returns:
      [B, t, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named.

    >>> import attnx, jax, jax.numpy as jnp
    >>> x, wq, wk, wv = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(1, 5, 4), *[(4, 2, 2)] * 3]))
    >>> q, k, v = (jnp.einsum("bsd,dnh->bsnh", x, w) for w in (wq, wk, wv))
    >>> bool(jnp.allclose(slim_attend(q, k, slim_from_mha(wk, wv)), attnx.attention(q, k, v), atol=1e-4))
    True
    """
    checks.check_choice("option", option, ("late", "early"))
    query, key = checks.check_query_key_value(query, key)[:2]
    (b, t, n, h), size = query.shape, slim.kernel.shape[0]
    if key.shape[2] != n or n * h != size:
        raise ValueError(f"key: expected shape [{b}, S, {n}, {size // n}] for weights of {checks.describe(slim.kernel)}, got {checks.describe(key)}")
    turned = (query, key) if position is None else position(query, key, query_positions, key_positions)
    parts |= dict(scale=scale, query_positions=query_positions, key_positions=key_positions)
    if option == "early" or (option is None and t > slim.kernel.shape[2]):
        return attention(*turned, slim.values(key), **parts)
    w = attention_weights(*turned, **parts)
    read = jnp.einsum("bnts,bsd->btnd", w, key.reshape(b, -1, size).astype(w.dtype))
    out = jnp.einsum("btnd,dnv->btnv", read, slim.kernel.astype(w.dtype))
    if slim.bias is not None:
        out = out + jnp.swapaxes(w.sum(-1), 1, 2)[..., None] * slim.bias.astype(w.dtype)
    return out.astype(query.dtype)


def x_attend(query: Float[Array, "B t N H"], context: Float[Array, "B S E"], key_kernel: Float[Array, "E K H"], value_kernel: Float[Array, "E K Hv"], *,
             key_bias: Float[Array, "K H"] | None = None, value_bias: Float[Array, "K Hv"] | None = None, option: str | None = None, scale: float | None = None,
             position: Callable | None = None, query_positions: Int[Array, "*B t"] | None = None, key_positions: Int[Array, "*B S"] | None = None, **parts):
    """Attention to inputs of the projections: keep ``context``, once for all layers that read it, and neither keys nor values.

    ::

        out_i = sum over j of w_ij (x_j W_V + b_V),           w: softmax over j of scale q_i . (x_j W_K + b_K)

    Args:
      query: [B, t, N, H].
      context: [B, S, E]: an encoder's output, or the inputs X of a self-attention layer so far.
      key_kernel, value_kernel: [E, K, H] and [E, K, Hv], N a multiple of K.
      key_bias, value_bias: [K, H] and [K, Hv].
      option: "folded" (the projections on the queries' side: attention of N heads to one shared key of size E, which is the value too), "recompute" (make keys and
        values), None for the cheaper; with ``position`` always the latter.
      scale, position, query_positions, key_positions: as in :func:`slim_attend`.
      **parts: scores, mask, implementation, block_sizes as in :func:`attnx.attention`. The weights are softmax, which forgets the key bias.

    Returns:
      [B, t, N, Hv] in the query's dtype.

    Cost: folded O(t N S E), nothing kept but the context; recompute O(S E K (H + Hv) + t N S (H + Hv)).

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, x, wk, wv = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(1, 3, 2, 4), (1, 5, 6), (6, 2, 4), (6, 2, 4)]))
    >>> k, v = (jnp.einsum("bse,ekh->bskh", x, w) for w in (wk, wv))
    >>> bool(jnp.allclose(x_attend(q, x, wk, wv, option="folded"), attnx.attention(q, k, v), atol=1e-4))
    True
    """
    checks.check_choice("option", option, ("folded", "recompute"))
    query, context = checks.check_real("query", query, ranks=(4,)), checks.check_real("context", context, ranks=(3,))
    (t, n, h), (e, k) = query.shape[1:], key_kernel.shape[:2]
    if context.shape[2] != e or value_kernel.shape[:2] != (e, k) or key_kernel.shape[2] != h or not k or n % k:
        raise ValueError(f"key_kernel: expected shape [{context.shape[2]}, K, {h}] with K a divisor of {n}, and value_kernel [{context.shape[2]}, K, Hv], "
                         f"got {checks.describe(key_kernel)} and {checks.describe(value_kernel)}")
    if option == "folded" and position is not None:
        raise NotImplementedError("option='folded' cannot turn keys that are never made; use 'recompute' with position")
    parts |= dict(query_positions=query_positions, key_positions=key_positions)
    if option == "recompute" or position is not None or (option is None and t > h):
        bias = lambda b: 0 if b is None else b.astype(context.dtype)
        key = jnp.einsum("bse,ekh->bskh", context, key_kernel.astype(context.dtype)) + bias(key_bias)
        value = jnp.einsum("bse,ekv->bskv", context, value_kernel.astype(context.dtype)) + bias(value_bias)
        if position is not None:
            query, key = position(query, key, query_positions, key_positions)
        return attention(query, key, value, scale=scale, **parts)
    spread = lambda x: jnp.repeat(x, n // k, axis=-2).astype(query.dtype)
    folded = jnp.einsum("btnh,enh->btne", query, spread(key_kernel))
    shared = context[:, :, None].astype(query.dtype)
    read, r = attention(folded, shared, shared, scale=checks.check_scale(scale, h), return_residual=True, **parts)
    out = jnp.einsum("btne,env->btnv", read, spread(value_kernel))
    return out if value_bias is None else out + jnp.where(r > -jnp.inf, 1, 0)[..., None].astype(out.dtype) * spread(value_bias)


class SlimAttention(Attention):
    """A multi-head attention layer that remembers keys alone; made of another by :func:`slim_convert`.

    The call makes values of keys; a step appends keys [B, t, N, H] to a cache half the usual size and attends "late" for few tokens, "early" for many.
    Weights of queries, keys and outputs are those of the other layer; the value projection is gone.

    Args:
      layer: an :class:`attnx.nn.Attention` of the pairs engine, as many key heads as query heads, N H = D.
      option: of steps, as in :func:`slim_attend`.

    Raises:
      ValueError: W_K is not square or singular. TypeError: another engine's mechanism.
    """

    def __init__(self, layer: Attention, option: str | None = None):
        checks.check_choice("option", option, ("late", "early"))
        mechanism = release(layer.mechanism)
        if not isinstance(mechanism, Pairs):
            raise TypeError(f"layer: expected an attention layer of the pairs engine, got one with {checks.describe(mechanism)}")
        if layer.num_kv_heads != layer.num_heads:
            raise ValueError(f"layer: expected as many key heads as query heads, got {layer.num_kv_heads} and {layer.num_heads}: W_K has no inverse; keep inputs "
                             "instead (attnx.memory.x_attend) where they are smaller")
        for name in ("features", "num_heads", "num_kv_heads", "head_size", "value_size", "context_features", "dtype", "query", "key", "out", "mechanism", "position"):
            setattr(self, name, getattr(layer, name))
        for name in ("query_norm", "key_norm", "output_norm", "gate"):
            setattr(self, name, nnx.data(getattr(layer, name)))
        self.value, self.option = nnx.data(None), option
        arrays = [None if x is None else x[...] for x in (layer.key.kernel, layer.value.kernel, layer.key.bias, layer.value.bias)]
        stacked = arrays[0].ndim == 4  # layers that one scan evaluates
        each = [slim_from_mha(*(None if x is None else x[index] for x in arrays)) for index in range(len(arrays[0]))] if stacked else [slim_from_mha(*arrays)]
        join = lambda *x: jnp.stack(x) if stacked else x[0]
        self.kernel = nnx.Param(join(*(x.kernel for x in each)))
        self.bias = nnx.data(None if each[0].bias is None else nnx.Param(join(*(x.bias for x in each))))
        self.condition = tuple(x.condition for x in each)

    def _slim(self):
        return SlimWeights(self.kernel[...], None if self.bias is None else self.bias[...])

    def _key_value(self, context):
        key = self._heads(self.key, context, "kv_heads")
        return key if self.key_norm is None else self.key_norm(key), self._slim().values(key)

    def init_state(self, batch, max_length, *, context=None, context_positions=None, dtype=None):
        """As :meth:`attnx.nn.Attention.init_state`, of keys alone in self-attention."""
        if context is not None:
            return super().init_state(batch, max_length, context=context, context_positions=context_positions, dtype=dtype)
        dtype = dtype or self.dtype or self.key.kernel.dtype
        return SelfState(jnp.zeros((), jnp.int32), cache.init(batch, max_length, self.num_heads, self.head_size, 0, dtype))

    def step(self, state, x, *, hooks=None, layer=0) -> tuple[Any, Array]:
        """As :meth:`attnx.nn.Attention.step`; hooks act in the call alone."""
        if isinstance(state, CrossState):
            return super().step(state, x, hooks=hooks, layer=layer)
        if hooks:
            raise NotImplementedError("hooks: a step of slim attention never holds what they act on; use the call")
        query, key = self._query(x), self._heads(self.key, x, "kv_heads")
        kept = cache.append(state.mechanism, key, key[..., :0])
        mechanism, move = release(self.mechanism), release(self.position)

        def position(query, key, query_positions, key_positions):
            key = key if self.key_norm is None else self.key_norm(key)
            return (query, key) if move is None else move(query, key, query_positions, key_positions)

        dtype = cache.computation_dtype(query, kept.key)
        positions = state.position + jnp.arange(x.shape[1], dtype=jnp.int32)
        out = slim_attend(query.astype(dtype), kept.key.astype(dtype), self._slim(), option=self.option, scale=mechanism.scale, position=position,
                          query_positions=positions, key_positions=kept.positions,
                          scores=mechanism.scores, mask=mechanism.mask, weights=mechanism.weights)
        return SelfState(state.position + x.shape[1], kept), self._finish({}, out.astype(query.dtype), None, x, positions)


def slim_convert(module: nnx.Module, option: str | None = None) -> nnx.Module:
    """A model whose attention layers are :class:`SlimAttention`.

    Args:
      module: an :class:`attnx.nn.Attention`, or any module that holds some as attributes, changed in place.
      option: as for :class:`SlimAttention`.

    Returns:
      The module, or what takes the place of an attention layer. Each has ``condition``, the condition numbers of its W_K.

    >>> import attnx
    >>> layer = Attention(8, 2, mechanism=attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0))
    >>> slim = slim_convert(layer)
    >>> x = jnp.ones((1, 3, 8))
    >>> bool(jnp.allclose(slim(x), layer(x), atol=1e-5)), slim.init_state(1, 16).mechanism.value.size
    (True, 0)
    """
    if type(module) is Attention:
        return SlimAttention(module, option)
    for _, parent in list(nnx.iter_modules(module)):
        for name, child in list(vars(parent).items()):
            if type(child) is Attention:
                setattr(parent, name, nnx.data(SlimAttention(child, option)))
    return module


class MemoryReport(NamedTuple):
    """Bytes of the context memory of a model: keys and values, keys alone (None where W_K is not square), inputs of the projections."""

    standard: int
    slim: int | None
    inputs: int


def memory_report(features: int, num_heads: int, *, layers: int, tokens: int, num_kv_heads: int | None = None, head_size: int | None = None,
                  context_tokens: int = 0, batch: int = 1, itemsize: int = 2) -> MemoryReport:
    """How much a decoder remembers, by each way of remembering it.

    Args:
      features, num_heads, num_kv_heads, head_size: of an attention layer.
      layers: how many.
      tokens: of the decoded sequence.
      context_tokens: of an encoder that each layer attends to besides; its output is kept once in place of keys and values a layer.
      batch: sequences.
      itemsize: bytes of a number.

    >>> whisper = memory_report(1280, 20, layers=32, tokens=448, context_tokens=1500)
    >>> t5 = memory_report(1024, 128, head_size=128, layers=24, tokens=512)
    >>> round(whisper.standard / whisper.slim, 1), t5.standard / t5.inputs, t5.slim
    (7.9, 32.0, None)
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    size = features // num_heads if head_size is None else head_size
    number = batch * itemsize
    shared = number * context_tokens * features
    square = kv_heads == num_heads and num_heads * size == features
    return MemoryReport(number * layers * (tokens + context_tokens) * 2 * kv_heads * size,
                        number * layers * tokens * num_heads * size + shared if square else None, number * layers * tokens * features + shared)
