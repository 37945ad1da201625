"""Attention with fewer projections: optimised, efficient and super attention.

Hosseini, Hosseini: "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism" (2024, arXiv 2403.01643). Two linear maps in a row are one,
so some of attention's four D x D matrices can go. With x_(h) = channels h D/N .. (h + 1) D/N of an input:

    standard    out = sum over h of  softmax(x_q W_Q,h (x_k W_K,h)^T / sqrt(D/N)) x_v W_V,h W_O,h        4 D^2
    optimised   out = sum over h of  softmax(x_q W_Q,h (x_k W_K,h)^T / sqrt(D/N)) x_v,(h) W_O,h          3 D^2
    efficient   out = sum over h of  softmax(x_q W_Q,h x_k,(h)^T / sqrt(D/N)) x_v,(h) W_O,h              2 D^2
    super       efficient, with W_A x_v,(h) in place of x_v,(h): a learned map of the sequence           2 D^2 + L^2

With one head the merged forms are exactly as expressive as standard attention (:func:`optimised_from_mha`, :func:`efficient_from_mha`); with several, slices of the
input stand where each head had a full projection. The softmax is over keys. Super attention is for sequences of a length known beforehand; for causal use its W_A is
made lower triangular here, since a dense one would tell of the future.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.core.attention import attention
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.mechanism import pairs
from attnx.nn.attention import Attention

KINDS = {"standard": 4, "optimised": 3, "efficient": 2, "super": 2}  # and the number of their D x D matrices


def slices(x: Float[Array, "B S D"], heads: int) -> Float[Array, "B S N D/N"]:
    """Each head's channels of an input, unprojected."""
    if x.ndim != 3 or x.shape[2] % heads:
        raise ValueError(f"x: expected shape [B, S, D] with D a multiple of the {heads} heads, got {checks.describe(x)}")
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def _project(x, kernel):
    return jnp.einsum("btd,dnh->btnh", x, kernel.astype(x.dtype))


def _attend(query, key, value, out_kernel, is_causal, segment_ids, options):
    mask = options.pop("mask", None)
    for part in ([causal()] if is_causal else []) + ([documents(segment_ids)] if segment_ids is not None else []):
        mask = part if mask is None else part & mask
    return jnp.einsum("btnh,nhe->bte", attention(query, key, value, mask=mask, **options), out_kernel.astype(query.dtype))


def optimised_attention(query_input: Float[Array, "B T D"], key_input: Float[Array, "B S D"], value_input: Float[Array, "B S D"],
                        query_kernel: Float[Array, "D N H"], key_kernel: Float[Array, "D N H"], out_kernel: Float[Array, "N Hv E"], *, is_causal: bool = False,
                        segment_ids: Int[Array, "B T"] | None = None, **options) -> Float[Array, "B T E"]:
    """Multi-head attention without the value projection.

    ::

        out = sum over h of softmax(scale x_q W_Q,h (x_k W_K,h)^T) x_v,(h) W_O,h

    Args:
      query_input: [B, T, D].
      key_input, value_input: [B, S, D], the same or two descriptions of the same tokens.
      query_kernel, key_kernel: [D, N, H].
      out_kernel: [N, D / N, E].
      is_causal: whether a query sees nothing later than itself.
      segment_ids: int32 [B, T], documents that do not see each other (T = S).
      **options: scores, mask, weights, scale, query_positions, key_positions, implementation, ... as in :func:`attnx.attention`.

    Returns:
      [B, T, E] in the dtype of query_input.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: as multi-head attention without a projection, O(T S D) and O((T + S) D^2).

    >>> x, w = jnp.ones((1, 5, 8)), jnp.ones((8, 2, 4))
    >>> optimised_attention(x, x, x, w, w, jnp.ones((2, 4, 8))).shape
    (1, 5, 8)
    """
    value = slices(value_input, query_kernel.shape[1])
    return _attend(_project(query_input, query_kernel), _project(key_input, key_kernel), value, out_kernel, is_causal, segment_ids, options)


