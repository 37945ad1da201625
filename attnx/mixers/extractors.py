"""Extractors: a token's past is summed with weights that do not depend on what it holds, and the sum is adjusted by the token.

Chen: "Attention Is Not All You Need Anymore" (2023, arXiv 2308.07661). With r = t - i + 1 the lag of token i (or r = i, its place),

    y_t = e_t * (x_t A),         e_t = sum over i <= t of    x_i W_r            SHE, a matrix for each r
                                                             (x_i W_0) * w_r    HE, a vector for each r
                                                             w_r (x_i W_0)      WE, a number for each r
                                                             w_r x_i            ME

so there are no heads, no queries, keys or softmax; without the product with x_t A it would be linear. By lag it is a convolution, which sees L tokens and does not care
where a sequence begins; by place a running sum of constant state. The abstract alone says how the four divide into matrix, vector and number, by
their names and the order of their costs; a public port of SHE indexes by place and divides by sqrt(t).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.core.convolve import convolution, ema
from attnx.nn.common import check_sequence, refuse

KINDS = {"SHE": (3, False), "HE": (2, True), "WE": (1, True), "ME": (1, False)}  # axes of the weights, and whether W_0 goes before them
SHORT = 16  # lags or tokens up to which matrices are multiplied one lag after another


class ExtractorParams(NamedTuple):
    """Parameters of an extractor.

    Attributes:
      weights: by lag or place, [L, D, D] (SHE), [L, D] (HE) or [L] (WE, ME).
      adjustment: A, [D, D].
      mixing: W_0, [D, D] (HE, WE); None for SHE and ME.
    """

    weights: Float[Array, "..."]
    adjustment: Float[Array, "D D"]
    mixing: Float[Array, "D D"] | None = None


def extractor_she(x: Float[Array, "B T D"], params: ExtractorParams, *, index: Literal["relative", "absolute"] = "relative", scale: str | None = None,
                  positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, implementation: str | None = None
                  ) -> Float[Array, "B T D"]:
    """The super high-performance extractor: ``y_t = (x_t A) * sum over i <= t of x_i W_r``.

    Args:
      x: [B, T, D].
      params: weights W [L, D, D], adjustment A [D, D].
      index: what r is: 'relative', the lag t - i, or 'absolute', the position i; both from 0. Tokens whose r is L or more count for nothing.
      scale: 'rsqrt_count' divides the sum by the square root of the number of its terms; None does not.
      positions: int32 [T] or [B, T], logical positions; -1 is padding, which is not summed and whose output is zero. They are the places of index='absolute'
        (positions that differ between rows cost memory O(B T D^2) there), and lags are counted between the tokens as they stand. 0, 1, 2, ... by default.
      segment_ids: int32 [B, T], documents that are summed apart.
      implementation: of index='relative': 'direct', lag after lag, or 'fft', which takes no segment_ids; None chooses.

    Returns:
      [B, T, D] in the dtype of x, summed in at least float32.

    Raises:
      ValueError: shapes that do not fit, or an option that does not exist. NotImplementedError: what 'fft' cannot do.

    Cost: relative O(T L D^2) time 'direct', O((T + L) D^2) and the transforms of W by 'fft'; absolute O(T D^2); L D^2 parameters.

    >>> x = jnp.ones((1, 4, 1))
    >>> extractor_she(x, ExtractorParams(jnp.array([1.0, 10.0]).reshape(2, 1, 1), jnp.ones((1, 1))))[0, :, 0]
    Array([ 1., 11., 11., 11.], dtype=float32)
    """
    return _extractor("SHE", x, params, index, scale, positions, segment_ids, implementation)


def extractor_he(x: Float[Array, "B T D"], params: ExtractorParams, *, index: Literal["relative", "absolute"] = "relative", scale: str | None = None,
                 positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, implementation: str | None = None
                 ) -> Float[Array, "B T D"]:
    """The high-performance extractor: ``y_t = (x_t A) * sum over i <= t of (x_i W_0) * w_r``.

    Args:
      x: [B, T, D].
      params: weights w [L, D], adjustment A and mixing W_0 [D, D].
      index, scale, positions, segment_ids, implementation, returns, errors: as in :func:`extractor_she`; positions cost no memory.

    Cost: O(T D^2) and, relative, O(T L D) time 'direct', O((T + L) log(T + L) D) by 'fft'; absolute O(T D).

    >>> x, one = jnp.ones((1, 4, 1)), jnp.ones((1, 1))
    >>> extractor_he(x, ExtractorParams(jnp.array([[1.0], [10.0]]), one, one), index="absolute")[0, :, 0]
    Array([ 1., 11., 11., 11.], dtype=float32)
    """
    return _extractor("HE", x, params, index, scale, positions, segment_ids, implementation)


def extractor_we(x: Float[Array, "B T D"], params: ExtractorParams, *, index: Literal["relative", "absolute"] = "relative", scale: str | None = None,
                 positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, implementation: str | None = None
                 ) -> Float[Array, "B T D"]:
    """The worthwhile extractor: ``y_t = (x_t A) * sum over i <= t of w_r (x_i W_0)``.

    Args:
      x: [B, T, D].
      params: weights w [L], adjustment A and mixing W_0 [D, D].
      index, scale, positions, segment_ids, implementation, returns, errors, cost: as in :func:`extractor_he`.

    >>> x, one = jnp.ones((1, 3, 1)), jnp.ones((1, 1))
    >>> extractor_we(x, ExtractorParams(jnp.array([1.0, 10.0]), one, 2 * one))[0, :, 0]
    Array([ 2., 22., 22.], dtype=float32)
    """
    return _extractor("WE", x, params, index, scale, positions, segment_ids, implementation)


def extractor_me(x: Float[Array, "B T D"], params: ExtractorParams, *, index: Literal["relative", "absolute"] = "relative", scale: str | None = None,
                 positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, implementation: str | None = None
                 ) -> Float[Array, "B T D"]:
    """The minimalist extractor: ``y_t = (x_t A) * sum over i <= t of w_r x_i``.

    Args:
      x: [B, T, D].
      params: weights w [L], adjustment A [D, D].
      index, scale, positions, segment_ids, implementation, returns, errors, cost: as in :func:`extractor_he`.

    >>> x, one = jnp.ones((1, 3, 1)), jnp.ones((1, 1))
    >>> extractor_me(x, ExtractorParams(jnp.ones(3), one))[0, :, 0]
    Array([1., 2., 3.], dtype=float32)
    """
    return _extractor("ME", x, params, index, scale, positions, segment_ids, implementation)


def _extractor(kind, x, params, index, scale, positions, segment_ids, implementation):
    _check(kind, x, params, index, scale)
    batch, length, _ = x.shape
    places = jnp.arange(length, dtype=jnp.int32) if positions is None else checks.check_positions("positions", positions, batch, length)
    real = jnp.broadcast_to(places >= 0, (batch, length))[..., None]
    z = jnp.where(real, _mixed(x, params), 0)
    ones = real.astype(z.dtype)
    if index == "relative":
        gathered = _convolve(z, params.weights, segment_ids=segment_ids, implementation=implementation)
        count = lambda: convolution(ones, jnp.ones((len(params.weights), 1), z.dtype), segment_ids=segment_ids)
    else:
        gathered = _running(_weighted(z, params.weights, places), segment_ids)
        count = lambda: _running(jnp.where((places < len(params.weights))[..., None], ones, 0), segment_ids)
    return _adjusted(x, gathered, params, count if scale else None)


def _check(kind, x, params, index, scale):
    checks.check_choice("index", index, ("relative", "absolute"))
    checks.check_choice("scale", scale, ("rsqrt_count",))
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected real numbers of shape [B, T, D], got {checks.describe(x)}")
    features, (axes, mixes) = x.shape[2], KINDS[kind]
    if params.weights.ndim != axes or params.weights.shape[1:] != (features,) * (axes - 1) or not params.weights.shape[0]:
        raise ValueError(f"params.weights: expected shape {['L', *(features,) * (axes - 1)]} for {kind}, got {checks.describe(params.weights)}")
    for name, given, wanted in (("adjustment", params.adjustment, True), ("mixing", params.mixing, mixes)):
        if wanted and (given is None or given.shape != (features, features)) or not wanted and given is not None:
            raise ValueError(f"params.{name}: expected {f'shape {[features, features]}' if wanted else 'None'} for {kind}, got {checks.describe(given)}")


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _project(x, kernel):
    return jnp.einsum("...td,de->...te", x, kernel, preferred_element_type=_wide(x))


def _mixed(x, params):
    return x.astype(_wide(x)) if params.mixing is None else _project(x, params.mixing)


def _adjusted(x, gathered, params, count):
    if count is not None:
        gathered = gathered * jax.lax.rsqrt(jnp.maximum(count(), 1))
    return (gathered * _project(x, params.adjustment)).astype(x.dtype)


def _weighted(z, weights, places):
    """Each token's summand by its place, zero beyond the weights."""
    chosen = weights.astype(z.dtype).at[jnp.where(places < 0, len(weights), places)].get(mode="fill", fill_value=0)
    if weights.ndim == 3:
        return jnp.einsum("btd,btde->bte" if places.ndim == 2 else "btd,tde->bte", z, chosen)
    return z * (chosen[..., None] if weights.ndim == 1 else chosen)


