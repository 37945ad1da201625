"""Rearrangements of the attended axes, each with its exact inverse: windows, grids, axes, channels, orders, neighbourhoods.

Attention reads a batch of sequences [B, T, ...]. An image, a video or a volume [B, *space, ...] is brought to that form by saying
which positions share a sequence, and in what order; what follows the spatial axes (heads and features, or channels) is never
looked at. Everything that depends on shapes alone is a NumPy array made once, at trace time. All functions are
reshapes, transpositions, rolls and gathers: O(size) time and memory, differentiable, and their inverses undo them bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Windows ------------------------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """How a space is cut: along each axis, ``counts`` windows of ``window`` positions that lie ``dilation`` apart."""

    shape: tuple[int, ...]
    counts: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    shift: tuple[int, ...]

    @property
    def padded(self) -> tuple[int, ...]:
        return tuple(map(math.prod, zip(self.counts, self.window, self.dilation)))

    @property
    def number(self) -> int:
        return math.prod(self.counts + self.dilation)


def _per_axis(name: str, value: int | Sequence[int], ndim: int, least: int | None) -> tuple[int, ...]:
    values = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(values) != ndim or (least is not None and any(v < least for v in values)):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name}: expected an integer{bound}, or one for each of {ndim} axes, got {value}")
    return values


def _cut(shape: Sequence[int], window: Sequence[int], shift, dilation) -> _Cut:
    if not all(shape):
        raise ValueError(f"shape: expected spatial axes of at least 1, got {tuple(shape)}")
    window = _per_axis("window", window, len(shape), 1)
    dilation = _per_axis("dilation", dilation, len(shape), 1)
    shift = _per_axis("shift", shift, len(shape), None)
    counts = tuple(-(-n // (w * d)) for n, w, d in zip(shape, window, dilation))
    return _Cut(tuple(shape), counts, window, dilation, shift)


def window_partition(x: jax.Array, window: Sequence[int], *, shift: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1) -> jax.Array:
    """Cuts the spatial axes into windows and folds the windows into the batch.

    Along an axis of length n, padded with zeros at its end to a multiple of ``window * dilation`` and rolled back by ``shift``,
    position ``(m * window + j) * dilation + r`` is element j of window (m, r). So ``dilation=1`` gives the windows of Swin (shifted
    by ``shift``), ``window=(g, ...)`` with ``dilation=ceil(n / g)`` the sparse grid of MaxViT, and
    ``window=ceil(n / dilation)`` the residue classes in which dilated attention is ordinary local attention.

    Args:
      x: [B, *space, ...], one spatial axis for each entry of ``window``; what follows them is kept (channels, or heads and features).
      window: positions of a window along each spatial axis.
      shift: cyclic shift along each axis; Swin alternates 0 and ``window // 2``. Shifted windows at the border hold positions
        from opposite sides, and :func:`window_regions` tells them apart.
      dilation: distance between neighbours in a window, along each axis.

    Returns:
      [B * windows, prod(window), ...], windows of one example together and in raster order.

    Raises:
      ValueError: a window or dilation below 1, or a number of entries that does not fit x.

    Sources: Liu et al., Swin Transformer, 2021, arXiv 2103.14030 (shifted windows); Tu et al., MaxViT, 2022, arXiv 2204.01697 (grids).

    >>> image = jnp.arange(12).reshape(1, 3, 4, 1)
    >>> window_partition(image, (2, 2))[..., 0]
    Array([[ 0,  1,  4,  5],
           [ 2,  3,  6,  7],
           [ 8,  9,  0,  0],
           [10, 11,  0,  0]], dtype=int32)
    >>> window_partition(image, (1, 2), dilation=(1, 2))[0, :, 0]  # a grid: two positions a row, two apart
    Array([0, 2], dtype=int32)
    """
    if isinstance(window, int):
        raise TypeError(f"window: expected one integer for each spatial axis, such as ({window}, {window}), got {window}")
    ndim = len(window)
    if x.ndim < ndim + 1:
        raise ValueError(f"x: expected shape [B, {ndim} spatial axes, ...] as window has {ndim} entries, got {x.shape}")
    cut = _cut(x.shape[1 : ndim + 1], window, shift, dilation)
    batch, rest = x.shape[:1], x.shape[ndim + 1 :]
    x = jnp.pad(x, [(0, 0), *((0, p - n) for p, n in zip(cut.padded, cut.shape)), *((0, 0) for _ in rest)])
    if any(cut.shift):
        x = jnp.roll(x, [-s for s in cut.shift], range(1, ndim + 1))
    return _fold_windows(x, cut).reshape(batch[0] * cut.number, math.prod(cut.window), *rest)


def _fold_windows(x, cut: _Cut):
    """[B, *padded, ...] as [B, *counts, *dilation, *window, ...]."""
    ndim = len(cut.shape)
    batch, rest = x.shape[:1], x.shape[ndim + 1 :]
    split = [n for axis in zip(cut.counts, cut.window, cut.dilation) for n in axis]
    counts, window, dilation = (tuple(range(1 + i, 1 + 3 * ndim, 3)) for i in range(3))
    kept = range(1 + 3 * ndim, 1 + 3 * ndim + len(rest))
    return x.reshape(*batch, *split, *rest).transpose(0, *counts, *dilation, *window, *kept)


def window_reverse(windows: jax.Array, window: Sequence[int], shape: Sequence[int], *, shift: int | Sequence[int] = 0,
                   dilation: int | Sequence[int] = 1) -> jax.Array:
    """The inverse of :func:`window_partition`: puts the windows back, undoes the shift, and crops the padding.

    Args:
      windows: [B * windows, prod(window), ...].
      window, shift, dilation: as they were given to :func:`window_partition`.
      shape: the spatial shape to return to.

    Returns:
      [B, *shape, ...].

    Raises:
      ValueError: the leading axes of ``windows`` do not fit ``shape`` and ``window``.

    >>> image = jnp.arange(30.0).reshape(1, 5, 6, 1)
    >>> windows = window_partition(image, (4, 4), shift=2)
    >>> bool((window_reverse(windows, (4, 4), (5, 6), shift=2) == image).all())
    True
    """
    cut = _cut(shape, window, shift, dilation)
    ndim, rest = len(cut.shape), windows.shape[2:]
    if windows.ndim < 2 or windows.shape[0] % cut.number or windows.shape[1] != math.prod(cut.window):
        raise ValueError(f"windows: expected shape [B * {cut.number}, {math.prod(cut.window)}, ...] for shape {cut.shape} and window "
                         f"{cut.window}, got {windows.shape}")
    x = windows.reshape(windows.shape[0] // cut.number, *cut.counts, *cut.dilation, *cut.window, *rest)
    counts, dilation, window = (range(1 + i * ndim, 1 + (i + 1) * ndim) for i in range(3))
    interleaved = [axis for axes in zip(counts, window, dilation) for axis in axes]
    x = x.transpose(0, *interleaved, *range(1 + 3 * ndim, x.ndim)).reshape(x.shape[0], *cut.padded, *rest)
    if any(cut.shift):
        x = jnp.roll(x, cut.shift, range(1, ndim + 1))
    return x[(slice(None), *(slice(n) for n in cut.shape))]


def window_regions(shape: Sequence[int], window: Sequence[int], *, shift: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1) -> np.ndarray:
    """Region ids of every position of every window: positions of a window are neighbours in space iff their ids agree; -1 is padding.

    Handed to a document mask (tiled over the batch), they keep a shifted window from joining opposite borders, and padding from being attended.
    Called with an already padded shape they leave the padding visible, as some released models do.

    Args:
      shape: the spatial shape before padding.
      window, shift, dilation: as for :func:`window_partition`.

    Returns:
      int32 [windows, prod(window)], a NumPy array.

    >>> window_regions((4,), (2,), shift=1)  # the second window holds positions 3 and 0
    array([[0, 0],
           [0, 1]], dtype=int32)
    >>> window_regions((3,), (2,))
    array([[ 0,  0],
           [ 0, -1]], dtype=int32)
    """
    cut = _cut(shape, window, shift, dilation)
    regions, padding = np.zeros(cut.padded, np.int32), np.zeros(cut.padded, bool)
    for axis, (n, p, s) in enumerate(zip(cut.shape, cut.padded, cut.shift)):
        along = [-1 if i == axis else 1 for i in range(len(cut.shape))]
        wrapped, position = np.divmod(np.arange(p) + s % p, p)
        regions += (wrapped << axis).astype(np.int32).reshape(along)
        padding |= (position >= n).reshape(along)
    regions[padding] = -1
    return _fold_windows(regions[None], cut).reshape(cut.number, math.prod(cut.window))


# Axes ---------------------------------------------------------------------------------------------------------------


def _attended(ndim: int, axes: int | Sequence[int], feature_axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The attended axes and the batch axes among the first ``ndim - feature_axes``."""
    lead = ndim - feature_axes
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if not axes or len(set(axes)) < len(axes) or not all(0 <= a < lead for a in axes):
        raise ValueError(f"axes: expected distinct axes among 0..{lead - 1} (before the last {feature_axes}), got {axes}")
    return axes, tuple(a for a in range(lead) if a not in axes)


