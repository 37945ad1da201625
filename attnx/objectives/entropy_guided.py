"""Entropy-guided attention: transformers without normalisation and activations, whose heads' entropies are kept in bounds by a loss and by temperatures.

Jha, Reagen: "Entropy-Guided Attention for Private LLMs" (PPAI Workshop at AAAI 2025, arXiv 2501.03489). Under encryption every nonlinearity is dear, and softmax is the
one that cannot be spared. Without the others heads fail in two ways: their rows have hardly any entropy (collapse, in deep layers), or nearly all there
can be (overload, in early ones). With E_i = - sum_j w_ij log w_ij the entropy of a row, E_max = log T and theta learned, one a head:

    loss += coefficient * mean over layers and heads of  (E - theta E_max)^2  where  |E - theta E_max| > margin E_max        rows' own, or their mean's
    w     = softmax(q k^T / (sqrt(H) t)),            t learned, one a head and position
    block:  x <- x + attention(x),   x <- beta x + x W / alpha            no activation lies between the two matrices of a network, so they are one

The entropies need no attention maps: E_i = sum_j w_ij (r_i - s_ij), r the log of the softmax's normaliser, is one more sum over keys (:func:`row_entropy`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnx.core import checks
from attnx.core.attention import attention
from attnx.core.halves import row_statistics
from attnx.masks.causal import causal
from attnx.mechanism import Pairs, pairs
from attnx.nn.attention import Attention
from attnx.nn.common import check_sequence, logical_axes, rows
from pallas_kernels.parts import Mask, Softmax, Sum, Weights, part

LEAST = 1e-3  # temperature


# Entropies --------------------------------------------------------------------------------------------------------------


def attention_entropy(weights: Float[Array, "... T S"], mask: Bool[Array, "..."] | None = None) -> Float[Array, "... T"]:
    """The entropy of each row of attention maps, ``- sum_j w_ij log w_ij``, in nats.

    Args:
      weights: [..., T, S], at least 0.
      mask: booleans that broadcast to them: which entries count; all by default.

    Returns:
      [..., T], at least float32; 0 for a row of zeros. The gradient at a weight of 0 is taken to be 0.

    >>> [f"{abs(x):.4f}" for x in attention_entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]]))]
    ['0.6931', '0.0000']
    """
    weights = checks.check_real("weights", weights)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    ok = weights > 0 if mask is None else (weights > 0) & mask
    safe = jnp.where(ok, weights, 1)
    return -jnp.sum(safe * jnp.log(safe), axis=-1)


def _surprise(s, earlier, *temperature):
    """w (r - s) of a pair, of scores over the temperature."""
    s = s / temperature[0].astype(s.dtype) if temperature else s
    return jnp.exp(s - earlier[0]) * (earlier[0] - s)


def _itself(total, earlier, *_):
    return total


@part
class _Entropy(Weights):
    """Softmax's residual, and the entropy of its rows."""

    temperature: Any = None

    def operands(self, sizes):
        return Softmax(None, self.temperature).operands(sizes)

    @property
    def statistics(self):
        return Softmax(None, self.temperature), Sum(_surprise, _itself)


def row_entropy(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], *, temperature=None, **options) -> Float[Array, "B T N"]:
    """The entropy of each row of softmax attention, in nats, without the attention maps.

    ::

        E_i = sum_j w_ij (r_i - s_ij) = r_i - sum_j w_ij s_ij,      r_i = log sum_j e^s_ij

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      temperature: divides the scores, as in :func:`attnx.weights.softmax`.
      **options: scores, mask, scale, positions, implementation, block_sizes as in :func:`attnx.row_statistics`.

    Returns:
      [B, T, N], at least float32; 0 for rows that see one key, or none. Differentiable.

    Cost: two passes over the scores, O(T + S) memory.

    >>> import attnx
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> [f"{abs(x):.4f}" for x in row_entropy(q, k, mask=attnx.masks.causal())[0, :, 0]]
    ['0.0000', '0.6931', '1.0986', '1.3863']
    """
    temperature = None if temperature is None else checks.check_real("temperature", temperature, ranks=(0, 1, 3))
    return row_statistics(query, key, weights=_Entropy(temperature), **options)[1]