def _running(u, segment_ids=None):
    """The sum so far."""
    return jnp.cumsum(u, axis=1) if segment_ids is None else ema(u, 1.0, 1.0, 1.0, segment_ids=segment_ids)


def _convolve(z, weights, *, history=None, segment_ids=None, implementation=None):
    """The sum over lags."""
    if weights.ndim < 3:
        kernel = weights[:, None] if weights.ndim == 1 else weights
        return convolution(z, kernel, history=history, segment_ids=segment_ids, implementation=implementation)
    checks.check_choice("implementation", implementation, ("direct", "fft"))
    if implementation == "fft" and segment_ids is not None:
        raise NotImplementedError("implementation: 'fft' mixes all segments; segment_ids need 'direct'")
    length, past = z.shape[1], 0 if history is None else history.shape[1]
    weights = weights[:length + past].astype(z.dtype)
    reach = len(weights) - 1
    if implementation == "fft" or implementation is None and segment_ids is None and min(length, reach) > SHORT:
        seen = z if history is None else jnp.concatenate([history, z], axis=1)
        size = 1 << (length + past + reach - 1).bit_length()
        product = jnp.einsum("bfd,fde->bfe", jnp.fft.rfft(seen, size, axis=1), jnp.fft.rfft(weights, size, axis=0), precision=jax.lax.Precision.HIGHEST)
        return jnp.fft.irfft(product, size, axis=1)[:, past:past + length]
    before = jnp.zeros((z.shape[0], reach, z.shape[2]), z.dtype) if history is None else history[:, past - reach:]
    seen = jnp.concatenate([before, z], axis=1)
    ids = None if segment_ids is None else jnp.pad(jnp.broadcast_to(segment_ids, z.shape[:2]), ((0, 0), (reach, 0)))

    def add(y, at):
        lag, kernel = at
        part = jax.lax.dynamic_slice_in_dim(seen, reach - lag, length, axis=1)
        if ids is not None:
            part = jnp.where((jax.lax.dynamic_slice_in_dim(ids, reach - lag, length, axis=1) == segment_ids)[..., None], part, 0)
        return y + part @ kernel, None

    return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), z @ weights[0], (jnp.arange(1, reach + 1), weights[1:]))[0]