def fold_axes(x: jax.Array, axes: int | Sequence[int], *, feature_axes: int = 2) -> jax.Array:
    """Makes one sequence of the given axes and a batch of all others: [..., N, H] -> [batch, T, N, H].

    Args:
      x: any leading axes, then ``feature_axes`` trailing ones (2: heads and features; 1: channels).
      axes: the attended axis, or several that are flattened in the order given.
      feature_axes: how many trailing axes are kept.

    >>> video = jnp.zeros((2, 7, 3, 5, 4, 8))  # [B, F, H, W, N, H]
    >>> fold_axes(video, 1).shape, fold_axes(video, (2, 3)).shape
    ((30, 7, 4, 8), (14, 15, 4, 8))
    """
    axes, others = _attended(x.ndim, axes, feature_axes)
    kept = tuple(range(x.ndim - feature_axes, x.ndim))
    batch, length = (math.prod(x.shape[a] for a in group) for group in (others, axes))
    return x.transpose(*others, *axes, *kept).reshape(batch, length, *x.shape[x.ndim - feature_axes :])


def unfold_axes(y: jax.Array, axes: int | Sequence[int], shape: Sequence[int], *, feature_axes: int = 2) -> jax.Array:
    """The inverse of :func:`fold_axes`: [batch, T, ...] -> [*shape, ...].

    Args:
      y: [batch, T, ...] with ``feature_axes`` trailing axes.
      axes: as given to :func:`fold_axes`.
      shape: the leading shape to return to (without the trailing axes, which are those of y).

    >>> x = jnp.arange(24.0).reshape(2, 3, 4, 1, 1)
    >>> bool((unfold_axes(fold_axes(x, 1), 1, (2, 3, 4)) == x).all())
    True
    """
    axes, others = _attended(len(shape) + feature_axes, axes, feature_axes)
    batch, length = (math.prod(shape[a] for a in group) for group in (others, axes))
    if y.ndim != 2 + feature_axes or y.shape[:2] != (batch, length):
        raise ValueError(f"y: expected shape [{batch}, {length}] and {feature_axes} more axes for shape {tuple(shape)} and axes {axes}, got {y.shape}")
    order = others + axes
    y = y.reshape(*(shape[a] for a in order), *y.shape[2:])
    return y.transpose(*np.argsort(order), *range(len(shape), y.ndim))


