"""Attention on the sphere: keys weigh as much as the area they stand for, and neighbourhoods are disks.

Bonev, Rietmann, Paris, Carpentieri, Kurth: "Attention on the Sphere" (2025, arXiv 2505.11157). The integral over the sphere

    y(x) = int exp(q(x) . k(x') / sqrt(H)) v(x') dx' / int exp(q(x) . k(x') / sqrt(H)) dx'

becomes, on a grid of latitudes and longitudes with the quadrature weights w_s, a softmax of scores to which log w_s is added: poles, where points crowd, count no
more than the equator, and what is found hardly depends on how the sphere is turned. The local form integrates over the disk of points within a great-circle
distance; near a pole that is whole rings, so no window of the grid will do.

Grids, of theta from the north pole: 'equiangular' (poles included, Clenshaw-Curtis), 'legendre-gauss' and 'lobatto' (poles included). Longitudes are 2 pi j / L.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnx.core import checks
from attnx.core.attention import attention
from attnx.core.halves import attend_scores
from attnx.nn.attention import Attention
from attnx.scores.bias import bias
from pallas_kernels.parts import Cover, Mask, Operand, part, static

GRIDS = ("equiangular", "legendre-gauss", "lobatto")
RIM = 1e-3  # by which share disks are enlarged, so that points on the rim are inside whatever the rounding

# Grids --------------------------------------------------------------------------------------------------------------


@functools.cache
def sphere_quadrature(latitudes: int, longitudes: int, grid: str = "equiangular") -> tuple[np.ndarray, np.ndarray]:
    """Angles and weights of the latitudes of a grid: ``sum over i, j of w_i f(theta_i, lambda_j)`` is the integral of f over the sphere.

    Args:
      latitudes: how many, at least 2 ('legendre-gauss': 1). The rule is exact in cos(theta) up to the degrees n - 1 ('equiangular'), 2 n - 1 ('legendre-gauss')
        and 2 n - 3 ('lobatto').
      longitudes: how many points a latitude has.
      grid: 'equiangular', 'legendre-gauss' or 'lobatto'.

    Returns:
      ``(theta [latitudes], w [latitudes])`` in float64, theta ascending from the north pole, sum longitudes w = 4 pi.

    Raises:
      ValueError, TypeError: for a grid that does not exist or is too small.

    >>> theta, w = sphere_quadrature(3, 4)
    >>> theta.round(3).tolist(), (w * 4 / (4 * np.pi)).round(3).tolist()
    ([0.0, 1.571, 3.142], [0.167, 0.667, 0.167])
    """
    if grid not in GRIDS:
        raise ValueError(f"grid: expected one of {', '.join(map(repr, GRIDS))}, got {grid!r}")
    checks.check_integer("longitudes", longitudes, least=1)
    checks.check_integer("latitudes", latitudes, least=1 if grid == "legendre-gauss" else 2)
    last = latitudes - 1
    if grid == "equiangular":
        theta = np.pi * np.arange(latitudes) / last
        j = np.arange(1, last // 2 + 1)
        share = np.where(2 * j == last, 1, 2) / (4 * j**2 - 1)
        w = np.where((theta == 0) | (theta == theta[-1]), 1, 2) / last * (1 - np.cos(2 * np.outer(theta, j)) @ share)
    elif grid == "legendre-gauss":
        x, w = np.polynomial.legendre.leggauss(latitudes)
        theta = np.arccos(x[::-1])
    else:
        top = np.polynomial.legendre.Legendre.basis(last)
        x = np.concatenate([[-1.0], np.sort(top.deriv().roots().real), [1.0]])
        theta, w = np.arccos(x[::-1]), (2 / (last * latitudes * top(x) ** 2))[::-1]
    return theta, 2 * np.pi / longitudes * w


def _default_cutoff(in_shape, out_shape, grids):
    """The largest distance of neighbouring latitudes of the grid with fewer longitudes."""
    which = 0 if out_shape[1] > in_shape[1] else 1
    (latitudes, longitudes), grid = (in_shape, out_shape)[which], grids[which]
    return float(np.diff(sphere_quadrature(latitudes, longitudes, grid)[0]).max())


def _haversine(theta, other, difference):
    """sin^2 of half the great-circle distance; works on arrays of NumPy and JAX."""
    xp = jnp if isinstance(difference, jax.Array) else np
    return xp.sin((theta - other) / 2) ** 2 + xp.sin(theta) * xp.sin(other) * xp.sin(difference / 2) ** 2


def _limit(cutoff):
    """Of :func:`_haversine`."""
    return math.sin(min(cutoff * (1 + RIM), math.pi) / 2) ** 2


class Neighborhoods(NamedTuple):
    """The points of the input grid near each point of the output grid, up to turning; made by :func:`s2_neighborhood_index`.

    The neighbours of output longitude o are those listed for ``o % phases``, ``o // phases * stride`` longitudes on, modulo their number.

    Attributes:
      points: int32 [latitudes out, phases, K, 2], latitude and longitude; zeros where there are fewer than K.
      mask: bool [latitudes out, phases, K].
      stride: input longitudes from one output longitude of a phase to the next.
    """

    points: np.ndarray
    mask: np.ndarray
    stride: int


@functools.cache
def s2_neighborhood_index(in_shape: tuple[int, int], out_shape: tuple[int, int], grids: tuple[str, str] = ("equiangular", "equiangular"),
                          theta_cutoff: float | None = None) -> Neighborhoods:
    """Which points lie within a great-circle distance.

    Args:
      in_shape, out_shape: latitudes and longitudes of both grids; one number of longitudes is a multiple of the other.
      grids: kinds of the input and the output grid.
      theta_cutoff: the distance in radians; by default the largest between neighbouring latitudes of the output grid, or of the input grid where the output
        has more longitudes. Points a thousandth further are inside, too.

    Returns:
      :class:`Neighborhoods`. One phase where the output has no more longitudes than the input, else their ratio.

    Raises:
      ValueError: numbers of longitudes that do not divide, or a distance that is not positive.

    >>> near = s2_neighborhood_index((5, 8), (5, 8))
    >>> near.mask.sum(-1)[:, 0].tolist()  # a pole sees all of its ring and the next
    [16, 12, 5, 12, 16]
    """
    columns, (out_rows, out_columns) = in_shape[1], out_shape
    if columns % out_columns and out_columns % columns:
        raise ValueError(f"out_shape: expected a number of longitudes that divides, or is a multiple of, the input's {columns}, got {out_columns}")
    cutoff = _default_cutoff(in_shape, out_shape, grids) if theta_cutoff is None else theta_cutoff
    if not cutoff > 0:
        raise ValueError(f"theta_cutoff: expected a positive angle, got {cutoff}")
    phases = max(out_columns // columns, 1)
    theta, out_theta = (sphere_quadrature(*shape, grid)[0] for shape, grid in zip((in_shape, out_shape), grids))
    difference = 2 * np.pi * (np.arange(columns) / columns - np.arange(phases)[:, None] / out_columns)
    near = _haversine(out_theta[:, None, None, None], theta[:, None], difference[:, None]) <= _limit(cutoff)  # [out rows, phases, rows, columns]
    near = near.reshape(out_rows, phases, -1)
    most = max(int(near.sum(-1).max()), 1)
    found = np.argsort(~near, axis=-1, kind="stable")[..., :most]
    mask = np.take_along_axis(near, found, axis=-1)
    index = np.where(mask[..., None], np.stack(np.divmod(found, columns), axis=-1), 0).astype(np.int32)
    return Neighborhoods(index, mask, max(columns // out_columns, 1))


# Attention ----------------------------------------------------------------------------------------------------------


def _check(query, key, value, key_mask):
    for name, x in (("query", query), ("key", key), ("value", value)):
        if jnp.ndim(x) != 5:
            raise ValueError(f"{name}: expected shape [B, latitudes, longitudes, heads, size], got {checks.describe(x)}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(f"value: expected the key's grid {key.shape[1:3]}, got {checks.describe(value)}")
    if key_mask is not None and (key_mask.shape != key.shape[:3] or key_mask.dtype != bool):
        raise ValueError(f"key_mask: expected bool{list(key.shape[:3])} ([B, latitudes, longitudes]), got {checks.describe(key_mask)}")


def _flat(x):
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _log_weights(shape, grid):
    """[latitudes * longitudes], float32 or wider."""
    return jnp.asarray(np.repeat(np.log(sphere_quadrature(*shape, grid)[1]), shape[1]), float)


def s2_attention(query: Float[Array, "B P Q N H"], key: Float[Array, "B R L K H"], value: Float[Array, "B R L K Hv"], *, grid: str = "equiangular",
                 key_mask: Bool[Array, "B R L"] | None = None, scale: float | None = None, **options) -> Float[Array, "B P Q N Hv"]:
    """Attention to the whole sphere: softmax of ``scale q_p . k_s + log w_s`` over the points s of the key's grid.

    Args:
      query: [B, P, Q, N, H], at any points (a grid of P latitudes and Q longitudes, as a rule).
      key, value: [B, R, L, K, H] and [B, R, L, K, Hv] on a grid of R latitudes and L longitudes, N a multiple of K.
      grid: of the keys, 'equiangular', 'legendre-gauss' or 'lobatto'.
      key_mask: bool [B, R, L], which points there are (sea, say).
      scale: 1 / sqrt(H) by default.
      **options: mask, implementation, block_sizes, dropout_rate, dropout_key, ... as in :func:`attnx.attention`.

    Returns:
      [B, P, Q, N, Hv] in the query's dtype, zeros where there are no keys.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(P Q R L) time, O(P Q + R L) memory.

    >>> q = k = jnp.zeros((1, 3, 4, 1, 8))
    >>> height = jnp.cos(jnp.array([0.0, jnp.pi / 2, jnp.pi]))[None, :, None, None, None] ** 2
    >>> s2_attention(q, k, jnp.broadcast_to(height, (1, 3, 4, 1, 1)))[0, 0, 0, 0]  # the mean of z^2 over the sphere, not over the grid
    Array([0.33333334], dtype=float32)
    """
    _check(query, key, value, key_mask)
    if key_mask is not None:
        places = jnp.arange(key.shape[1] * key.shape[2], dtype=jnp.int32)
        options |= {"key_positions": jnp.where(key_mask.reshape(key.shape[0], -1), places, -1)}
    weight = bias(_log_weights(key.shape[1:3], grid)[None])
    out = attention(*map(_flat, (query, key, value)), scores=(weight,), scale=scale, **options)
    return out.reshape(*query.shape[:4], value.shape[4])


@part
class Disk(Mask):
    """Pairs of points of the sphere within a great-circle distance: theta and lambda of queries [T] and keys [S]; tiles too far in latitude are never visited."""

    query_theta: Any
    query_lambda: Any
    key_theta: Any
    key_lambda: Any
    cutoff: float = static(default=math.pi)

    def operands(self, sizes):
        return (*(Operand(x, ("query",)) for x in (self.query_theta, self.query_lambda)), *(Operand(x, ("key",)) for x in (self.key_theta, self.key_lambda)))

    def tile(self, at, theta, lam, key_theta, key_lam):
        return _haversine(theta, key_theta, lam - key_lam) <= _limit(self.cutoff)

    def block(self, query, key, theta, lam, key_theta, key_lam):
        apart = jnp.maximum(key_theta.low - theta.high, theta.low - key_theta.high)
        return Cover(apart <= self.cutoff * (1 + RIM), False)


def s2_neighborhood_attention(query: Float[Array, "B P Q N H"], key: Float[Array, "B R L K H"], value: Float[Array, "B R L K Hv"], *,
                              grids: tuple[str, str] = ("equiangular", "equiangular"), theta_cutoff: float | None = None,
                              key_mask: Bool[Array, "B R L"] | None = None, scale: float | None = None, implementation: str | None = None,
                              block_sizes: tuple[int, int] | None = None) -> Float[Array, "B P Q N Hv"]:
    """:func:`s2_attention` to the points within a great-circle distance of the query's.

    Args:
      query: [B, P, Q, N, H] on the output grid.
      key, value: [B, R, L, K, H] and [B, R, L, K, Hv] on the input grid; L a multiple of Q or Q of L.
      grids, theta_cutoff: as in :func:`s2_neighborhood_index`.
      key_mask, scale: as in :func:`s2_attention`.
      implementation: 'gathered', the neighbours of one latitude at a time, also chosen by None; or one of those of :func:`attnx.attention` with the disk as a mask.
      block_sizes: of those.

    Returns:
      [B, P, Q, N, Hv] in the query's dtype, zeros where there are no neighbours.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost of 'gathered': O(P Q K) time, K the mean number of neighbours (rounded up to powers of two), and O(P Q + R L) memory beside one latitude's
    neighbours. A finer output grid lists neighbours once for each phase of its longitudes, so nothing is scattered.

    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 8, 1, 4))
    >>> bool(jnp.allclose(s2_neighborhood_attention(x, x, x, theta_cutoff=float(jnp.pi)), s2_attention(x, x, x), atol=1e-5))
    True
    """
    _check(query, key, value, key_mask)
    in_shape, out_shape, grids = key.shape[1:3], query.shape[1:3], (grids[0], grids[1])
    near = s2_neighborhood_index(in_shape, out_shape, grids, theta_cutoff)
    if implementation not in (None, "gathered"):
        cutoff = _default_cutoff(in_shape, out_shape, grids) if theta_cutoff is None else theta_cutoff
        disk = Disk(*_angles(out_shape, grids[1]), *_angles(in_shape, grids[0]), cutoff=float(cutoff))
        return s2_attention(query, key, value, grid=grids[0], key_mask=key_mask, scale=scale, mask=disk, implementation=implementation,
                            block_sizes=block_sizes)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    checks.check_query_key_value(*map(_flat, (query, key, value)))
    ring = functools.partial(_ring, _flat(key), _flat(value), _log_weights(in_shape, grids[0]), None if key_mask is None else key_mask.reshape(len(key), -1),
                             checks.check_scale(scale, query.shape[4]), near.stride, in_shape[1])
    counts = near.mask.sum(-1).max(-1)
    buckets = 1 << np.ceil(np.log2(np.maximum(counts, 1))).astype(int)
    parts, order = [], []
    for size in np.unique(buckets):  # latitudes with about as many neighbours go through one loop
        rows = np.flatnonzero(buckets == size)
        tables = (x[rows, :, :size] for x in near[:2])
        parts.append(jax.lax.map(lambda row: jax.checkpoint(ring)(*row), (jnp.moveaxis(query, 1, 0)[rows], *map(jnp.asarray, tables))))
        order.append(rows)
    return jnp.moveaxis(jnp.concatenate(parts)[np.argsort(np.concatenate(order))], 0, 1)


def _angles(shape, grid) -> tuple[jax.Array, jax.Array]:
    theta = sphere_quadrature(*shape, grid)[0]
    lam = 2 * np.pi * np.arange(shape[1]) / shape[1]
    theta, lam = np.meshgrid(theta, lam, indexing="ij")
    return jnp.asarray(theta.reshape(-1), float), jnp.asarray(lam.reshape(-1), float)


def _ring(key, value, log_weights, key_mask, scale, stride, columns, query, index, mask):
    """The queries of one latitude [B, Q, N, H]; index [phases, K, 2], mask [phases, K]."""
    batch, number, heads, size = query.shape
    phases = index.shape[0]
    turns = jnp.arange(number // phases)[:, None, None] * stride
    at = index[..., 0] * columns + (index[..., 1] + turns) % columns  # [turns, phases, K]
    query = query.reshape(batch, number // phases, phases, key.shape[2], -1, size)
    s = jnp.einsum("btpkgh,btpskh->btpkgs", query, key[:, at], preferred_element_type=jnp.promote_types(query.dtype, jnp.float32))
    s = s * scale + log_weights[at][:, :, None, None]
    allowed = mask[:, None, None] if key_mask is None else (mask & key_mask[:, at])[:, :, :, None, None]
    out = attend_scores(s, jnp.swapaxes(value[:, at], -2, -3), mask=allowed)
    return out.reshape(batch, number, heads, -1).astype(query.dtype)


# Layers -------------------------------------------------------------------------------------------------------------


@part
class SphereMechanism:
    """The two attentions on flattened grids, as what :class:`attnx.nn.Attention` is handed; without a streaming form."""

    in_shape: tuple[int, int] = static()
    out_shape: tuple[int, int] = static()
    grids: tuple[str, str] = static()
    local: bool = static(default=False)
    options: tuple = static(default=())

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        grid = lambda x, shape: x.reshape(x.shape[0], *shape, *x.shape[2:])
        query, key, value = grid(query, self.out_shape), grid(key, self.in_shape), grid(value, self.in_shape)
        mask = None if key_positions is None else grid(jnp.broadcast_to(key_positions >= 0, (len(key), math.prod(self.in_shape))), self.in_shape)
        options = dict(self.options) | {"key_mask": mask}
        out = s2_neighborhood_attention(query, key, value, grids=self.grids, **options) if self.local else s2_attention(query, key, value, grid=self.grids[0], **options)
        return _flat(out)

    def step(self, state, query, key, value):
        raise NotImplementedError("a sphere is seen at once and has no streaming form")


_norm = functools.partial(nnx.RMSNorm, epsilon=float(np.finfo(np.float32).eps))


class AttentionS2(Attention):
    """Multi-head :func:`s2_attention` of fields on grids.

    Args:
      features: channels of the queries' field; context_features: of the other's, where there is one.
      num_heads: N.
      in_shape: latitudes and longitudes of the field that is attended to.
      out_shape: of the queries; by default the same.
      grids: kinds of the input and the output grid.
      key_features, out_features: channels of queries and keys, and of values and outputs, over all heads; by default ``features``.
      qk_norm: whether queries and keys pass an RMS norm.
      scale, implementation: as in :func:`s2_attention`.
      rngs: the generator of initial values (Glorot, zero biases).
      **options: of :class:`attnx.nn.Attention`.

    Raises:
      ValueError: channels that heads do not divide.

    >>> layer = AttentionS2(8, 2, (5, 8), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 8, 8))).shape
    (1, 5, 8, 8)
    """

    def __init__(self, features: int, num_heads: int, in_shape: tuple[int, int], out_shape: tuple[int, int] | None = None, *,
                 grids: tuple[str, str] = ("equiangular", "equiangular"), key_features: int | None = None, out_features: int | None = None,
                 qk_norm: bool = False, scale: float | None = None, implementation: str | None = None, rngs: nnx.Rngs, **options):
        key_features, out_features = key_features or features, out_features or features
        for name, given in (("key_features", key_features), ("out_features", out_features)):
            if given % num_heads:
                raise ValueError(f"{name}: expected a multiple of num_heads = {num_heads}, got {given}")
        out_shape = out_shape or in_shape
        self.in_shape, self.out_shape = (in_shape[0], in_shape[1]), (out_shape[0], out_shape[1])
        mechanism = SphereMechanism(self.in_shape, self.out_shape, (grids[0], grids[1]), self._local, (*self._local_options(options), ("scale", scale),
                                                                                             ("implementation", implementation)))
        settings: dict[str, Any] = {"use_bias": True, "kernel_init": nnx.initializers.glorot_uniform()} | options
        super().__init__(features, num_heads, mechanism=mechanism, head_size=key_features // num_heads, value_size=out_features // num_heads,
                         out_features=out_features, qk_norm=_norm if qk_norm else None, rngs=rngs,
                         **settings)

    _local = False

    def _local_options(self, options):
        return ()

    def __call__(self, x: Float[Array, "B P Q C"], context: Float[Array, "B R L E"] | None = None, *, key_mask: Bool[Array, "B R L"] | None = None,
                 dropout_key: Array | None = None) -> Float[Array, "B P Q D"]:
        """The field [B, P, Q, out_features] from x on the output grid and the context (or x) on the input grid; key_mask as in :func:`s2_attention`."""
        for name, field, shape in (("x", x, self.out_shape), ("context", x if context is None else context, self.in_shape)):
            if field.ndim != 4 or field.shape[1:3] != shape:
                raise ValueError(f"{name}: expected shape [B, {shape[0]}, {shape[1]}, channels], got {checks.describe(field)}")
        positions = None if key_mask is None else jnp.where(key_mask.reshape(len(x), -1), jnp.arange(math.prod(self.in_shape), dtype=jnp.int32), -1)
        given = {"positions": positions} if context is None else {"context": _flat(context), "context_positions": positions}
        out = super().__call__(_flat(x), dropout_key=dropout_key, **given)
        return out.reshape(*x.shape[:3], out.shape[-1])


class NeighborhoodAttentionS2(AttentionS2):
    """Multi-head :func:`s2_neighborhood_attention` of fields on grids: as :class:`AttentionS2`, with ``theta_cutoff``, the radius of the disks in radians.

    >>> layer = NeighborhoodAttentionS2(8, 2, (5, 8), (5, 4), theta_cutoff=1.0, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 8, 8))).shape
    (1, 5, 4, 8)
    """

    _local = True

    def _local_options(self, options):
        return (("theta_cutoff", options.pop("theta_cutoff", None)),)
