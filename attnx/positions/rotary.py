"""Rotary position embedding: what changes is the angle between a query and a key.

Source: Jianlin Su, Yu Lu, Shengfeng Pan, Ahmed Murtadha, Bo Wen, Yunfeng Liu, "RoFormer: Enhanced Transformer with Rotary
Position Embedding", 2021, arXiv:2104.09864.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "*B T"] | None = None, *, base: float = 10000.0,
           rotary_size: int | None = None, interleaved: bool = False) -> Float[Array, "B T N H"]:
    """Rotates pairs of channels by an angle proportional to the position, so that scores depend on differences of positions.

    Channel pair m of the first ``rotary_size = R`` channels, at position p, becomes

        (a, b) -> (a cos t - b sin t, b cos t + a sin t),      t = p * base^(-2m / R),      m = 0 .. R/2 - 1

    The remaining channels pass unchanged. Costs O(T N H). Angles are float32 (float64 for float64 input), hence exact to about
    6e-8 * p radians.

    Args:
      x: [B, T, N, H], queries or keys.
      positions: [T] or [B, T] positions, or None for 0 .. T-1.
      base: the wavelengths are 2 pi base^(2m / R); larger bases reach further.
      rotary_size: R, how many leading channels of each head turn; an even number, by default H.
      interleaved: pair channels (2m, 2m + 1), as the paper and GPT-J, rather than (m, m + R/2), as GPT-NeoX and Llama.

    Returns:
      The shape and dtype of ``x``.

    Raises:
      ValueError: for an odd or too large ``rotary_size``, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> q, k = jnp.ones((1, 6, 1, 8)), jnp.ones((1, 6, 1, 8))
      >>> s = jnp.einsum('btnh,bsnh->bnts', rotary(q), rotary(k))[0, 0]
      >>> bool(jnp.allclose(s[3, 1], s[5, 3], atol=1e-5))
      True
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected shape [B, T, N, H], got {x.shape}")
    size = x.shape[-1] if rotary_size is None else rotary_size
    if size % 2 or not 0 <= size <= x.shape[-1]:
        raise ValueError(f"rotary_size: expected an even number of at most H = {x.shape[-1]} channels, got {size}")
    if positions is None:
        positions = jnp.arange(x.shape[1])
    elif positions.shape not in (x.shape[1:2], x.shape[:2], (1, x.shape[1])):
        raise ValueError(f"positions: expected shape [T] or [B, T] with B, T = {x.shape[:2]} as in x, got {positions.shape}")
    if size == 0:
        return x
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = jnp.asarray(base ** (-np.arange(0, size, 2) / size), dtype)
    angle = (positions.astype(dtype)[..., None] * frequency)[..., None, :]  # [(B,) T, 1, R/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turning, still = x[..., :size], x[..., size:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = jnp.split(turning, 2, axis=-1)
    halves = (a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)
    if interleaved:
        return jnp.concatenate([jnp.stack(halves, axis=-1).reshape(turning.shape), still], axis=-1)
    return jnp.concatenate([*halves, still], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """:func:`rotary` with fixed settings, as a query-key transform: what ``attnx.nn.Attention(position=...)`` takes.

    Such a transform is any callable ``(query, key, query_positions, key_positions) -> (query, key)``, positions being [T] or
    [B, T] or None for 0 .. T-1.

    Example:
      >>> import jax.numpy as jnp
      >>> q = k = jnp.ones((1, 6, 2, 8))
      >>> turned, _ = Rotary(base=500.0, fraction=0.5)(q, k)
      >>> bool((turned[..., 4:] == q[..., 4:]).all())
      True
    """

    base: float = 10000.0
    """The wavelengths are ``2 pi base^(2m / R)``."""
    fraction: float = 1.0
    """The share of each head's channels that turns (rounded down to an even number)."""
    interleaved: bool = False
    """Pair channels (2m, 2m + 1) rather than (m, m + R/2)."""

    def __call__(self, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], query_positions: Int[Array, "*B T"] | None = None,
                 key_positions: Int[Array, "*B S"] | None = None) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
        """Turns query [B, T, N, H] and key [B, S, K, H] by their positions."""
        size = int(query.shape[-1] * self.fraction) // 2 * 2
        turn = functools.partial(rotary, base=self.base, rotary_size=size, interleaved=self.interleaved)
        return turn(query, query_positions), turn(key, key_positions)