def head_entropy_bins(entropies: Float[Array, "..."], context: int) -> Float[Array, "4"]:
    """The shares of heads whose entropy lies in each quarter of ``[0, log context]``: the first holds those that collapse, the last those that are overloaded.

    Args:
      entropies: of any number of heads, each a mean over its rows.
      context: T, the number of tokens.

    Returns:
      [4], of sum 1.

    >>> head_entropy_bins(jnp.array([0.1, 2.6, 2.7, 1.0]), 16)
    Array([0.25, 0.25, 0.  , 0.5 ], dtype=float32)
    """
    entropies = checks.check_real("entropies", entropies).reshape(-1)
    quarter = jnp.clip(jnp.floor(4 * entropies / _largest(context)), 0, 3).astype(jnp.int32)
    return jnp.mean(jax.nn.one_hot(quarter, 4, dtype=jnp.promote_types(entropies.dtype, jnp.float32)), axis=0)


def _largest(context):
    return jnp.log(max(checks.check_integer("context", context, least=1), 2))


def entropy_reg_loss(entropies: Float[Array, "L B T N"], thresholds: Float[Array, "L N"], *, context: int | None = None, coefficient: float = 1e-5,
                     margin: float = 0.2, granularity: str = "per_query", reduction: str = "sum", per_query_max: bool = False,
                     where: Bool[Array, "B T"] | None = None) -> Float[Array, ""]:
    """The loss that keeps entropies near learned thresholds.

    ::

        coefficient * mean over layers and heads of  f(E - theta E_max),      f(d) = d^2 where |d| > margin E_max, else 0

    Args:
      entropies: E [L, B, T, N], of :func:`row_entropy` or, transposed, :func:`attention_entropy`, of all layers.
      thresholds: theta [L, N], learned (the paper finds 0.2 to 0.5); each layer has its own.
      context: E_max = log context; T by default.
      coefficient: the paper's is 1e-5 for 128 tokens and 5e-5 for 512, with "sum".
      margin: in units of E_max. The whole deviation is squared beyond it, not the excess.
      granularity: "per_query", every row by itself, as in the released code, or "head_mean", the head's mean over rows, as printed.
      reduction: "sum" over the batch and, with "per_query", over rows, as released; or "mean", which does not depend on how many there are.
      per_query_max: whether E_max of row i is log(i + 1), what a causal row can have at the most; needs "per_query".
      where: [B, T], which queries count; all by default.

    Returns:
      A number, at least float32.

    Raises:
      ValueError, TypeError: shapes that do not fit or an option that is not known, named.

    >>> uniform = jnp.full((1, 1, 8, 2), jnp.log(8.0))
    >>> entropy_reg_loss(uniform, jnp.full((1, 2), 0.9)).item()
    0.0
    >>> loss = entropy_reg_loss(uniform, jnp.full((1, 2), 0.5), coefficient=1.0, reduction="mean")
    >>> bool(jnp.isclose(loss, (0.5 * jnp.log(8)) ** 2))
    True
    """
    entropies, thresholds = checks.check_real("entropies", entropies, ranks=(4,)), checks.check_real("thresholds", thresholds, ranks=(2,))
    layers, batch, length, heads = entropies.shape
    if thresholds.shape != (layers, heads):
        raise ValueError(f"thresholds: expected shape {[layers, heads]} ([L, N]) as the entropies {checks.describe(entropies)} say, got {checks.describe(thresholds)}")
    checks.check_choice("granularity", granularity, ("per_query", "head_mean"))
    checks.check_choice("reduction", reduction, ("sum", "mean"))
    if per_query_max and granularity != "per_query":
        raise ValueError(f"per_query_max: expected False for granularity={granularity!r}, whose rows are averaged first")
    wide = jnp.promote_types(entropies.dtype, jnp.float32)
    counted = jnp.ones((batch, length), bool) if where is None else jnp.broadcast_to(where, (batch, length))
    counted = counted[None, :, :, None]
    largest = jnp.log(jnp.arange(1, length + 1, dtype=wide))[:, None] if per_query_max else _largest(length if context is None else context).astype(wide)
    entropies, theta = entropies.astype(wide), thresholds.astype(wide)[:, None, None]
    if granularity == "head_mean":
        total = jnp.sum(counted, axis=2, keepdims=True)
        entropies = jnp.sum(jnp.where(counted, entropies, 0), axis=2, keepdims=True) / jnp.maximum(total, 1)
        counted = total > 0
    deviation = jnp.where(counted, entropies - theta * largest, 0)
    penalty = jnp.where(jnp.abs(deviation) > margin * largest, deviation**2, 0)
    total = jnp.sum(penalty, axis=(1, 2))
    if reduction == "mean":
        total = total / jnp.maximum(jnp.sum(counted), 1)
    return coefficient * jnp.mean(total)