# Streaming ----------------------------------------------------------------------------------------------------------


class ExtractorState(NamedTuple):
    """The position of the next token; and the last L - 1 tokens [B, L - 1, D] times W_0, or the sum so far [B, 1, D]."""

    position: Int[Array, ""]
    memory: Float[Array, "B M D"]


def extractor_init(params: ExtractorParams, batch: int, *, index: Literal["relative", "absolute"] = "relative", dtype=jnp.float32) -> ExtractorState:
    """The state before the first token: of constant size, L - 1 tokens by lag and one sum by place.

    >>> params = ExtractorParams(jnp.ones(5), jnp.ones((3, 3)))
    >>> extractor_init(params, 2).memory.shape, extractor_init(params, 2, index="absolute").memory.shape
    ((2, 4, 3), (2, 1, 3))
    """
    slots = len(params.weights) - 1 if index == "relative" else 1
    return ExtractorState(jnp.zeros((), jnp.int32), jnp.zeros((batch, slots, len(params.adjustment)), jnp.promote_types(dtype, jnp.float32)))


def extractor_step(state: ExtractorState, x: Float[Array, "B t D"], params: ExtractorParams, *, index: Literal["relative", "absolute"] = "relative",
                   scale: str | None = None) -> tuple[ExtractorState, Float[Array, "B t D"]]:
    """The next t tokens by an extractor of any kind, which the parameters' shapes tell: ``(state, [B, t, D])``, equal to the whole form on everything so far.

    >>> params = ExtractorParams(jnp.ones(2), jnp.ones((1, 1)))
    >>> state, first = extractor_step(extractor_init(params, 1), jnp.ones((1, 1, 1)), params)
    >>> state, last = extractor_step(state, jnp.ones((1, 2, 1)), params)
    >>> last[0, :, 0]
    Array([2., 2.], dtype=float32)
    """
    z = _mixed(x, params)
    places = state.position + jnp.arange(x.shape[1], dtype=jnp.int32)
    if index == "relative":
        gathered = _convolve(z, params.weights, history=state.memory.astype(z.dtype))
        memory = jnp.concatenate([state.memory, z.astype(state.memory.dtype)], axis=1)[:, x.shape[1]:]
    else:
        gathered = state.memory.astype(z.dtype) + _running(_weighted(z, params.weights, places))
        memory = gathered[:, -1:].astype(state.memory.dtype)
    count = lambda: jnp.minimum(places + 1, len(params.weights)).astype(z.dtype)[:, None]
    return ExtractorState(state.position + x.shape[1], memory), _adjusted(x, gathered, params, count if scale else None)


