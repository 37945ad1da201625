"""Rearrangements of the attended axes and their exact inverses: windows, grids, single axes, channels; and neighbourhoods.

Attention reads a batch of sequences [B, T, ...]. An image, a video or a volume [B, *space, ...] is brought to that form by saying which
positions share a sequence (in what order: :mod:`attnx.core.orders`); what follows the spatial axes, heads and features or channels, is
never looked at. What depends on shapes alone is a NumPy array, made at trace time. All functions are reshapes, transpositions, rolls
and gathers: O(size) time and memory, differentiable, and the inverses undo them bit for bit.
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


def window_partition(x: jax.Array, window: Sequence[int], *, shift: int | Sequence[int] = 0,
                     dilation: int | Sequence[int] = 1) -> jax.Array:
    """Cuts the spatial axes into windows and folds the windows into the batch.

    An axis of length n is padded with zeros at its end to a multiple of ``window * dilation`` and rolled back by ``shift``; then position
    ``(m * window + j) * dilation + r`` is element j of window (m, r). So ``dilation=1`` gives the windows of Swin,
    ``window=g, dilation=ceil(n / g)`` the sparse grid of MaxViT, and ``window=ceil(n / dilation)`` the residue classes in which dilated
    attention is ordinary local attention.

    Args:
      x: [B, *space, ...], one spatial axis for each entry of ``window``; what follows them is kept (channels, or heads and features).
      window: positions of a window along each spatial axis.
      shift: cyclic shift along each axis; Swin alternates 0 and ``window // 2``. A window that wraps around holds positions from
        opposite borders: :func:`window_regions` tells them apart.
      dilation: distance between neighbours in a window, along each axis.

    Returns:
      [B * windows, prod(window), ...], the windows of one example together.

    Raises:
      ValueError, TypeError: a window or dilation below 1, an empty axis, or a number of entries that does not fit x.

    Sources: Liu et al., Swin Transformer, 2021, arXiv 2103.14030; Tu et al., MaxViT, 2022, arXiv 2204.01697 (grids).

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
    x = jnp.pad(x, [(0, 0), *((0, p - n) for p, n in zip(cut.padded, cut.shape)), *[(0, 0)] * (x.ndim - ndim - 1)])
    if any(cut.shift):
        x = jnp.roll(x, [-s for s in cut.shift], range(1, ndim + 1))
    return _fold_windows(x, cut)


def _fold_windows(x, cut: _Cut):
    """[B, *padded, ...] as [B * windows, prod(window), ...]."""
    ndim = len(cut.shape)
    batch, rest = x.shape[0], x.shape[ndim + 1 :]
    counts, window, dilation = (range(1 + i, 1 + 3 * ndim, 3) for i in range(3))
    x = x.reshape(batch, *(n for axis in zip(cut.counts, cut.window, cut.dilation) for n in axis), *rest)
    x = x.transpose(0, *counts, *dilation, *window, *range(1 + 3 * ndim, x.ndim))
    return x.reshape(batch * cut.number, math.prod(cut.window), *rest)


def window_reverse(windows: jax.Array, window: Sequence[int], shape: Sequence[int], *, shift: int | Sequence[int] = 0,
                   dilation: int | Sequence[int] = 1) -> jax.Array:
    """The inverse of :func:`window_partition`: puts the windows back, undoes the shift, and crops the padding.

    Args:
      windows: [B * windows, prod(window), ...].
      window, shift, dilation: as they were given to :func:`window_partition`.
      shape: the spatial shape to return to.

    Returns:
      [B, *shape, ...]. ValueError if the leading axes of ``windows`` do not fit.

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


def window_regions(shape: Sequence[int], window: Sequence[int], *, shift: int | Sequence[int] = 0,
                   dilation: int | Sequence[int] = 1) -> np.ndarray:
    """Region ids in every window, different on the two sides of a border that the shift wrapped around; -1 is padding.

    As the ids of a document mask (tiled over the batch) they keep opposite borders apart and padding unseen. Called with an already
    padded shape they leave padding visible, as some released models do.

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
    return _fold_windows(regions[None], cut)


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
        raise ValueError(f"y: expected shape [{batch}, {length}] and {feature_axes} more axes for shape {tuple(shape)}, got {y.shape}")
    order = others + axes
    y = y.reshape(*(shape[a] for a in order), *y.shape[2:])
    return y.transpose(*np.argsort(order), *range(len(shape), y.ndim))


