"""FAST: attention whose exponential is a Taylor polynomial, and therefore factors.

Gerami, Hoover, Dulepet, Duraiswami: "FAST: Factorizable Attention for Speeding up Transformers" (2024, arXiv 2402.07901):

    out_i = sum over j of f(s_ij) v_j / sum over j of f(s_ij),        s_ij = scale q_i . k_j,        f(s) = 1 + s  or  1 + s + s^2 / 2

A polynomial of a dot product is a dot product of features (:class:`attnx.linear.Taylor`: 1 + H, or 1 + H + H (H + 1) / 2 of them), so this is linear attention with a
state of constant size ("factored"), and yet the full attention matrix is there to be had ("quadratic", :func:`attnx.weights.taylor` in the pairs engine), the cheaper of
the two where there are fewer keys than features. f stays near the exponential, and positive in order 1, only for small scores, so queries and keys are normalised
first:

    "standardize"   each vector less its mean, over its standard deviation; scale 1 / H, so |s| <= 1
    "maxnorm"       each vector less its mean, over the largest norm in its sequence and head; scale 1, so |s| <= 1. Sees all tokens: not causal
    "scale"         as they come; scale 1 / (tau sqrt(H)): bounded by nothing, so for order 2, whose f is at least 1/2

The paper's text is followed where its released code differs, whose causal form with "maxnorm" sees the future. The scale with "standardize" is the largest that bounds
the scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks, linear
from attnx.core.attention import attention
from attnx.linear.feature_maps import Taylor
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.mechanism import skipped
from attnx.nn.attention import Attention
from attnx.nn.common import dropout
from attnx.weights.taylor import taylor
from pallas_kernels.parts import part, static
from pallas_kernels.tile import accumulator_dtype

NORMS = ("standardize", "maxnorm", "scale")


def fastmax_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *, order: int = 2, is_causal: bool = True,
                      normalize: str = "standardize", tau: float = 8.0, key_mask: Bool[Array, "B S"] | None = None, query_mask: Bool[Array, "B T"] | None = None,
                      segment_ids: Int[Array, "B T"] | None = None, form: str | None = None, dropout_rate: float = 0.0, dropout_key: Array | None = None,
                      chunk_size: int | None = None, implementation: str | None = None, **options):
    """Attention with the weights of a Taylor polynomial, factored or not.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K; S = T where causal.
      value: [B, S, K, Hv].
      order: of the polynomial, 1 or 2.
      is_causal: whether a token sees nothing later than itself.
      normalize: of queries and keys: "standardize", "maxnorm" (not causal, no documents) or "scale", see above.
      tau: with "scale", what scores are divided by besides sqrt(H).
      key_mask: booleans [B, S], the keys that are there.
      query_mask: booleans [B, T], the queries that are there, of which "maxnorm" takes the largest.
      segment_ids: int32 [B, T], S = T: documents that do not see each other; tokens of negative ids are padding.
      form: "factored" (linear attention), "quadratic" (all pairs), or None for the one with less to do.
      dropout_rate, dropout_key: factored only. Entries of normalised queries and keys (order 1) or of their products (order 2) are dropped, in numerator and denominator.
        With them products are held for all tokens, O(T H^2) memory.
      chunk_size: of the factored form.
      implementation: of the factored form as for :func:`attnx.linear_attention`, of the quadratic one as for :func:`attnx.attention`.
      **options: initial_state, return_state, axis_name of the former; block_sizes, return_residual of the latter.

    Returns:
      [B, T, N, Hv] in the query's dtype, and more where the options say so; 0 where there is nothing to attend to.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named. NotImplementedError: what the form does not have.

    Cost a head: factored O(T F Hv) time and a state of F (Hv + 1) numbers, F = O(H^order); quadratic O(T S (H + Hv)). Memory O(T (H + Hv)) in both.

    Source: Armin Gerami, Monte Hoover, Pranav S. Dulepet, Ramani Duraiswami, "FAST: Factorizable Attention for Speeding up Transformers", 2024, arXiv 2402.07901.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
    >>> factored, quadratic = (fastmax_attention(q, k, v, form=form) for form in ("factored", "quadratic"))
    >>> bool(jnp.allclose(factored, quadratic, atol=1e-5))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    size, total, order = query.shape[3], key.shape[1], checks.check_integer("order", order, least=1, most=2)
    if is_causal and total != query.shape[1]:
        raise ValueError(f"key: expected the query's length {query.shape[1]} with is_causal=True, got {checks.describe(key)}")
    if normalize == "maxnorm":
        if is_causal or segment_ids is not None:
            raise ValueError("normalize: expected 'standardize' or 'scale' with is_causal=True or segment_ids, got 'maxnorm', which depends on all tokens; "
                             "mark padding by key_mask")
        query, key, scale = _over_largest(query, query_mask), _over_largest(key, key_mask), 1.0
    else:
        query, key, scale = _normalized(query, key, normalize, tau)
    rate = checks.check_dropout_rate(dropout_rate)
    checks.check_choice("form", form, ("factored", "quadratic"))
    if form is None:
        wanted = rate or {"initial_state", "return_state", "axis_name"} & options.keys()
        form = "factored" if wanted or total > _features(order, size) else "quadratic"
    if form == "factored":
        features: Any = Taylor(order, scale)
        if rate:
            query, key = (_dropped(x, features, rate, key) for x, key in zip((query, key), jax.random.split(_key(dropout_key))))
            features = None
        return linear.linear_attention(query, key, value, is_causal=is_causal, normalize=True, feature_map=features, key_mask=key_mask, segment_ids=segment_ids,
                                       chunk_size=chunk_size, implementation=implementation, **options)
    if rate:
        raise NotImplementedError("dropout_rate: the quadratic form has no features to drop; use form='factored'")
    mask, positions = causal() if is_causal else None, jnp.arange(total, dtype=jnp.int32)
    if segment_ids is not None:
        segment_ids = checks.check_integers("segment_ids", segment_ids, ranks=(2,))
        key_mask = segment_ids >= 0 if key_mask is None else key_mask & (segment_ids >= 0)
        mask = documents(segment_ids) if mask is None else mask & documents(segment_ids)
    out = attention(query, key, value, weights=taylor(order), mask=mask, scale=scale, implementation=implementation,
                    key_positions=None if key_mask is None else jnp.where(key_mask, positions, -1), **options)
    return out if segment_ids is None else jax.tree.map(lambda x: jnp.where((segment_ids >= 0).reshape(*x.shape[:2], *(1,) * (x.ndim - 2)), x, 0), out)