def along_axes(function: Callable[..., jax.Array], *arrays: jax.Array, axes: int | Sequence[int], feature_axes: int = 2) -> jax.Array:
    """Axial attention: applies ``function`` over the given axes and, independently, at every place of the others.

    Args:
      function: takes the folded arrays, each [batch, T, ...], and returns [batch, T, ...] with T of the first; for instance
        ``functools.partial(attnx.attention, mask=...)``.
      *arrays: query, key, value [..., N, H]; they may differ in the lengths of the attended axes.
      axes, feature_axes: as for :func:`fold_axes`.

    Returns:
      The output with the leading axes of the first array. Cost: that of ``function``, linear in the other axes.

    Source: Ho et al., Axial Attention in Multidimensional Transformers, 2019, arXiv 1912.12180.

    >>> image = jnp.ones((2, 3, 5, 4, 8))
    >>> along_axes(lambda q, k, v: q + jnp.sum(v, 1, keepdims=True), image, image, image, axes=2)[0, 0, 0, 0, 0]
    Array(6., dtype=float32)
    """
    lead = arrays[0].shape[: arrays[0].ndim - feature_axes]
    return unfold_axes(function(*(fold_axes(x, axes, feature_axes=feature_axes) for x in arrays)), axes, lead, feature_axes=feature_axes)


