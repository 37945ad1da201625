"""Fourier position embedding: channel pairs turned by Fourier series of the position, of the tones that training could hear.

Hua, Jiang, Lv, Zhang, Sun, Fan, Zhu, Qi and others: "Fourier Position Embedding: Enhancing Attention's Periodic Extension for Length Generalization"
(ICML 2025, arXiv 2412.17739). Rotary embedding turns pair m by one tone, base^(-2m / H). Layers mix the tones, and those with less than one period within the
training length are never learned. So here tones below 2 pi / length are dropped, and each of the first M pairs is given a series of the D kept,

    S_m(p) = sum_j W^sin_jm sin(w_j p),      C_m(p) = sum_j W^cos_jm cos(w_j p),      (a, b) -> (a C_m - b S_m, b C_m + a S_m),

whose coefficients are random but for one tone a pair, and not trained. The other pairs do not know the position. Scores are then not functions of the
difference of positions alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.nn.frozen import Constant

PADS = ("zero-phase", "reference")


def fope_frequencies(head_size: int, *, base: float = 10000.0, train_length: int | None) -> tuple[np.ndarray, int]:
    """The tones of rotary embedding that have a whole period within the training length.

    Args:
      head_size: H, even.
      base: tones are ``base^(-2m / H)``, m = 0 .. H/2 - 1.
      train_length: those below ``2 pi / train_length`` are dropped; None keeps all.

    Returns:
      ``(kept [D], falling, float64; how many were dropped)``.

    >>> kept, dropped = fope_frequencies(64, train_length=1024)
    >>> len(kept), dropped
    (18, 14)
    """
    if head_size % 2:
        raise ValueError(f"head_size: expected an even number, got {head_size}")
    tones = base ** (-np.arange(0, head_size, 2) / head_size)
    kept = tones if train_length is None else tones[tones >= 2 * np.pi / train_length]
    return kept, len(tones) - len(kept)


def _spread(tones: int, heads: int | None, columns: int, gain: float) -> float:
    """The standard deviation of random coefficients: Xavier's for [tones, columns] arrays, or [heads, tones, columns] ones."""
    return gain * math.sqrt(2 / (tones + columns if heads is None else (tones + heads) * columns))