# Temperatures -----------------------------------------------------------------------------------------------------------


def temperature_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], temperature: Float[Array, "N T"],
                          **options) -> Float[Array, "B T N Hv"]:
    """Softmax attention with a temperature for each head and query.

    ::

        out_i = sum over j of softmax_j(scale q_i . k_j / t_i) v_j

    Args:
      query, key, value: as in :func:`attnx.attention`.
      temperature: t [N, T]: below 1 sharpens, above 1 diffuses; at least 1e-3 in effect.
      **options: mask, scale, scores, positions, implementation, block_sizes, return_residual, hooks, dropout as there.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: that of attention.

    >>> import attnx
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 8))
    >>> bool(jnp.allclose(temperature_attention(q, k, v, jnp.ones((2, 5))), attnx.attention(q, k, v), atol=1e-6))
    True
    """
    checks.check_query_key_value(query, key, value)
    temperature = checks.check_real("temperature", temperature, ranks=(2,))
    if temperature.shape != (query.shape[2], query.shape[1]):
        raise ValueError(f"temperature: expected shape {[query.shape[2], query.shape[1]]} ([N, T]), got {checks.describe(temperature)}")
    return attention(query, key, value, weights=_tempered(temperature.T[None]), **options)


def _tempered(temperature):
    return Softmax(None, jnp.maximum(temperature, LEAST))


@part
class TemperedPairs(Pairs):
    """A mechanism of the pairs engine that is also handed ``temperature`` [N, L], those of L positions; made by :class:`TemperatureAttention`."""

    def _at(self, temperature, places):
        found = jnp.moveaxis(temperature[:, jnp.clip(places, 0, temperature.shape[1] - 1)], 0, -1)  # [(B,) T, N]
        weights = _tempered(found if found.ndim == 3 else found[None])
        return Pairs(self.scores, self.mask, weights, self.scale, self.dropout_rate, self.implementation)

    def __call__(self, query, key, value, *, temperature, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None, hooks=None):
        places = jnp.arange(query.shape[1]) if query_positions is None else query_positions
        return self._at(temperature, places)(query, key, value, query_positions=query_positions, key_positions=key_positions, segment_ids=segment_ids,
                                             dropout_key=dropout_key, hooks=hooks)

    def step(self, state, query, key, value, *, temperature, hooks=None):
        return self._at(temperature, state.next + jnp.arange(query.shape[1])).step(state, query, key, value, hooks=hooks)


