"""Selective self-attention: a temperature for each query, and a scale for each value, that depend on the token and on how many it can attend to.

Zhang, Chang, Li, Roy-Chowdhury, Chen, Oymak: "Selective Attention: Enhancing Transformer through Principled Context Control" (NeurIPS 2024, arXiv 2411.12892):

    s_ij = tau_i q_i . k_j / sqrt(H),        out_i = sum over j of softmax_j(s)_ij  tau'_j v_j
    tau_i  = 1 + c log n_i + tanh f(q_i),    n_i the number of keys that query i sees
    tau'_j = 1 + tanh f'(v_j)

Standard attention treats all queries alike, so that its weights spread thin as the context grows; here log n_i counters that, and a token decides by itself how
sharply to look and how much to say. f is a two-layer perceptron of the head's own query (or value) vector, shared by the heads of a layer and zero at the
start; c is one learned number a layer, small at the start. The paper leaves the hidden size, the input and the start of f open: here they are H / 4, the
projected vector before any positions, and zero, so that a layer starts as plain attention but for c. New parameters are far below 0.5% of a block's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.core.attention import attention
from attnx.core.halves import visible_counts
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.mechanism import Pairs, pairs
from attnx.nn.attention import Attention
from attnx.nn.frozen import release
from pallas_kernels.parts import Mask, Score, Softmax, part, static

FORMS = {"exp": 1.5, "linear": 1e-5, "sigmoid": 0.0}  # with the beta at which training starts


def position_temperature(beta, counts, *, form: str = "exp"):
    """The temperature of a query that sees n keys, ``1 + c(beta) log n``.

    Args:
      beta: learned, a number or real [N]: one a head.
      counts: n, numbers [..., N or 1], see :func:`attnx.core.halves.visible_counts`; 0 counts as 1.
      form: ``c = e^(-e^beta)`` ("exp", what the released code trains, from beta = 1.5, or 2.0 when fine-tuning), ``beta`` ("linear", there too, from 1e-5) or
        ``sigmoid(beta)`` ("sigmoid", as printed, from 0).

    Returns:
      [..., N or 1], at least float32; 1 where there is one key.

    Raises:
      ValueError: for another form.

    >>> [f"{x:.2f}" for x in position_temperature(0.0, jnp.array([1, 10]), form="sigmoid")]
    ['1.00', '2.15']
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(map(repr, FORMS))}, got {form!r}")
    beta = checks.check_real("beta", beta, ranks=(0, 1))
    beta = beta.astype(jnp.promote_types(beta.dtype, jnp.float32))
    coefficient = {"exp": lambda: jnp.exp(-jnp.exp(beta)), "linear": lambda: beta, "sigmoid": lambda: jax.nn.sigmoid(beta)}[form]()
    return 1 + coefficient * jnp.log(jnp.maximum(jnp.asarray(counts), 1).astype(beta.dtype))