def fope_init(key: Array, heads: int | None, tones: int, columns: int, gain: float = 0.3, dtype=jnp.float32) -> Float[Array, "K D M"]:
    """Coefficients of one basis: of pair m the tone ``m ceil(D / M)`` has 1, and all have normal noise besides.

    Args:
      key: a PRNG key; sines and cosines are given their own.
      heads: K, that have coefficients of their own; None for one for all.
      tones: D.
      columns: M, pairs with a series. Those whose dominant tone would lie beyond D have noise only.
      gain: of the noise; 0.3, 0.4 and 0.6 in the paper's models of 60M, 180M and 1.2B parameters.
      dtype: of the result.

    Returns:
      [K or 1, D, M].

    >>> import jax
    >>> fope_init(jax.random.key(0), None, 4, 2, gain=0.0)[0].T.astype(int)
    Array([[1, 0, 0, 0],
           [0, 0, 1, 0]], dtype=int32)
    """
    if not tones or not columns:
        return jnp.zeros((heads or 1, tones, columns), dtype)
    step = -(-tones // columns)
    pairs = np.arange(columns)[np.arange(columns) * step < tones]
    noise = _spread(tones, heads, columns, gain) * jax.random.normal(key, (heads or 1, tones, columns), dtype)
    return noise.at[:, pairs * step, pairs].add(1)


def fope_expand(key: Array, coefficients: Float[Array, "K D M"], tones: int, *, gain: float = 0.3) -> Float[Array, "K E M"]:
    """Coefficients for training on at longer length, at which more tones have a whole period: those of known tones stay, those of new ones are noise.

    Pairs keep their dominant tones, so a model starts close to what it was. The paper does not say how; this is one way.

    Args:
      key: a PRNG key.
      coefficients: [K, D, M], of one basis.
      tones: E, at least D.
      gain: of the noise.

    >>> import jax, jax.numpy as jnp
    >>> fope_expand(jax.random.key(0), jnp.ones((1, 2, 1)), 3, gain=0.0).ravel().tolist()
    [1.0, 1.0, 0.0]
    """
    heads, known, columns = coefficients.shape
    checks.check_integer("tones", tones, least=known)
    if tones == known or not columns:
        return jnp.zeros((heads, tones, columns), coefficients.dtype) if tones > known else coefficients
    noise = _spread(tones, heads, columns, gain) * jax.random.normal(key, (heads, tones - known, columns), coefficients.dtype)
    return jnp.concatenate([coefficients, noise], axis=1)


def fope_tables(positions: Int[Array, "*B T"], frequencies: np.ndarray, sine: Float[Array, "K D M"], cosine: Float[Array, "K D M"], head_size: int, *,
                pad: str = "zero-phase") -> tuple[Float[Array, "*B T K P"], Float[Array, "*B T K P"]]:
    """The series at positions, for P = H / 2 pairs: ``(S, C)``.

    Args:
      positions: integers [T] or [B, T].
      frequencies: [D], see :func:`fope_frequencies`.
      sine, cosine: coefficients [K, D, M], M at most H / 2.
      head_size: H.
      pad: of the pairs without a series: "zero-phase", S = 0 and C = 1, leaves them alone; "reference" sets S = C = 1 as the released code does, which
        turns them by 45 degrees and makes them sqrt(2) longer, so that they count twice in scores.

    Returns:
      Two arrays [T, K, H / 2] or [B, T, K, H / 2], in at least float32. Costs O(T K D M).
    """
    if pad not in PADS:
        raise ValueError(f"pad: expected one of {', '.join(map(repr, PADS))}, got {pad!r}")
    for name, x in (("sine", sine), ("cosine", cosine)):
        if jnp.ndim(x) != 3 or x.shape != sine.shape or x.shape[1] != len(frequencies) or 2 * x.shape[2] > head_size:
            raise ValueError(f"{name}: expected shape [K, {len(frequencies)}, M] with M at most {head_size // 2}, got {checks.describe(x)}")
    dtype = jnp.promote_types(sine.dtype, jnp.float32)
    angle = jnp.asarray(positions).astype(dtype)[..., None] * jnp.asarray(frequencies, dtype)
    series = lambda waves, weights: jnp.einsum("...d,kdm->...km", waves, weights.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    widths = [(0, 0)] * (angle.ndim) + [(0, head_size // 2 - sine.shape[2])]
    fill = lambda x, value: jnp.pad(x, widths, constant_values=value)
    return fill(series(jnp.sin(angle), sine), float(pad == "reference")), fill(series(jnp.cos(angle), cosine), 1.0)


def fope(x: Float[Array, "B T N H"], sine: Float[Array, "*B T K P"], cosine: Float[Array, "*B T K P"]) -> Float[Array, "B T N H"]:
    """Turns (and stretches) channel pairs (m, m + H/2): ``(a, b) -> (a C - b S, b C + a S)``.

    Args:
      x: [B, T, N, H], queries or keys, N a multiple of K.
      sine, cosine: from :func:`fope_tables`.

    Returns:
      The shape and dtype of x.

    Without noise and with a tone for each pair it is :func:`attnx.positions.rotary`:

    >>> import jax, jax.numpy as jnp
    >>> from attnx.positions import rotary
    >>> tones, _ = fope_frequencies(8, train_length=None)
    >>> x, eye = jax.random.normal(jax.random.key(0), (1, 5, 2, 8)), fope_init(jax.random.key(0), None, 4, 4, gain=0.0)
    >>> bool((fope(x, *fope_tables(jnp.arange(5), tones, eye, eye, 8)) == rotary(x)).all())
    True
    """
    if x.ndim != 4 or x.shape[3] != 2 * sine.shape[-1] or x.shape[2] % sine.shape[-2]:
        raise ValueError(f"x: expected shape [B, T, N, {2 * sine.shape[-1]}] with N a multiple of {sine.shape[-2]}, got {checks.describe(x)}")
    if sine.shape != cosine.shape or sine.shape[:-2] not in (x.shape[1:2], x.shape[:2], (1, x.shape[1])):
        raise ValueError(f"sine: expected shape [T, K, P] or [B, T, K, P] with B, T = {x.shape[:2]} as in x, got {checks.describe(sine)}")
    sine, cosine = (jnp.repeat(table, x.shape[2] // table.shape[-2], axis=-2) for table in (sine, cosine))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([(a * cosine - b * sine).astype(x.dtype), (b * cosine + a * sine).astype(x.dtype)], axis=-1)


class FourierPosition(nnx.Module):
    """Fourier position embedding as a query-key transform: what ``attnx.nn.Attention(position=...)`` takes, like :class:`attnx.positions.Rotary`.

    The paper gives all layers the same coefficients: hand them one such module.

    Args:
      heads: K, the number of key-value heads; queries use the coefficients of the key they meet.
      head_size: H.
      train_length: tones without a whole period in it are dropped.
      base: of the tones.
      gain: of the noise.
      columns: M, pairs with a series, by default min(D, H / 4) as in the released code; the paper's own form has M = D.
      separate_heads: whether each head has coefficients of its own.
      separate_basis: whether sines and cosines have.
      learnable: whether coefficients are trained; the paper found it best not to.
      pad: as in :func:`fope_tables`.
      rngs: the generator of the noise.

    >>> import attnx, jax.numpy as jnp
    >>> from attnx.nn import Attention
    >>> place = FourierPosition(2, 16, train_length=64, rngs=nnx.Rngs(0))
    >>> layer = Attention(64, 4, num_kv_heads=2, mechanism=attnx.pairs(), position=place, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 64))).shape
    (1, 10, 64)
    """

    def __init__(self, heads: int, head_size: int, *, train_length: int, base: float = 10000.0, gain: float = 0.3, columns: int | None = None,
                 separate_heads: bool = True, separate_basis: bool = True, learnable: bool = False, pad: str = "zero-phase", rngs: nnx.Rngs):
        kept, _ = fope_frequencies(head_size, base=base, train_length=train_length)
        columns = min(len(kept), head_size // 4) if columns is None else columns
        make = lambda: fope_init(rngs.params(), heads if separate_heads else None, len(kept), columns, gain)
        variable = nnx.Param if learnable else Constant
        self.sine = variable(make())
        self.cosine = variable(make()) if separate_basis else self.sine
        self.head_size, self.base, self.gain, self.pad = head_size, base, gain, pad
        self.frequencies = tuple(kept.tolist())

    def tables(self, positions: Int[Array, "*B T"]) -> tuple[Array, Array]:
        """As :func:`fope_tables`."""
        return fope_tables(positions, np.asarray(self.frequencies), self.sine[...], self.cosine[...], self.head_size, pad=self.pad)

    def expand(self, train_length: int, *, rngs: nnx.Rngs) -> None:
        """Makes ready for training on at a longer length: admits the tones that have a whole period in it, see :func:`fope_expand`."""
        kept, _ = fope_frequencies(self.head_size, base=self.base, train_length=train_length)
        for basis in (self.sine,) if self.cosine is self.sine else (self.sine, self.cosine):
            basis.set_value(fope_expand(rngs.params(), basis[...], len(kept), gain=self.gain))
        self.frequencies = tuple(kept.tolist())

    def __call__(self, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], query_positions: Int[Array, "*B T"] | None = None,
                 key_positions: Int[Array, "*B S"] | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """Turns query [B, T, N, H] and key [B, S, K, H] by their positions."""
        turn = lambda x, positions: fope(x, *self.tables(jnp.arange(x.shape[1]) if positions is None else positions))
        return turn(query, query_positions), turn(key, key_positions)