class TemperatureAttention(Attention):
    """Multi-head attention with learned temperatures of heads and positions, by default causal. It decodes from a key-value cache.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all other options but the mechanism.
      max_length: how many positions have temperatures; those beyond have that of the last.
      initial: their start: 1e-2 for 128 tokens, 1e-1 for 512 in the paper, whose blocks have no norms; 1 is plain attention.
      mask, scale, dropout_rate, implementation: as in :func:`attnx.pairs`.

    >>> layer = TemperatureAttention(32, 4, max_length=16, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, max_length: int, initial: float = 1.0, mask: Mask | None = causal(), scale: float | None = None,
                 dropout_rate: float = 0.0, implementation: str | None = None, param_dtype=jnp.float32, rngs: nnx.Rngs, **options):
        checks.check_integer("max_length", max_length, least=1)
        plain = pairs(mask=mask, scale=scale, dropout_rate=dropout_rate, implementation=implementation)
        super().__init__(features, num_heads, mechanism=TemperedPairs(**vars(plain)), param_dtype=param_dtype, rngs=rngs, **options)
        self.temperature = nnx.Param(jnp.full((num_heads, max_length), initial, param_dtype), **logical_axes("heads", None))

    def extras(self, x):
        return {"temperature": self.temperature[...]}


class SoftmaxOnlyBlock(nnx.Module):
    """A transformer block whose only nonlinearity is attention: no norms, no activation, one matrix for the feed-forward half.

    ::

        x <- x + attention(x),       x <- beta x + x W / alpha

    Args:
      features: D.
      attention: a module called like :class:`attnx.nn.Attention`; such as :class:`TemperatureAttention`.
      ffn_norm: "scaled", with learned numbers alpha and beta, 1 at the start; or, without these, W over the lengths of its columns, times learned gains
        ("weight"), or over its largest singular value ("spectral", found exactly, in O(D^3)); or None for neither.
      kernel_init: initialiser of W.
      param_dtype: of the parameters.
      rngs: the generator of initial values.

    Raises:
      ValueError: for another ``ffn_norm``.

    >>> block = SoftmaxOnlyBlock(16, attention=TemperatureAttention(16, 2, max_length=8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 5, 16))).shape
    (1, 5, 16)
    """

    def __init__(self, features: int, *, attention: nnx.Module, ffn_norm: str | None = "scaled", kernel_init=nnx.initializers.lecun_normal(),
                 param_dtype=jnp.float32, rngs: nnx.Rngs):
        checks.check_choice("ffn_norm", ffn_norm, ("scaled", "weight", "spectral"))
        self.features, self.attention, self.ffn_norm = features, attention, ffn_norm
        self.kernel = nnx.Param(kernel_init(rngs.params(), (features, features), param_dtype), **logical_axes("embed", "embed"))
        ones = lambda shape: nnx.Param(jnp.ones(shape, param_dtype))
        self.alpha, self.beta = (ones(()), ones(())) if ffn_norm == "scaled" else (nnx.data(None), nnx.data(None))
        self.gain = ones((features,)) if ffn_norm == "weight" else nnx.data(None)

    def __call__(self, x: Float[Array, "B T D"], context=None, **options) -> Float[Array, "B T D"]:
        """[B, T, D] to the same; options (positions, segment_ids, dropout_key, hooks, layer) as of the attention."""
        self._check(x, context)
        options.pop("context_positions", None)
        return self._feed(x + self.attention(x, **options).astype(x.dtype))

    def init_state(self, batch: int, max_length: int, *, context=None, context_positions=None, dtype=None):
        """The state of the attention before the first token."""
        return self.attention.init_state(batch, max_length, dtype=dtype)

    def step(self, state, x: Float[Array, "B t D"], **options) -> tuple[Any, Float[Array, "B t D"]]:
        """One block over the next tokens: ``(state, [B, t, D])``."""
        self._check(x, None)
        state, found = self.attention.step(state, x, **options)
        return state, self._feed(x + found.astype(x.dtype))

    def _feed(self, x):
        kernel = self.kernel[...]
        if self.ffn_norm == "weight":
            square = jnp.sum(kernel**2, axis=0)
            kernel = kernel * (self.gain[...] * jax.lax.rsqrt(jnp.where(square > 0, square, 1)))
        elif self.ffn_norm == "spectral":
            kernel = kernel / jnp.linalg.norm(kernel, ord=2)
        change = (rows(x) @ kernel.astype(x.dtype)).reshape(x.shape)
        return x + change if self.beta is None else (self.beta[...] * x + change / self.alpha[...]).astype(x.dtype)

    def _check(self, x, context):
        check_sequence("x", x, self.features)
        if context is not None:
            raise ValueError("context: expected None, the block reads no other sequence")