def efficient_attention(query_input: Float[Array, "B T D"], key_input: Float[Array, "B S D"], value_input: Float[Array, "B S D"],
                        query_kernel: Float[Array, "D N H"], out_kernel: Float[Array, "N Hv E"], *, is_causal: bool = False,
                        segment_ids: Int[Array, "B T"] | None = None, **options) -> Float[Array, "B T E"]:
    """Multi-head attention without the projections of keys and values.

    ::

        out = sum over h of softmax(scale x_q W_Q,h x_k,(h)^T) x_v,(h) W_O,h

    Args:
      query_kernel: [D, N, D / N].
      out_kernel: [N, D / N, E].
      query_input, key_input, value_input, is_causal, segment_ids, **options: as in :func:`optimised_attention`.

    Returns:
      [B, T, E] in the dtype of query_input.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: as multi-head attention with half the projections.

    >>> x = jnp.ones((1, 5, 8))
    >>> efficient_attention(x, x, x, jnp.ones((8, 2, 4)), jnp.ones((2, 4, 8)), is_causal=True).shape
    (1, 5, 8)
    """
    heads = query_kernel.shape[1]
    return _attend(_project(query_input, query_kernel), slices(key_input, heads), slices(value_input, heads), out_kernel, is_causal, segment_ids, options)


def align_values(value: Float[Array, "B S N Hv"], alignment: Float[Array, "... L L"], bias: Float[Array, " L"] | None = None, *, is_causal: bool = False,
                 positions: Int[Array, "*B S"] | None = None, segment_ids: Int[Array, "B S"] | None = None) -> Float[Array, "B S N Hv"]:
    """Maps values along the sequence: ``out_i = sum over j of W_ij value_j + b_i``.

    Args:
      value: [B, S, N, Hv], S at most L.
      alignment: W, [L, L] for all heads or [N, L, L]; rows and columns are positions, so shorter sequences use the leading ones.
      bias: b, [L], or None.
      is_causal: whether W counts as 0 above its diagonal.
      positions: int32 [S] or [B, S], each below L; -1 is padding, which counts 0. 0, 1, 2, ... by default.
      segment_ids: int32 [B, S], documents that are apart; each by its positions.

    Returns:
      [B, S, N, Hv] in the dtype of value.

    Raises:
      ValueError: shapes that do not fit; more values than L.

    Cost: O(S^2 N Hv).

    >>> align_values(jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1), jnp.array([[0.0, 1.0], [1.0, 0.0]])).ravel().tolist()
    [2.0, 1.0]
    """
    alignment = checks.check_real("alignment", alignment, ranks=(2, 3))
    (batch, length, heads, _), longest = value.shape, alignment.shape[-1]
    if alignment.shape[-2] != longest or alignment.shape[:-2] not in ((), (heads,)) or longest < length:
        raise ValueError(f"alignment: expected shape [L, L] or [{heads}, L, L] with L at least the {length} values, got {checks.describe(alignment)}")
    if bias is not None and bias.shape != (longest,):
        raise ValueError(f"bias: expected shape [{longest}] as alignment {checks.describe(alignment)}, got {checks.describe(bias)}")
    alignment = jnp.tril(alignment) if is_causal else alignment
    if positions is None:
        places, moved = jnp.arange(length)[None], alignment[..., :length, :length][None]
    else:
        places = jnp.atleast_2d(checks.check_positions("positions", positions, batch, length))
        moved = jax.vmap(lambda p: alignment[..., p[:, None], p])(places)
        value = jnp.where((places >= 0)[..., None, None], value, 0)
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None]
        moved = jnp.where(same if moved.ndim == 3 else same[:, None], moved, 0)
    return _mix(moved, value, 0 if bias is None else jnp.where(places >= 0, bias[places], 0))


def _mix(moved, value, bias):
    """Values [B, S, N, Hv] mixed by [B or 1, t, S] or [B or 1, N, t, S], and a bias [B or 1, t] added."""
    moved = jnp.broadcast_to(moved, (len(value), *moved.shape[1:])).astype(value.dtype)
    out = jnp.einsum("bij,bjnv->binv" if moved.ndim == 3 else "bnij,bjnv->binv", moved, value, preferred_element_type=jnp.promote_types(value.dtype, jnp.float32))
    return (out + jnp.asarray(bias, out.dtype)[..., None, None]).astype(value.dtype)