def along_axes(function: Callable[..., jax.Array], *arrays: jax.Array, axes: int | Sequence[int], feature_axes: int = 2) -> jax.Array:
    """Axial attention: applies ``function`` along the given axes, independently at every place of the others, at a cost linear in those.

    Args:
      function: takes the folded arrays, each [batch, T, ...], and returns [batch, T, ...] with T of the first; for instance
        ``functools.partial(attnx.attention, mask=...)``.
      *arrays: query, key, value [..., N, H]; they may differ in the lengths of the attended axes.
      axes, feature_axes: as for :func:`fold_axes`.

    Returns:
      The output, with the leading axes of the first array.

    Source: Ho et al., Axial Attention in Multidimensional Transformers, 2019, arXiv 1912.12180.

    >>> image = jnp.ones((2, 3, 5, 4, 8))
    >>> along_axes(lambda q, k, v: q + jnp.sum(v, 1, keepdims=True), image, image, image, axes=2)[0, 0, 0, 0, 0]
    Array(6., dtype=float32)
    """
    lead = arrays[0].shape[: arrays[0].ndim - feature_axes]
    return unfold_axes(function(*(fold_axes(x, axes, feature_axes=feature_axes) for x in arrays)), axes, lead, feature_axes=feature_axes)


def swap_channels(x: jax.Array) -> jax.Array:
    """The layout of channel attention, in which channels are the tokens and positions the features: [B, T, N, H] -> [B, H, N, T].

    Its own inverse. Attention over swapped arrays has scores sum_t q_tc k_td between the channels c and d of a head and costs O(T H^2); its
    default scale is 1 / sqrt(T).

    Sources: Zamir et al., Restormer, 2021, arXiv 2111.09881; Ding et al., DaViT, 2022, arXiv 2204.03645.

    >>> swap_channels(jnp.zeros((2, 49, 4, 8))).shape
    (2, 8, 4, 49)
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected shape [B, T, N, H], got {x.shape}")
    return jnp.swapaxes(x, 1, 3)


# Neighbourhoods -----------------------------------------------------------------------------------------------------


def neighbourhoods(shape: Sequence[int], window: int | Sequence[int], *, dilation: int | Sequence[int] = 1,
                   border: str = "shift") -> np.ndarray:
    """The positions near each position of a grid, as raster indices.

    Along an axis, position i has the neighbours ``i + dilation * (j - window // 2)`` for j = 0..window-1. At a border the window either
    moves inside, so that each position has ``window`` neighbours of its own residue class modulo ``dilation``
    (``border='shift'``: neighbourhood attention), or stays centred and lists -1 for what lies outside (``border='pad'``: convolutions).

    Args:
      shape: lengths of the axes, any number of them.
      window: positions along each axis; with ``border='shift'`` at most ``n // dilation``.
      dilation: distance between neighbours along each axis.
      border: 'shift' or 'pad'.

    Returns:
      int32 [prod(shape), prod(window)], a NumPy array. ValueError for a window that does not fit or an unknown border.

    Sources: Hassani et al., Neighborhood Attention Transformer, 2022, arXiv 2204.07143; Hassani and Shi, Dilated Neighborhood Attention
    Transformer, 2022, arXiv 2209.15001; Ramachandran et al., Stand-Alone Self-Attention in Vision Models, 2019, arXiv 1906.05909.

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


def gather_neighbours(x: jax.Array, table: jax.Array | np.ndarray) -> jax.Array:
    """The tokens that a table of indices lists for each query: [B, S, ...] -> [B, T, W, ...], zeros where the index is negative.

    Args:
      x: [B, S, ...].
      table: int [T, W] of indices into S, negative = none; from :func:`neighbourhoods`, or from data.

    >>> gather_neighbours(jnp.array([[5.0, 6.0, 7.0]]), neighbourhoods((3,), (3,), border="pad"))[0, 0]
    Array([0., 5., 6.], dtype=float32)
    """
    if table.ndim != 2:
        raise ValueError(f"table: expected shape [T, W], got {table.shape}")
    index = jnp.where(table < 0, x.shape[1], table)
    return x.at[:, index].get(mode="fill", fill_value=0)