def _features(order, size):
    return 1 + size + (size * (size + 1) // 2 if order == 2 else 0)


def _centred(x):
    """Less its mean over channels, in the accumulator's dtype."""
    x = x.astype(accumulator_dtype(x.dtype))
    return x - x.mean(-1, keepdims=True)


def _normalized(query, key, normalize, tau):
    """Queries, keys and the scale of what concerns each token alone."""
    size = max(query.shape[3], 1)
    if normalize == "scale":
        return query, key, 1 / (checks.check_scale(tau, 1) * size**0.5)
    if normalize != "standardize":
        raise ValueError(f"normalize: expected one of {NORMS}, got {normalize!r}")

    def standardize(x):
        centred = _centred(x)
        return (centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

    return standardize(query), standardize(key), 1 / size


def _over_largest(x, seen=None):
    """Less its mean, over the largest norm among the tokens (that are seen) of its head."""
    centred = _centred(x)
    square = jnp.sum(centred**2, axis=-1, keepdims=True)
    square = square if seen is None else jnp.where(seen[..., None, None], square, 0)
    largest = jnp.max(square, axis=1, keepdims=True, initial=0)
    return (centred * jax.lax.rsqrt(jnp.where(largest > 0, largest, 1))).astype(x.dtype)


def _key(dropout_key):
    if dropout_key is None:
        raise ValueError("dropout_key: expected a PRNG key with a dropout_rate, got None")
    return dropout_key


def _dropped(x, features, rate, key):
    """Features [..., F] of which those of the highest order had entries dropped."""
    dtype, size = x.dtype, x.shape[3]
    x = features(x.astype(accumulator_dtype(dtype)))
    first = 1 if features.order == 1 else 1 + size
    return jnp.concatenate([x[..., :first], dropout(x[..., first:], rate, key)], axis=-1).astype(dtype)


def fastmax_init(batch: int, heads: int, key_size: int, value_size: int, *, order: int = 2, dtype=jnp.float32) -> linear.LinearState:
    """The state before the first token: for each of K heads the sums of F features, and of their products with values, [F, Hv]; float32 or wider.

    The features are 1, the H channels and, in order 2, their products: the paper's moments of order 0, 1 and 2 in one.

    >>> fastmax_init(1, 2, 4, 8).memory.shape
    (1, 2, 15, 8)
    """
    return linear.init(batch, heads, _features(order, key_size), value_size, normalize=True, dtype=accumulator_dtype(dtype))


def fastmax_step(state: linear.LinearState, query: Float[Array, "B t N H"], key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"], *, order: int = 2,
                 normalize: str = "standardize", tau: float = 8.0, **options) -> tuple[linear.LinearState, Float[Array, "B t N Hv"]]:
    """The next t tokens of causal :func:`fastmax_attention`: ``(state, out)``.

    Args:
      state: from :func:`fastmax_init` or the step before.
      query, key, value, order, normalize, tau: as there, without "maxnorm".
      **options: chunk_size, implementation as for :func:`attnx.linear_attention`.

    Cost: O(F Hv) a token and head, F = O(H^order).

    >>> import jax.numpy as jnp
    >>> state, x = fastmax_init(1, 1, 1, 1), jnp.ones((1, 1, 1, 1))
    >>> state, out = fastmax_step(state, 0 * x, x, x)
    >>> state, out = fastmax_step(state, 0 * x, x, 3 * x)
    >>> out.item()  # a query of zeros finds the mean
    2.0
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    query, key, scale = _normalized(query, key, normalize, tau)
    return linear.step(state, query, key, value, feature_map=Taylor(order, scale), **options)


@part
class FastmaxMechanism:
    """:func:`fastmax_attention` as an :class:`attnx.Mechanism`; made by :class:`FastmaxAttention`."""

    order: int = static(default=2)
    normalize: str = static(default="standardize")
    tau: float = static(default=8.0)
    is_causal: bool = static(default=True)
    dropout_rate: float = static(default=0.0)
    form: str | None = static(default=None)
    implementation: str | None = static(default=None)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        told = skipped(query, key, query_positions, key_positions, segment_ids, is_causal=self.is_causal)
        if query_positions is not None:
            told["query_mask"] = jnp.broadcast_to(jnp.asarray(query_positions) >= 0, query.shape[:2])
        return fastmax_attention(query, key, value, order=self.order, is_causal=self.is_causal, normalize=self.normalize, tau=self.tau, form=self.form,
                                 dropout_rate=self.dropout_rate if dropout_key is not None else 0.0, dropout_key=dropout_key,
                                 implementation=self.implementation, **told)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        if not self.is_causal:
            raise NotImplementedError("is_causal=False: every token reads the sum over all, so there is no streaming form; use is_causal=True")
        return fastmax_init(batch, kv_heads, key_size, value_size, order=self.order, dtype=dtype)

    def step(self, state, query, key, value):
        return fastmax_step(state, query, key, value, order=self.order, normalize=self.normalize, tau=self.tau)


class FastmaxAttention(Attention):
    """Multi-head :func:`fastmax_attention`.

    Args:
      features, num_heads: as for :class:`attnx.nn.Attention`, as are all options but the mechanism.
      order, normalize, tau, is_causal, form, implementation, dropout_rate: as there.

    >>> layer = FastmaxAttention(32, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, order: int = 2, normalize: str = "standardize", tau: float = 8.0, is_causal: bool = True,
                 form: str | None = None, implementation: str | None = None, dropout_rate: float = 0.0, rngs: nnx.Rngs, **options):
        checks.check_integer("order", order, least=1, most=2)
        if normalize not in NORMS or (is_causal and normalize == "maxnorm"):
            raise ValueError(f"normalize: expected one of {NORMS}, 'maxnorm' only with is_causal=False, got {normalize!r}")
        mechanism = FastmaxMechanism(order, normalize, tau, is_causal, checks.check_dropout_rate(dropout_rate), form, implementation)
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