def super_attention(query_input: Float[Array, "B T D"], key_input: Float[Array, "B S D"], value_input: Float[Array, "B S D"], query_kernel: Float[Array, "D N H"],
                    out_kernel: Float[Array, "N Hv E"], alignment: Float[Array, "... L L"], *, alignment_bias: Float[Array, " L"] | None = None,
                    is_causal: bool = False, segment_ids: Int[Array, "B T"] | None = None, key_positions: Int[Array, "*B S"] | None = None,
                    **options) -> Float[Array, "B T E"]:
    """:func:`efficient_attention` whose values a learned map mixes along the sequence.

    ::

        out = sum over h of softmax(scale x_q W_Q,h x_k,(h)^T) (W_A x_v,(h) + b_A) W_O,h

    Args:
      alignment, alignment_bias: W_A and b_A, as in :func:`align_values`; with ``is_causal`` W_A counts as 0 above its diagonal.
      key_positions: as there, and in the attention.
      query_input, key_input, value_input, query_kernel, out_kernel, is_causal, segment_ids, **options: as in :func:`efficient_attention`.

    Returns:
      [B, T, E] in the dtype of query_input.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: that of efficient attention and O(S^2 D).

    >>> x, wq, wo = jnp.ones((1, 5, 8)), jnp.ones((8, 2, 4)), jnp.ones((2, 4, 8))
    >>> out = super_attention(x, x, x, wq, wo, jnp.eye(6))
    >>> bool(jnp.allclose(out, efficient_attention(x, x, x, wq, wo)))
    True
    """
    heads = query_kernel.shape[1]
    value = align_values(slices(value_input, heads), alignment, alignment_bias, is_causal=is_causal, positions=key_positions, segment_ids=segment_ids)
    return _attend(_project(query_input, query_kernel), slices(key_input, heads), value, out_kernel, is_causal, segment_ids,
                   options | {"key_positions": key_positions})


class Merged(NamedTuple):
    """Kernels of attention with merged projections; ``key_kernel`` is None in the efficient form."""

    query_kernel: Float[Array, "D 1 H"]
    key_kernel: Float[Array, "D 1 H"] | None
    out_kernel: Float[Array, "1 D E"]


def optimised_from_mha(query_kernel: Float[Array, "D 1 H"], key_kernel: Float[Array, "D 1 H"], value_kernel: Float[Array, "D 1 Hv"],
                       out_kernel: Float[Array, "1 Hv E"]) -> Merged:
    """Kernels with which :func:`optimised_attention` is that attention of one head: ``W_O' = W_V W_O``.

    Raises:
      ValueError: for several heads, whose values are projections of full rank that slices of the input cannot replace.

    >>> w = jnp.ones((4, 1, 4))
    >>> optimised_from_mha(w, w, w, jnp.ones((1, 4, 4))).out_kernel[0, 0, 0].item()
    4.0
    """
    if query_kernel.shape[1] != 1:
        raise ValueError(f"query_kernel: expected one head, [D, 1, H], for which merging is exact, got {checks.describe(query_kernel)}")
    return Merged(query_kernel, key_kernel, jnp.einsum("dnv,nve->de", value_kernel, out_kernel)[None])


def efficient_from_mha(query_kernel: Float[Array, "D 1 H"], key_kernel: Float[Array, "D 1 H"], value_kernel: Float[Array, "D 1 Hv"],
                       out_kernel: Float[Array, "1 Hv E"]) -> Merged:
    """Kernels with which :func:`efficient_attention` is that attention of one head: ``W_Q' = W_Q W_K^T sqrt(D / H)`` (for its scale is 1 / sqrt(D)), ``W_O' = W_V W_O``.

    Raises:
      ValueError: for several heads.
    """
    merged = optimised_from_mha(query_kernel, key_kernel, value_kernel, out_kernel)
    features, _, size = query_kernel.shape
    return Merged(jnp.einsum("dnh,enh->dne", query_kernel, key_kernel) * (features / size) ** 0.5, None, merged.out_kernel)


class Cost(NamedTuple):
    """Numbers in the weights, and multiplications and additions of a call."""

    parameters: int
    operations: int


