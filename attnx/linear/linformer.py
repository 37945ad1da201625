"""Linformer: softmax attention to a fixed number of slots, linear combinations of all keys and of all values.

Wang, Li, Khabsa, Fang, Ma: "Linformer: Self-Attention with Linear Complexity" (2020, arXiv 2006.04768):

    out = softmax(scale Q (E K)^T) (F V),               E, F [k, S]: over the sequence, not over features

Attention matrices are close to low rank, so k slots do for S tokens: k in proportion to log S by the theory, a few hundred in practice. E and F may be one, or one
for all heads or layers, or pools and strided convolutions in their place. Every slot mixes all positions, so there is no causal form, and padding must be gone before the
projection: no mask can take it out of a slot.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks
from attnx.core.attention import attention
from attnx.nn.attention import Attention
from pallas_kernels.tile import accumulator_dtype

KINDS = ("linear", "mean_pool", "max_pool", "conv")
SHARING = ("none", "headwise", "kv", "layerwise")


def project_sequence(x: Float[Array, "B S K H"], kind: str = "linear", *, kernel: Float[Array, "..."] | None = None, window: int | None = None,
                     seen: Bool[Array, "B S"] | None = None) -> Float[Array, "B k K H"]:
    """A sequence in fewer slots.

    ::

        linear:                y_i = sum over j of kernel_ij x_j
        mean_pool, max_pool:   y_i = the mean, the largest of x_j, each channel by itself, over the tokens j of window i
        conv:                  y_i = sum over j in window i of x_j kernel_(j - i w)

    Args:
      x: [B, S, K, H].
      kind: "linear", "mean_pool", "max_pool" or "conv".
      kernel: linear: [k, S'] or, one a head, [K, k, S'], of which a sequence of S <= S' tokens uses the first S columns; conv: [w, H, H'], of all heads.
      window: w, tokens of a window in pools, S / k for k slots; the last window may be shorter.
      seen: which tokens there are; others do not count, and a window without any is zero.

    Returns:
      [B, k, K, H] in the dtype of x; k = ceil(S / w) for windows.

    Raises:
      ValueError, TypeError: an unknown kind, a kernel or window that is missing, not wanted or does not fit.

    Cost: O(S k H) a head; with windows O(S H), and O(S H H') for convolutions.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 5.0]).reshape(1, 3, 1, 1)
    >>> project_sequence(x, "mean_pool", window=2)[0, :, 0, 0], project_sequence(x, kernel=jnp.ones((1, 8)))[0, :, 0, 0]
    (Array([2., 5.], dtype=float32), Array([9.], dtype=float32))
    """
    _check_kind(kind)
    if checks.check_real("x", x, ranks=(4,)).shape[:2] != (x.shape[:2] if seen is None else jnp.shape(seen)):
        raise ValueError(f"seen: expected booleans {list(x.shape[:2])}, got {checks.describe(seen)}")
    wide = x.astype(accumulator_dtype(x.dtype))
    seen = jnp.ones(x.shape[:2], bool) if seen is None else seen
    there = seen[..., None, None]
    if (kernel is None) != kind.endswith("pool"):
        raise ValueError(f"kernel: expected {'none' if kind.endswith('pool') else 'an array'} with kind={kind!r}, got {checks.describe(kernel)}")
    if kernel is not None:
        _check_kernel(kernel, kind, x)
        kernel = kernel.astype(wide.dtype)
    if kind == "linear":
        return jnp.einsum("kis,bskh->bikh" if kernel.ndim == 3 else "is,bskh->bikh", kernel[..., :x.shape[1]], jnp.where(there, wide, 0)).astype(x.dtype)
    if kind == "conv":
        if window not in (None, kernel.shape[0]):
            raise ValueError(f"window: expected {kernel.shape[0]}, the length of the kernel, or None, got {window}")
        return jnp.einsum("biwkh,whg->bikg", _windows(jnp.where(there, wide, 0), kernel.shape[0]), kernel).astype(x.dtype)
    window = checks.check_integer("window", window, least=1)
    count = _windows(there.astype(wide.dtype), window).sum(2)
    if kind == "mean_pool":
        return (_windows(jnp.where(there, wide, 0), window).sum(2) / jnp.maximum(count, 1)).astype(x.dtype)
    lowest = jnp.finfo(x.dtype).min
    top = _windows(jnp.where(there, wide, lowest), window, lowest).max(2)
    return jnp.where(count > 0, top, 0).astype(x.dtype)


def _check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")


def _check_kernel(kernel, kind, x):
    checks.check_real("kernel", kernel, ranks=(2, 3) if kind == "linear" else (3,))
    (_, length, heads, size), shape = x.shape, kernel.shape
    if kind == "conv" and shape[1] != size:
        raise ValueError(f"kernel: expected shape [w, {size}, H'] as x has channels, got {checks.describe(kernel)}")
    if kind == "linear" and (shape[-1] < length or (len(shape) == 3 and shape[0] != heads)):
        raise ValueError(f"kernel: expected shape [k, S'] or [{heads}, k, S'] with S' at least the {length} tokens of x, got {checks.describe(kernel)}")


def _windows(x, size, fill=0):
    """[B, S, ...] as [B, ceil(S / size), size, ...]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)), constant_values=fill)
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])


