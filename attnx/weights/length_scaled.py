"""Length-scaled softplus attention and its re-weighting: weights that stay sharp on sequences longer than those of training.

Gao, Spratling, Gionfrida: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models" (ICML 2026, arXiv 2501.13428).
With queries and keys of length 1 and n_i the number of keys that query i sees:

    LSSA:    a_ij = softplus(log H log n_i  q_i . k_j) / sum over j of the same
    LSSAR:   w_ij = relu(n_i a_ij - o_i)^p / sum over j of the same,      o_i = 1, or 0 where n_i is at most 3

What makes softmax work, says the paper, is less the exponential than the division by the row's sum, so another positive map may stand in its place; and the power of
what a weight has above the uniform level 1 / n_i undoes the dilution that longer rows bring. Rows that see at most 3 keys keep all of them, so that none
is left empty; a later row all of whose weights are equal keeps these (the plain formula has 0 / 0 there). The power is taken of the ratio to the row's
largest, which changes nothing and cannot overflow.

As row statistics: the row's largest score and its number of keys (one pass), for the re-weighting the row's sum (another), and the pass over the values, which also
finds what they are to be divided by. So it runs in every execution of the pairs engine, and n_i is the number of keys that are really seen: under any mask, with
padding and in a cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.core.attention import attention
from attnx.masks.causal import causal
from attnx.mechanism import pairs
from attnx.nn.attention import Attention
from attnx.positions.rotary import Rotary
from pallas_kernels.parts import Extent, Mask, Sum, Weights, part, static

BASES: dict[str, Callable] = {
    "softplus": lambda x: jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))), "exp": jnp.exp, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x))}


def _positive(base, length_scaled, s, top, count):
    """The positive map of a score, times its length scale; that of exp over that of the row's largest."""
    scale = jnp.log(jnp.maximum(count, 1)) if length_scaled else 1.0
    return BASES[base]((s - top) * scale if base == "exp" else s * scale)


def _summand(base, length_scaled, s, earlier):
    return _positive(base, length_scaled, s, *earlier)


def _itself(total, earlier):
    return total


@functools.cache
def _total(base, length_scaled):
    return Sum(functools.partial(_summand, base, length_scaled), _itself)


def _sharpen(level, top, count, power, offset, free_rows):
    """``relu(n a - o)^power`` over that of the row's largest ``top``; the level ``n a`` itself where none lies above o by more than rounding."""
    offset = jnp.where(count <= free_rows, 0, offset)
    some = top - offset > 64 * jnp.finfo(level.dtype).eps
    ratio = jax.nn.relu(level - offset) / jnp.where(some, top - offset, 1)
    return jnp.where(some, ratio**power, level)


@part
class LengthScaled(Weights):
    """See :func:`lssa`."""

    base: str = static(default="softplus")
    power: float | None = static(default=None)
    offset: float = static(default=1.0)
    free_rows: int = static(default=3)
    length_scaled: bool = static(default=True)
    normalize: bool = static(default=True)

    @property
    def normalized(self):
        return self.normalize

    @property
    def statistics(self):
        extents = (Extent.MAXIMUM, Extent.COUNT)
        return extents if self.power is None else (*extents, _total(self.base, self.length_scaled))

    def weight(self, s, statistics):
        top, count, *total = statistics
        positive = functools.partial(_positive, self.base, self.length_scaled, top=top if self.normalize else 0, count=count)
        w = positive(s)
        if not self.normalize:
            return w
        each = 1 / jnp.maximum(count, 1)  # so that sums are of the size of values
        if self.power is None:
            return w * each
        share = count / jnp.where(total[0] > 0, total[0], 1)
        return each * _sharpen(w * share, positive(top) * share, count, self.power, self.offset, self.free_rows)


def lssa(base: str = "softplus", *, power: float | None = None, offset: float = 1.0, free_rows: int = 3, length_scaled: bool = True,
         normalize: bool = True) -> Weights:
    """Weights by a positive map of the length-scaled scores, divided by their sum, and sharpened if a power is given.

    ::

        a_ij = base(log n_i s_ij) / sum over j of the same,       w_ij = relu(n_i a_ij - o_i)^power / sum over j of the same

    Args:
      base: "softplus", "exp" (softmax), "sigmoid", "relu" or "relu2".
      power: p of the re-weighting, at least 1, or None for none: 15 to extrapolate, 3 for the best quality within the length of training. Large ones tend to
        the largest score alone.
      offset: o_i, in units of the uniform weight.
      free_rows: rows that see at most so many keys have o_i = 0.
      length_scaled: whether scores are multiplied by log n_i, n_i the number of visible keys.
      normalize: whether weights are divided by their sum; without it there is no re-weighting.

    The scores are meant to be ``log H q_i . k_j`` of vectors of length 1: see :func:`lssar_attention`. A row that sees one key finds its value, but with
    "relu" and "relu2" nothing, log 1 being 0.

    Raises:
      ValueError, TypeError: an option of a wrong kind, named.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.array([1.0, 0.5, 0.0, -1.0]).reshape(1, 4, 1, 1)
    >>> for weights in (lssa(), lssa(power=3)):
    ...     print([f"{x:.2f}" for x in attnx.attention_weights(q, k, weights=weights)[0, 0, 0]])
    ['0.44', '0.30', '0.19', '0.06']
    ['0.98', '0.02', '0.00', '0.00']
    """
    if base not in BASES:
        raise ValueError(f"base: expected one of {', '.join(map(repr, BASES))}, got {base!r}")
    return LengthScaled(base, *_check_sharpening(power, offset, free_rows, normalize), bool(length_scaled), bool(normalize))