def swap_channels(x: jax.Array) -> jax.Array:
    """The layout of channel attention, in which channels are the tokens and positions the features: [B, T, N, H] -> [B, H, N, T].

    Its own inverse. Attention over swapped query and key has scores sum_t q_tc k_td between channels c and d of a head; its cost is
    O(T H^2), linear in T. The default scale then is 1 / sqrt(T): state another where the source does.

    Source: Ding et al., DaViT: Dual Attention Vision Transformers, 2022, arXiv 2204.03645; Zamir et al., Restormer, 2021, arXiv 2111.09881.

    >>> swap_channels(jnp.zeros((2, 49, 4, 8))).shape
    (2, 8, 4, 49)
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected shape [B, T, N, H], got {x.shape}")
    return jnp.swapaxes(x, 1, 3)


# Orders -------------------------------------------------------------------------------------------------------------


def _raster(shape, coordinates):
    return np.ravel_multi_index(coordinates, shape)


def _transposed(shape, coordinates):
    return np.ravel_multi_index(coordinates[::-1], shape[::-1])


def _snake(shape, coordinates):
    rank = np.zeros_like(coordinates[0])
    for n, c in zip(shape, coordinates):
        rank = rank * n + np.where(rank % 2, n - 1 - c, c)
    return rank


def _zigzag(shape, coordinates):
    diagonal, raster = sum(coordinates), _raster(shape, coordinates)
    size = math.prod(shape)
    return diagonal * size + np.where(diagonal % 2, raster, size - 1 - raster)


def _interleave(coordinates, bits):
    """One number from the bits of all coordinates, most significant first."""
    rank = np.zeros_like(coordinates[0])
    for bit in reversed(range(bits)):
        for c in coordinates:
            rank = rank << 1 | c >> bit & 1
    return rank


def _morton(shape, coordinates):
    return _interleave(coordinates, max(shape).bit_length())


def _hilbert(shape, coordinates):
    bits, x = max(max(shape) - 1, 1).bit_length(), list(coordinates)
    for bit in reversed(range(1, bits)):  # undo the reflections and exchanges of each level of the curve, from the largest cell
        low = (1 << bit) - 1
        for i in range(len(x)):
            reflect = (x[i] >> bit & 1).astype(bool)
            exchange = np.where(reflect, 0, (x[0] ^ x[i]) & low)
            x[0] = np.where(reflect, x[0] ^ low, x[0]) ^ exchange
            x[i] = x[i] ^ exchange
    for i in range(1, len(x)):  # Gray encode
        x[i] ^= x[i - 1]
    flip = np.zeros_like(x[0])
    for bit in reversed(range(1, bits)):
        flip = np.where(x[-1] >> bit & 1, flip ^ (1 << bit) - 1, flip)
    return _interleave([c ^ flip for c in x], bits)


_RANKS = {"raster": _raster, "transposed": _transposed, "snake": _snake, "zigzag": _zigzag, "morton": _morton, "hilbert": _hilbert}


def token_order(shape: Sequence[int], order: str = "raster") -> np.ndarray:
    """An order in which to visit the positions of a grid: ``order[t]`` is the raster index of the t-th.

    - ``'raster'``: the last axis fastest.   ``'transposed'``: the first axis fastest.
    - ``'snake'``: raster with every other line reversed, so that consecutive positions are neighbours.
    - ``'zigzag'``: along the anti-diagonals, alternately, as in JPEG.
    - ``'morton'``: by interleaved bits of the coordinates (Z-order): nested blocks.
    - ``'hilbert'``: the Hilbert curve: nested blocks, and consecutive positions are neighbours where the sides are equal powers of two
      (elsewhere the curve of the enclosing cube, skipping what lies outside).

    A reversed scan is ``order[::-1]``; a random one ``jax.random.permutation(key, size)``. Tokens move by :func:`permute`.

    Args:
      shape: lengths of the axes, any number of them.
      order: one of the names above.

    Returns:
      int32 [prod(shape)], a NumPy array, a permutation of 0..prod(shape)-1.

    Raises:
      ValueError: an unknown name.

    Source of the Hilbert ranks: J. Skilling, Programming the Hilbert curve, AIP Conference Proceedings 707, 2004.

    >>> token_order((2, 3), "snake")
    array([0, 1, 2, 5, 4, 3], dtype=int32)
    >>> token_order((4, 4), "hilbert")
    array([ 0,  4,  5,  1,  2,  3,  7,  6, 10, 11, 15, 14, 13,  9,  8, 12],
          dtype=int32)
    """
    if order not in _RANKS:
        raise ValueError(f"order: expected one of {sorted(_RANKS)}, got {order!r}")
    shape = tuple(shape)
    if not math.prod(shape):
        return np.zeros(0, np.int32)
    coordinates = [c.ravel() for c in np.indices(shape)]
    return np.argsort(_RANKS[order](shape, coordinates), kind="stable").astype(np.int32)


def permute(x: jax.Array, order: jax.Array, *, axis: int = 1) -> jax.Array:
    """Reorders an axis: element t of the result is element ``order[t]`` of x.

    Args:
      x: any array.
      order: int [T], a permutation (not checked).
      axis: the axis of length T.

    >>> permute(jnp.array([[10, 11, 12]]), jnp.array([2, 0, 1]))
    Array([[12, 10, 11]], dtype=int32)
    """
    if order.shape != (x.shape[axis],):
        raise ValueError(f"order: expected shape [T] with T = {x.shape[axis]} as axis {axis} of x, got {order.shape}")
    at = (slice(None),) * (axis % x.ndim) + (jnp.asarray(order),)
    return x.at[at].get(unique_indices=True, mode="promise_in_bounds")


def inverse_order(order: jax.Array) -> jax.Array:
    """The permutation that undoes ``order``: ``permute(permute(x, order), inverse_order(order))`` is x. O(T).

    Args:
      order: int [T], a permutation; NumPy gives NumPy, and a JAX array (traced or not) a JAX array.

    >>> inverse_order(np.array([2, 0, 1]))
    array([1, 2, 0])
    """
    if isinstance(order, np.ndarray):
        return np.argsort(order)
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)


# Neighbourhoods -----------------------------------------------------------------------------------------------------


def neighbourhoods(shape: Sequence[int], window: Sequence[int], *, dilation: int | Sequence[int] = 1, border: str = "shift") -> np.ndarray:
    """The positions near each position of a grid, as raster indices.

    Along an axis of length n, position i has the neighbours ``i + dilation * (j - window // 2)`` for j = 0..window-1. At the border the
    window either moves inside, so that every position has ``window`` neighbours of its own residue class modulo ``dilation``
    (``border='shift'``, neighbourhood attention), or keeps its centre and lists -1 for what lies outside (``border='pad'``, the unfolding of a
    convolution).

    Args:
      shape: lengths of the axes, any number of them.
      window: positions along each axis; with ``border='shift'`` at most ``n // dilation``.
      dilation: distance between neighbours along each axis.
      border: 'shift' or 'pad'.

    Returns:
      int32 [prod(shape), prod(window)], a NumPy array.

    Raises:
      ValueError: a window that does not fit, or an unknown border.

    Sources: Hassani et al., Neighborhood Attention Transformer, 2022, arXiv 2204.07143; Hassani and Shi, Dilated Neighborhood
    Attention Transformer, 2022, arXiv 2209.15001; Ramachandran et al., Stand-Alone Self-Attention in Vision Models, 2019, arXiv 1906.05909 ('pad').

    >>> neighbourhoods((4,), (3,))
    array([[0, 1, 2],
           [0, 1, 2],
           [1, 2, 3],
           [1, 2, 3]], dtype=int32)
    >>> neighbourhoods((4,), (3,), border="pad")[0]
    array([-1,  0,  1], dtype=int32)
    """
    shape = tuple(shape)
    window, dilation = _per_axis("window", window, len(shape), 1), _per_axis("dilation", dilation, len(shape), 1)
    if border not in ("shift", "pad"):
        raise ValueError(f"border: expected 'shift' or 'pad', got {border!r}")
    table, inside = np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
    for n, w, d in zip(shape, window, dilation):
        if border == "shift" and w * d > n:
            raise ValueError(f"window: expected window * dilation of at most {n} along an axis of length {n}, got {w} * {d}")
        i = np.arange(n)[:, None]
        start = i // d - w // 2
        if border == "shift":
            members = -(-(n - i % d) // d)  # positions of the residue class
            start = np.clip(start, 0, members - w)
        near = (start + np.arange(w)) * d + i % d
        table = (table[:, None, :, None] * n + near[None, :, None]).reshape(len(table) * n, -1)
        inside = (inside[:, None, :, None] & ((near >= 0) & (near < n))[None, :, None]).reshape(table.shape)
    return np.where(inside, table, -1).astype(np.int32)


def gather_neighbours(x: jax.Array, table: jax.Array) -> jax.Array:
    """The tokens that a table of indices lists for each query: [B, S, ...] -> [B, T, W, ...], zeros where the index is negative.

    Memory O(T W): for small windows, and as the definition that kernels are tested against.

    Args:
      x: [B, S, ...].
      table: int [T, W] of indices into S, negative = none; from :func:`neighbourhoods`, or data-dependent.

    >>> gather_neighbours(jnp.array([[5.0, 6.0, 7.0]]), neighbourhoods((3,), (3,), border="pad"))[0, 0]
    Array([0., 5., 6.], dtype=float32)
    """
    if table.ndim != 2:
        raise ValueError(f"table: expected shape [T, W], got {table.shape}")
    index = jnp.where(table < 0, x.shape[1], table)
    return x.at[:, index].get(mode="fill", fill_value=0)