def token_temperature(x: Float[Array, "... H"], w1: Float[Array, "H R"], b1: Float[Array, " R"], w2: Float[Array, " R"], b2: Float[Array, ""]) -> Float[Array, "..."]:
    """``tanh(w2 . gelu(x W1 + b1) + b2)``: what a token adds to the temperature, in (-1, 1).

    Args:
      x: [..., H], the vectors of tokens (and heads).
      w1, b1: [H, R] and [R].
      w2, b2: [R] and [].

    Returns:
      [...], at least float32.

    >>> token_temperature(jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.zeros(3), jnp.zeros(3), jnp.zeros(()))
    Array([0., 0.], dtype=float32)
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    hidden = jax.nn.gelu(jnp.einsum("...h,hr->...r", x, w1, preferred_element_type=wide) + b1)
    return jnp.tanh(hidden @ w2.astype(hidden.dtype) + b2)


def _scaled(name, x, temperature):
    if temperature is None:
        return x
    temperature = checks.check_real(name, temperature, ranks=(3,))
    if any(n not in (1, full) for n, full in zip(temperature.shape, x.shape)):
        raise ValueError(f"{name}: expected an array that broadcasts to {list(x.shape[:3])}, got {checks.describe(temperature)}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) * temperature.astype(wide)[..., None]).astype(x.dtype)


def temperature_scaled_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"],
                                 query_temperature: Float[Array, "B T N"] | None = None, value_temperature: Float[Array, "B S K"] | None = None, *,
                                 key_temperature: Float[Array, "B S K"] | None = None, **options):
    """Softmax attention with a temperature for each query, key and value.

    ::

        out_i = sum over j of  softmax_j(tau_i tau''_j scale q_i . k_j)  tau'_j v_j

    Args:
      query, key, value: as in :func:`attnx.attention`.
      query_temperature: tau [B, T, N] (size 1 broadcasts), which multiplies the scores of a query: 0 makes its weights equal, large numbers choose one key.
      value_temperature: tau' [B, S, K], which multiplies the values: a token with 0 adds nothing, but keeps its share of the weight.
      key_temperature: tau'' [B, S, K], which multiplies the keys. None is 1 for all three.
      **options: mask, scale, scores, positions, implementation, block_sizes, return_residual, hooks, dropout as there.

    Returns:
      [B, T, N, Hv] in the query's dtype, or as there with return_residual.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: that of attention.

    >>> import attnx
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 5, 1, 8))
    >>> bool(jnp.allclose(temperature_scaled_attention(q, k, v, jnp.zeros((1, 5, 1)))[0, 0, 0], v.mean(1)[0, 0], atol=1e-6))
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    query, key = _scaled("query_temperature", query, query_temperature), _scaled("key_temperature", key, key_temperature)
    return attention(query, key, _scaled("value_temperature", value, value_temperature), **options)


@part
class SelectivePairs(Pairs):
    """A mechanism of the pairs engine whose queries have temperatures: it is also handed ``beta`` ([] or [N], see :func:`position_temperature`) and
    ``token`` [B, T, N], what the tokens add; made by :class:`SelectiveSelfAttention`."""

    form: str = static(default="exp")

    def _tempered(self, query, counts, beta, token):
        temperature = 1 if beta is None else position_temperature(beta, counts(), form=self.form)
        temperature = temperature if token is None else temperature + token
        return query if beta is None and token is None else _scaled("token", query, temperature)

    def __call__(self, query, key, value, *, beta=None, token=None, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None, hooks=None):
        def counts():
            mask = self.mask if segment_ids is None else documents(segment_ids) if self.mask is None else self.mask & documents(segment_ids)
            return visible_counts(mask, *query.shape[:2], key.shape[1], heads=query.shape[2], query_positions=query_positions, key_positions=key_positions)

        return super().__call__(self._tempered(query, counts, beta, token), key, value, query_positions=query_positions, key_positions=key_positions,
                                segment_ids=segment_ids, dropout_key=dropout_key, hooks=hooks)

    def step(self, state, query, key, value, *, beta=None, token=None, hooks=None):
        def counts():
            new = state.next + jnp.arange(query.shape[1], dtype=jnp.int32)
            known = jnp.concatenate([state.positions, new])
            return visible_counts(self.mask, *query.shape[:2], known.size, heads=query.shape[2], query_positions=new, key_positions=known)

        return super().step(state, self._tempered(query, counts, beta, token), key, value, hooks=hooks)


class TokenTemperature(nnx.Module):
    """:func:`token_temperature` with its parameters, 0 for all tokens at the start.

    Args:
      size: H of the vectors.
      hidden_size: R, by default H / 4 (at least 1).
      param_dtype: of the parameters.
      rngs: the generator of initial values.

    >>> TokenTemperature(8, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 2, 8))).shape
    (1, 3, 2)
    """

    def __init__(self, size: int, hidden_size: int | None = None, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        hidden_size = hidden_size or max(size // 4, 1)
        self.w1 = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, hidden_size), param_dtype))
        self.b1, self.w2, self.b2 = (nnx.Param(jnp.zeros(shape, param_dtype)) for shape in ((hidden_size,), (hidden_size,), ()))

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "..."]:
        """[..., H] to [...]."""
        return token_temperature(x, self.w1[...], self.b1[...], self.w2[...], self.b2[...])