def _check_sharpening(power, offset, free_rows, normalize=True):
    if power is not None:
        if isinstance(power, bool) or not isinstance(power, (int, float)):
            raise TypeError(f"power: expected a static number or None, got {checks.describe(power)}")
        if power < 1 or not normalize:
            raise ValueError(f"power: expected a number of at least 1, of weights that are normalized, got power={power}, normalize={normalize}")
        power = int(power) if power == int(power) else float(power)
    if isinstance(offset, bool) or not isinstance(offset, (int, float)):
        raise TypeError(f"offset: expected a static number, got {checks.describe(offset)}")
    return power, float(offset), checks.check_integer("free_rows", free_rows, least=0)


def reweight(weights: Float[Array, "... T S"], counts, power: float = 15, *, offset: float = 1.0, free_rows: int = 3) -> Float[Array, "... T S"]:
    """The re-weighting alone, of given weights.

    ::

        w_ij = relu(n_i a_ij - o_i)^power / sum over j of the same

    Args:
      weights: a [..., T, S], at least 0, the sum of a row 1; 0 where nothing may be seen.
      counts: n_i, numbers that broadcast to [..., T]: how many keys a row sees (of a causal mask 1, 2, 3, ...).
      power, offset, free_rows: as in :func:`lssa`.

    Returns:
      [..., T, S] in the dtype of the weights, at least float32: larger weights stay larger, and of rows that are not free those remain that are above
      ``offset / n_i``. Rows of zeros stay.

    >>> import jax.numpy as jnp
    >>> [f"{x:.2f}" for x in reweight(jnp.array([0.4, 0.3, 0.2, 0.1])[None], 4, power=2)[0]]
    ['0.90', '0.10', '0.00', '0.00']
    """
    weights = checks.check_real("weights", weights)
    power, offset, free_rows = _check_sharpening(power, offset, free_rows)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    count = jnp.asarray(counts, weights.dtype)[..., None]
    level = count * weights
    top = jax.lax.stop_gradient(jnp.max(level, axis=-1, keepdims=True))
    w = _sharpen(level, top, count, power, offset, free_rows)
    total = jnp.sum(w, axis=-1, keepdims=True)
    return w / jnp.where(total > 0, total, 1)


def _unit(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.where(square > 0, square, 1))).astype(x.dtype)


def _scale(size, unit):
    return math.log(max(size, 1)) / (1 if unit else math.sqrt(max(size, 1)))


def lssar_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *, power: float | None = 15,
                    base: str = "softplus", offset: float = 1.0, free_rows: int = 3, length_scaled: bool = True, unit: bool = True, **options):
    """Attention with :func:`lssa` weights of queries and keys of length 1.

    ::

        s_ij = log H  q_i / |q_i| . k_j / |k_j|,      out_i = sum over j of w_ij v_j

    Args:
      query, key, value: as in :func:`attnx.attention`, positions already in them.
      power, base, offset, free_rows, length_scaled: as in :func:`lssa`; ``power=None`` is LSSA.
      unit: whether queries and keys are divided by their lengths; otherwise ``s_ij = log H q_i . k_j / sqrt(H)``, as in the paper's first version.
      **options: mask, scores, scale, query_positions, key_positions, implementation, block_sizes, dropout as there; ``scale`` in place of ``log H``.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(T S) time, as attention and one pass over the scores without values, two with a power; O(T + S) memory.

    >>> import attnx, jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> lssar_attention(q, k, v, mask=attnx.masks.causal()).shape
    (1, 6, 2, 8)
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    weights = lssa(base, power=power, offset=offset, free_rows=free_rows, length_scaled=length_scaled)
    if unit:
        query, key = _unit(query), _unit(key)
    options = {"scale": _scale(query.shape[3], unit)} | options
    return attention(query, key, value, weights=weights, **options)


@dataclasses.dataclass(frozen=True)
class UnitLength:
    """Queries and keys of length 1 after another transform of positions (or none): what ``attnx.nn.Attention(position=...)`` takes.

    >>> import jax.numpy as jnp
    >>> q, k = UnitLength()(3 * jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)), None, None)
    >>> q[0, 0, 0], k[0, 0, 0]
    (Array([0.5, 0.5, 0.5, 0.5], dtype=float32), Array([0., 0., 0., 0.], dtype=float32))
    """

    position: Callable | None = None

    def __call__(self, query, key, query_positions, key_positions):
        if self.position is not None:
            query, key = self.position(query, key, query_positions, key_positions)
        return _unit(query), _unit(key)


class LengthScaledAttention(Attention):
    """Multi-head :func:`lssar_attention`, by default causal with rotary positions. It decodes from a key-value cache.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all other options but the mechanism.
      power, base, offset, free_rows, length_scaled, unit: as in :func:`lssar_attention`.
      mask: which pairs are allowed.
      position: as there, before the division by the length.

    >>> layer = LengthScaledAttention(32, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, power: float | None = 15, base: str = "softplus", offset: float = 1.0, free_rows: int = 3,
                 length_scaled: bool = True, unit: bool = True, mask: Mask | None = causal(), position: Callable | None = Rotary(), head_size: int | None = None,
                 dropout_rate: float = 0.0, implementation: str | None = None, rngs: nnx.Rngs, **options):
        weights = lssa(base, power=power, offset=offset, free_rows=free_rows, length_scaled=length_scaled)
        mechanism = pairs(mask=mask, weights=weights, scale=_scale(head_size or features // num_heads, unit), dropout_rate=dropout_rate,
                          implementation=implementation)
        super().__init__(features, num_heads, mechanism=mechanism, head_size=head_size, position=UnitLength(position) if unit else position, rngs=rngs,
                         **options)