class Extractor(nnx.Module):
    """An extractor with its parameters, called like :class:`attnx.nn.Attention`.

    Args:
      features: D.
      length: L, how many lags or places are told apart: as a rule the length that is trained on.
      kind: 'SHE', 'HE', 'WE' or 'ME'.
      index, scale, implementation: as in :func:`extractor_she`.
      param_dtype: of the parameters.
      rngs: the generator of initial values: matrices of variance 1 / D, vectors and numbers of variance 1 / L.

    >>> layer = Extractor(8, 6, kind="HE", rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 9, 8))
    >>> state, first = layer.step(layer.init_state(1, 9), x[:, :4])
    >>> state, last = layer.step(state, x[:, 4:])
    >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), layer(x), atol=1e-5))
    True
    """

    def __init__(self, features: int, length: int, *, kind: str = "SHE", index: Literal["relative", "absolute"] = "relative", scale: str | None = None,
                 implementation: str | None = None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        checks.check_choice("index", index, ("relative", "absolute"))
        checks.check_choice("scale", scale, ("rsqrt_count",))
        length = checks.check_integer("length", length, least=1)
        self.features, self.kind, self.index, self.scale, self.implementation = features, kind, index, scale, implementation
        axes, mixes = KINDS[kind]
        matrix, matrices = nnx.initializers.lecun_normal(), nnx.initializers.lecun_normal(batch_axis=0)
        shape = (length, *(features,) * (axes - 1))
        weights = matrices if axes == 3 else nnx.initializers.normal(length**-0.5)
        self.weights = nnx.Param(weights(rngs.params(), shape, param_dtype))
        self.adjustment = nnx.Param(matrix(rngs.params(), (features, features), param_dtype))
        self.mixing = nnx.Param(matrix(rngs.params(), (features, features), param_dtype)) if mixes else nnx.data(None)

    @property
    def params(self) -> ExtractorParams:
        """Its parameters as arrays."""
        return ExtractorParams(self.weights[...], self.adjustment[...], None if self.mixing is None else self.mixing[...])

    def __call__(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                 dropout_key=None, hooks=None, layer=0) -> Float[Array, "B T D"]:
        """[B, T, D] to the same; positions and segment_ids as in :func:`extractor_she`. There is no dropout and there are no scores to hook."""
        check_sequence("x", x, self.features)
        refuse("an extractor has no queries, keys and scores", hooks=hooks)
        return _extractor(self.kind, x, self.params, self.index, self.scale, positions, segment_ids, self.implementation)

    def init_state(self, batch: int, max_length: int, *, dtype=None) -> ExtractorState:
        """The state before the first token, see :func:`extractor_init`."""
        return extractor_init(self.params, batch, index=self.index, dtype=dtype or self.weights.dtype)

    def step(self, state: ExtractorState, x: Float[Array, "B t D"], *, hooks=None, layer=0) -> tuple[ExtractorState, Float[Array, "B t D"]]:
        """The next t tokens: ``(state, [B, t, D])``."""
        check_sequence("x", x, self.features)
        refuse("an extractor has no queries, keys and scores", hooks=hooks)
        return extractor_step(state, x, self.params, index=self.index, scale=self.scale)