class SelectiveSelfAttention(Attention):
    """Multi-head attention with learned temperatures, by default causal. It decodes from a key-value cache.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all other options but the mechanism.
      query_temp, value_temp, key_temp: whether queries, values and keys have temperatures of their tokens.
      pos_temp: the form of :func:`position_temperature`, or None for none.
      beta: its start; by default as there, from scratch.
      hidden_size: of the perceptrons, see :class:`TokenTemperature`.
      mask, scores, scale, dropout_rate, implementation: as in :func:`attnx.pairs`.

    >>> layer = SelectiveSelfAttention(32, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, query_temp: bool = True, value_temp: bool = True, key_temp: bool = False, pos_temp: str | None = "exp",
                 beta: float | None = None, hidden_size: int | None = None, mask: Mask | None = causal(), scores: Score | tuple[Score, ...] = (),
                 scale: float | None = None, dropout_rate: float = 0.0, implementation: str | None = None, param_dtype=jnp.float32, rngs: nnx.Rngs, **options):
        checks.check_choice("pos_temp", pos_temp, tuple(FORMS))
        plain = pairs(mask=mask, scores=scores, scale=scale, dropout_rate=dropout_rate, implementation=implementation)
        mechanism = SelectivePairs(**vars(plain), form=pos_temp or "exp")
        super().__init__(features, num_heads, mechanism=mechanism, param_dtype=param_dtype, rngs=rngs, **options)

        def temperature(wanted, size):
            return TokenTemperature(size, hidden_size, param_dtype=param_dtype, rngs=rngs) if wanted else nnx.data(None)

        self.query_temperature, self.key_temperature = temperature(query_temp, self.head_size), temperature(key_temp, self.head_size)
        self.value_temperature = temperature(value_temp, self.value_size)
        start = None if pos_temp is None else FORMS[pos_temp] if beta is None else beta
        self.beta = nnx.data(None) if start is None else nnx.Param(jnp.asarray(start, param_dtype))

    @classmethod
    def from_attention(cls, layer: Attention, *, beta: float | None = 2.0, rngs: nnx.Rngs, **options) -> "SelectiveSelfAttention":
        """A layer that starts from another's projections, norms and positions, which it shares, to be fine-tuned.

        Args:
          layer: whose mechanism is :func:`attnx.pairs` with plain softmax weights.
          beta: its start; 2.0 makes the temperature of a query that sees a thousand keys 1.004.
          **options: query_temp, value_temp, key_temp, pos_temp, hidden_size as for the class.
          rngs: the generator of initial values.

        Raises:
          TypeError: for a layer with another mechanism.

        >>> import attnx
        >>> layer = Attention(16, 2, mechanism=attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0))
        >>> SelectiveSelfAttention.from_attention(layer, rngs=nnx.Rngs(1)).query is layer.query
        True
        """
        mechanism: Any = release(layer.mechanism)
        if type(mechanism) is not Pairs or mechanism.weights != Softmax():
            raise TypeError(f"layer: expected a mechanism attnx.pairs(...) with softmax weights, got {checks.describe(mechanism)}")
        new = cls(layer.features, layer.num_heads, head_size=layer.head_size, value_size=layer.value_size, num_kv_heads=layer.num_kv_heads,
                  context_features=layer.context_features, mask=mechanism.mask, scores=mechanism.scores, scale=mechanism.scale,
                  dropout_rate=mechanism.dropout_rate, implementation=mechanism.implementation, dtype=layer.dtype, beta=beta, rngs=rngs, **options)
        for name in ("query", "key", "value", "out", "query_norm", "key_norm", "output_norm", "gate", "position"):
            taken = getattr(layer, name)
            setattr(new, name, nnx.data(taken) if taken is None else taken)
        return new

    def extras(self, x):
        token = None if self.query_temperature is None else self.query_temperature(self._query(x))
        return {"beta": None if self.beta is None else self.beta[...], "token": token}

    def _key_value(self, context):
        key, value = super()._key_value(context)
        if self.key_temperature is not None:
            key = _scaled("key", key, 1 + self.key_temperature(key))
        if self.value_temperature is not None:
            value = _scaled("value", value, 1 + self.value_temperature(value))
        return key, value