def attention_cost(kind: str, features: int, tokens: int, *, length: int | None = None) -> Cost:
    """What a layer of self-attention without biases costs.

    Args:
      kind: "standard", "optimised", "efficient" or "super".
      features: D, of input and output.
      tokens: T.
      length: L of super attention; T by default.

    >>> [attention_cost(kind, 32, 64).parameters for kind in KINDS]
    [4096, 3072, 2048, 6144]
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    matrices = KINDS[kind] * features**2
    aligned = kind == "super"
    return Cost(matrices + aligned * (length or tokens) ** 2, 2 * tokens * matrices + (4 + 2 * aligned) * tokens**2 * features)


class OptimisedAttention(Attention):
    """Multi-head :func:`optimised_attention`, to itself or to a context.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the sizes of keys and values.
      is_causal: whether a token sees nothing later than itself.
      mechanism: in place of softmax attention of that kind.
      implementation: of softmax attention.

    >>> layer = OptimisedAttention(32, 4, is_causal=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape, layer.value
    ((1, 10, 32), None)
    """

    def __init__(self, features: int, num_heads: int, *, is_causal: bool = False, mechanism: Any = None, implementation: str | None = None,
                 context_features: int | None = None, rngs: nnx.Rngs, **options):
        if (context_features or features) % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {context_features or features} features of keys and values, got {num_heads}")
        mechanism = pairs(mask=causal() if is_causal else None, implementation=implementation) if mechanism is None else mechanism
        super().__init__(features, num_heads, mechanism=mechanism, context_features=context_features, value_size=(context_features or features) // num_heads, rngs=rngs,
                         **options)
        self.is_causal, self.value = is_causal, nnx.data(None)

    def _key_value(self, context):
        key = self._heads(self.key, context, "kv_heads")
        return key if self.key_norm is None else self.key_norm(key), slices(context, self.num_heads)


class EfficientAttention(OptimisedAttention):
    """Multi-head :func:`efficient_attention`, to itself or to a context; arguments as of :class:`OptimisedAttention`.

    >>> layer = EfficientAttention(32, 4, rngs=nnx.Rngs(0))
    >>> sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param))) == 2 * 32**2
    True
    """

    def __init__(self, features: int, num_heads: int, *, context_features: int | None = None, rngs: nnx.Rngs, **options):
        super().__init__(features, num_heads, context_features=context_features, head_size=(context_features or features) // num_heads, rngs=rngs, **options)
        self.key = nnx.data(None)

    def _key_value(self, context):
        key = value = slices(context, self.num_heads)
        return key if self.key_norm is None else self.key_norm(key), value


class SuperState(NamedTuple):
    """What super attention remembers: as :class:`attnx.nn.attention.SelfState`, and values as they are before their map, which the next tokens read."""

    position: Array
    mechanism: Any
    values: Float[Array, "B L N Hv"]


class SuperAttention(EfficientAttention):
    """Multi-head :func:`super_attention`, to itself or to a context; W_A starts as the identity, that is as :class:`EfficientAttention`.

    Args:
      length: L, the longest sequence of values.
      per_head: whether each head has a W_A of its own.
      alignment_bias: whether there is a b_A.
      features, num_heads, is_causal, ...: as in :class:`OptimisedAttention`.

    >>> layer = SuperAttention(32, 4, length=16, is_causal=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape, layer.alignment.shape
    ((1, 10, 32), (16, 16))
    """

    def __init__(self, features: int, num_heads: int, *, length: int, per_head: bool = False, alignment_bias: bool = False, param_dtype=jnp.float32,
                 rngs: nnx.Rngs, **options):
        super().__init__(features, num_heads, param_dtype=param_dtype, rngs=rngs, **options)
        self.length = checks.check_integer("length", length, least=1)
        identity = jnp.eye(length, dtype=param_dtype)
        self.alignment = nnx.Param(jnp.broadcast_to(identity, (num_heads, length, length)) if per_head else identity)
        self.alignment_bias = nnx.Param(jnp.zeros(length, param_dtype)) if alignment_bias else nnx.data(None)

    @property
    def reach(self) -> int:
        """The most tokens it reads."""
        return self.length

    def _align(self, value, positions, segment_ids=None):
        bias = None if self.alignment_bias is None else self.alignment_bias[...]
        return align_values(value, self.alignment[...], bias, is_causal=self.is_causal, positions=positions, segment_ids=segment_ids)

    def _projected(self, x, context, positions, context_positions, segment_ids):
        query, key, value = super()._projected(x, context, positions, context_positions, segment_ids)
        return query, key, self._align(value, context_positions, segment_ids)

    def init_state(self, batch, max_length, *, context=None, context_positions=None, dtype=None):
        """As :meth:`attnx.nn.Attention.init_state`; of self-attention, causal."""
        state = super().init_state(batch, max_length, context=context, context_positions=context_positions, dtype=dtype)
        if context is not None:
            return state._replace(value=self._align(state.value, context_positions))
        checks.check_integer("max_length", max_length, least=0, most=self.length)
        if not self.is_causal:
            raise ValueError("is_causal: expected True to read token by token: the values' map tells of the future otherwise")
        dtype = dtype or self.dtype or self.query.kernel.dtype
        return SuperState(*state, jnp.zeros((batch, self.length, self.num_heads, self.value_size), dtype))

    def _next_projected(self, state, x):
        state, query, key, value = super()._next_projected(state, x)
        values = jax.lax.dynamic_update_slice_in_dim(state.values, value.astype(state.values.dtype), state.position, axis=1)
        rows = state.position + jnp.arange(x.shape[1], dtype=jnp.int32)
        bias = 0 if self.alignment_bias is None else self.alignment_bias[...][rows][None]
        aligned = _mix(jnp.take(jnp.tril(self.alignment[...]), rows, axis=-2)[None], values, bias)
        return state._replace(values=values), query, key, aligned.astype(value.dtype)