def linformer_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], key_projection: Float[Array, "*K k M"],
                        value_projection: Float[Array, "*K k M"] | None = None, *, is_causal: bool = False, key_positions: Int[Array, "*B S"] | None = None,
                        **options) -> Float[Array, "B T N Hv"]:
    """Softmax attention to k projected keys and values.

    ::

        out_t = sum over i of  softmax_i(scale q_t . (E K)_i) (F V)_i

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      key_projection: E, [k, M] or [K, k, M] (one a head) with M >= S, the longest sequence; its first S columns are used.
      value_projection: F, likewise; None for E.
      is_causal: there is no causal form, so True is refused.
      key_positions: int32 [S] or [B, S]; -1 is padding, which is zeroed before the projections. Where all is padding the output is zero.
      **options: scale, dropout_rate, dropout_key, implementation, block_sizes, return_residual as in :func:`attnx.attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: for ``is_causal``.

    Cost: O((T + S) k (H + Hv)) time a head, O(T + S + k (H + Hv)) memory.

    Source: Sinong Wang, Belinda Z. Li, Madian Khabsa, Han Fang, Hao Ma, "Linformer: Self-Attention with Linear Complexity", 2020, arXiv 2006.04768.

    >>> import attnx, jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> bool(jnp.allclose(linformer_attention(q, k, v, jnp.eye(6)), attnx.attention(q, k, v), atol=1e-6))
    True
    """
    _refuse_causal(is_causal)
    query, key, value = checks.check_query_key_value(query, key, value)
    seen = _seen(key_positions, key)
    value_projection = key_projection if value_projection is None else value_projection
    if jnp.shape(value_projection)[-2:-1] != jnp.shape(key_projection)[-2:-1]:
        raise ValueError(f"value_projection: expected as many slots as key_projection {checks.describe(key_projection)}, got {checks.describe(value_projection)}")
    return attention(query, project_sequence(key, kernel=key_projection, seen=seen), project_sequence(value, kernel=value_projection, seen=seen), **options)


def _refuse_causal(is_causal):
    if is_causal:
        raise NotImplementedError("is_causal: every slot mixes all positions, so a causal form would see the future; use linear or windowed attention")


def _seen(key_positions, key):
    batch, length = key.shape[:2]
    key_positions = checks.check_positions("key_positions", key_positions, batch, length)
    return None if key_positions is None else jnp.broadcast_to(key_positions, (batch, length)) >= 0


class LinformerProjection(nnx.Module):
    """:func:`project_sequence` with its kernel: one may serve keys and values, and several layers.

    Args:
      max_length: M, tokens of the longest sequence.
      slots: k; with windows these have ``ceil(M / k)`` tokens.
      kind: as there.
      heads: K, for a linear kernel a head; None for one for all.
      head_size: H, for the kernel of "conv".
      kernel_init: of the kernel; uniform within +-1 / sqrt(k) for "linear" by default. The theory has ``normal(k ** -0.5)``.
      param_dtype, rngs: of the parameters.

    >>> import jax.numpy as jnp
    >>> LinformerProjection(100, 10, rngs=nnx.Rngs(0))(jnp.ones((1, 70, 2, 8))).shape
    (1, 10, 2, 8)
    """

    def __init__(self, max_length: int, slots: int, *, kind: str = "linear", heads: int | None = None, head_size: int | None = None, kernel_init=None,
                 param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        _check_kind(kind)
        checks.check_integer("slots", slots, least=1, most=checks.check_integer("max_length", max_length, least=1))
        self.kind, self.window = kind, -(-max_length // slots)
        self.kernel = nnx.data(None)
        if kind == "linear":
            bound = slots**-0.5
            init = kernel_init or (lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound))
            shape = (slots, max_length) if heads is None else (heads, slots, max_length)
            self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        elif kind == "conv":
            size = checks.check_integer("head_size", head_size, least=1)
            init = kernel_init or nnx.initializers.lecun_normal(in_axis=(0, 1))
            self.kernel = nnx.Param(init(rngs.params(), (self.window, size, size), param_dtype))

    def __call__(self, x: Float[Array, "B S K H"], seen: Bool[Array, "B S"] | None = None) -> Float[Array, "B k K H"]:
        """[B, S, K, H] -> [B, k, K, H], fewer slots for short sequences in windows."""
        kernel = None if self.kernel is None else self.kernel[...]
        return project_sequence(x, self.kind, kernel=kernel, window=None if self.kind == "linear" else self.window, seen=seen)

    def slot_positions(self, seen: Bool[Array, "B S"] | None) -> Int[Array, "B k"] | None:
        """-1 for the windows of which nothing is seen; None where there is nothing to hide."""
        if seen is None or self.kind == "linear":
            return None
        return jnp.where(_windows(seen[..., None, None], self.window).any((2, 3, 4)), 0, -1).astype(jnp.int32)


class Linformer(nnx.Module):
    """:func:`linformer_attention` with its projections, as an :class:`attnx.Mechanism`; made by :class:`LinformerAttention`."""

    def __init__(self, key_projection: LinformerProjection, value_projection: LinformerProjection, *, scale: float | None = None, dropout_rate: float = 0.0,
                 implementation: str | None = None):
        self.key_projection, self.value_projection = key_projection, value_projection
        self.scale, self.dropout_rate, self.implementation = scale, checks.check_dropout_rate(dropout_rate), implementation

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        if segment_ids is not None:
            raise NotImplementedError("segment_ids: slots mix all tokens of a row; give each document a row of its own")
        seen = _seen(key_positions, key)
        key, slots = self.key_projection(key, seen), self.key_projection.slot_positions(seen)
        return attention(query, key, self.value_projection(value, seen), scale=self.scale, key_positions=slots,
                         dropout_rate=self.dropout_rate if dropout_key is not None else 0.0, dropout_key=dropout_key, implementation=self.implementation)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        """There is none: refused."""
        _refuse_causal(True)

    def step(self, state, query, key, value):
        """There is none: refused."""
        _refuse_causal(True)


class LinformerAttention(Attention):
    """Multi-head :func:`linformer_attention` with its projections, of self- or cross-attention.

    ::

        out = linformer_attention(x W_q, c W_k, c W_v, E, F) W_o

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism (``num_kv_heads=1`` for one head of keys and values).
      max_length: M, the longest sequence that is read.
      slots: k; layers need not have the same, deeper ones do with fewer.
      share: "none" (E and F of each head), "headwise" (E and F for all heads), "kv" (E = F for all heads) or "layerwise" (``projection``, that of all layers).
      projection: a :class:`LinformerProjection` that several layers are given, with ``share="layerwise"``.
      kind, kernel_init: as for :class:`LinformerProjection` (``kernel_init`` of E and F is named ``projection_init`` here). Pools have nothing to share.
      is_causal: refused.
      scale, dropout_rate, implementation: as in :func:`attnx.attention`.

    >>> import jax.numpy as jnp
    >>> layer = LinformerAttention(32, 4, max_length=64, slots=8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 50, 32))).shape
    (1, 50, 32)
    """

    def __init__(self, features: int, num_heads: int, *, max_length: int, slots: int = 256, share: str = "headwise", projection: LinformerProjection | None = None,
                 kind: str = "linear", projection_init=None, is_causal: bool = False, scale: float | None = None, dropout_rate: float = 0.0,
                 implementation: str | None = None, rngs: nnx.Rngs, **options):
        _refuse_causal(is_causal)
        if share not in SHARING or (share == "layerwise") != (projection is not None):
            raise ValueError(f"share: expected one of {SHARING}, and 'layerwise' exactly where a projection is given, got {share!r}")
        if share == "none" and kind == "conv":
            raise ValueError("share: expected 'headwise' or 'kv' with kind='conv', whose kernel is of all heads, got 'none'")
        heads = (options.get("num_kv_heads") or num_heads) if share == "none" else None
        size = options.get("head_size") or features // num_heads
        if kind == "conv" and (options.get("value_size") or size) != size and share == "kv":
            raise ValueError("share: expected 'headwise' with kind='conv' and values of another size than keys, got 'kv'")
        make = partial(LinformerProjection, max_length, slots, kind=kind, heads=heads, kernel_init=projection_init,
                       param_dtype=options.get("param_dtype", jnp.float32), rngs=rngs)
        first = projection or make(head_size=size)
        second = make(head_size=options.get("value_size") or size) if share in ("none", "headwise") else first
        super().__init__(features, num_heads, mechanism=Linformer(first, second, scale=scale, dropout_rate=dropout_rate, implementation=implementation),
                         rngs=rngs, **options)
