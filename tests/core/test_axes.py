"""Windows, axes, channels and neighbourhoods: every inverse is exact, and attention inside them equals masked attention outside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.axes import (
    along_axes,
    fold_axes,
    gather_neighbours,
    neighbourhoods,
    swap_channels,
    unfold_axes,
    window_partition,
    window_regions,
    window_reverse,
)

CUTS = [
    # shape, window, shift, dilation
    ((5, 7), (2, 3), 0, 1),
    ((5, 7), (4, 4), 2, 1),
    ((6, 4), (3, 2), (1, 1), 1),
    ((7, 6), (3, 2), (4, -1), (2, 3)),
    ((3,), (5,), 1, 1),
    ((3, 4, 5), (2, 2, 3), (1, 0, 1), (1, 2, 1)),
    ((1, 1), (1, 1), 0, 1),
]


def attend(query, key, value, allowed=True):
    """Dense softmax attention [B, T, N, H], zeros for rows without keys."""
    s = jnp.einsum("btnh,bsnh->bnts", query, key)
    e = jnp.where(allowed, jnp.exp(s), 0)
    return jnp.einsum("bnts,bsnh->btnh", e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30), value)


def numbered(*shape):
    return jnp.arange(1, np.prod(shape) + 1, dtype=jnp.int32).reshape(shape)


@pytest.mark.parametrize("shape, window, shift, dilation", CUTS)
def test_windows_round_trip(shape, window, shift, dilation):
    x = numbered(2, *shape, 2, 3)
    windows = window_partition(x, window, shift=shift, dilation=dilation)
    assert windows.shape[1:] == (np.prod(window), 2, 3)
    assert (window_reverse(windows, window, shape, shift=shift, dilation=dilation) == x).all()
    # Every element occurs once, and the rest is the zero padding that the regions mark.
    regions = np.tile(window_regions(shape, window, shift=shift, dilation=dilation), (2, 1))
    assert regions.shape == windows.shape[:2]
    assert sorted(np.asarray(windows)[regions >= 0].ravel()) == list(range(1, x.size + 1))
    assert not np.asarray(windows)[regions < 0].any()


@pytest.mark.parametrize("shape, window, shift, dilation", CUTS)
def test_window_membership_and_regions_by_coordinates(shape, window, shift, dilation):
    """A position's window and region follow from its coordinates alone."""
    ndim = len(shape)
    shift, dilation = (v if isinstance(v, tuple) else (v,) * ndim for v in (shift, dilation))
    padded = [-(-n // (w * d)) * w * d for n, w, d in zip(shape, window, dilation)]
    here = np.stack(np.indices(shape), -1)
    members = np.asarray(window_partition(jnp.asarray(here)[None] + 1, window, shift=shift, dilation=dilation)) - 1
    regions = window_regions(shape, window, shift=shift, dilation=dilation)
    for positions, ids in zip(members, regions):
        real = positions[ids >= 0]
        rolled = (real - np.array(shift)) % padded
        block = rolled // (np.array(window) * dilation), rolled % dilation
        assert all((b == b[:1]).all() for b in block)
        unwrapped = (real - np.array(shift)) // (np.array(window) * dilation)
        ids = ids[ids >= 0]
        assert ((ids[:, None] == ids) == (unwrapped[:, None] == unwrapped).all(-1)).all()


def test_shifted_windows_attend_like_a_mask():
    """Windowed attention with regions equals dense attention under the block mask; padding and opposite borders stay unseen."""
    shape, window, shift = (5, 6), (4, 4), 2
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, *shape, 2, 4))

    @jax.jit
    def windowed(q, k, v):
        cut = functools.partial(window_partition, window=window, shift=shift)
        ids = jnp.tile(window_regions(shape, window, shift=shift), (2, 1))
        allowed = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] >= 0)
        out = attend(cut(q), cut(k), cut(v), allowed[:, None])
        return window_reverse(out, window, shape, shift=shift)

    y, x = np.indices(shape)
    block = ((y - shift) // 4 * 10 + (x - shift) // 4).ravel()  # unwrapped: a window cut by the border is two
    flat = [a.reshape(2, 30, 2, 4) for a in (q, k, v)]
    expected = attend(*flat, block[:, None] == block[None])
    np.testing.assert_allclose(windowed(q, k, v), expected.reshape(q.shape), rtol=1e-5, atol=1e-5)


def test_regions_of_swin():
    """The three slices along each axis of the released Swin mask, in every window."""
    size, window, shift = 8, 4, 2
    label = np.zeros(size, int)
    label[size - window : size - shift], label[size - shift :] = 1, 2
    grid = (label[:, None] * 3 + label[None]).reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(4, 16)
    ours = window_regions((size, size), (window, window), shift=shift)
    assert ((grid[:, :, None] == grid[:, None]) == (ours[:, :, None] == ours[:, None])).all()


def test_dilated_windows_are_grids():
    """MaxViT's grid attention: the members of a group lie H / g and W / g apart."""
    x = numbered(1, 6, 8)
    grid = window_partition(x, (3, 2), dilation=(2, 4))
    expected = x.reshape(1, 3, 2, 2, 4).transpose(0, 2, 4, 1, 3).reshape(8, 6)
    assert (grid == expected).all()


def test_windows_differentiate():
    shape, window = (3, 5), (2, 2)
    x = jax.random.normal(jax.random.key(1), (1, *shape, 2))
    weight = jax.random.normal(jax.random.key(2), window_partition(x, window, shift=1).shape)

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(weight * window_partition(x, window, shift=1)))(x)

    np.testing.assert_array_equal(gradient(x), window_reverse(weight, window, shape, shift=1))


@pytest.mark.parametrize("axes", [0, 1, 2, (1, 2), (2, 1), (2, 0), (0, 1, 2)])
def test_fold_axes_round_trip(axes):
    x = numbered(2, 3, 4, 2, 5)
    folded = fold_axes(x, axes)
    group = (axes,) if isinstance(axes, int) else axes
    assert folded.shape == (24 // np.prod([x.shape[a] for a in group]), np.prod([x.shape[a] for a in group]), 2, 5)
    assert (unfold_axes(folded, axes, (2, 3, 4)) == x).all()
    rest = [a for a in range(3) if a not in group]
    assert (folded.ravel() == x.transpose(*rest, *group, 3, 4).ravel()).all()


def test_axial_attention_equals_a_mask():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 4, 2, 4))
    flat = [a.reshape(2, 12, 2, 4) for a in (q, k, v)]
    row, column = (c.ravel() for c in np.indices((3, 4)))
    for axis, other in ((1, column), (2, row)):
        ours = jax.jit(functools.partial(along_axes, attend, axes=axis))(q, k, v)
        np.testing.assert_allclose(ours.reshape(2, 12, 2, 4), attend(*flat, other[:, None] == other[None]), rtol=1e-5, atol=1e-5)
    both = along_axes(attend, q, k, v, axes=(1, 2))
    np.testing.assert_allclose(both.reshape(2, 12, 2, 4), attend(*flat), rtol=1e-5, atol=1e-5)


def test_axial_cross_attention_has_the_queries_length():
    q, kv = jnp.ones((2, 5, 3, 2, 4)), jnp.ones((2, 7, 3, 2, 4))
    assert along_axes(attend, q, kv, kv, axes=1).shape == q.shape
    assert along_axes(lambda x: x, q[..., 0], axes=2, feature_axes=1).shape == q.shape[:-1]


def test_channel_attention():
    """Swapped attention mixes channels: softmax over d of sum_t q_tc k_td, applied to v; positions may be permuted freely."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 2, 4)) * 0.3

    @jax.jit
    def channels(q, k, v):
        return swap_channels(attend(*map(swap_channels, (q, k, v))))

    weights = jax.nn.softmax(jnp.einsum("btnc,btnd->bncd", q, k), axis=-1)
    np.testing.assert_allclose(channels(q, k, v), jnp.einsum("bncd,btnd->btnc", weights, v), rtol=1e-5, atol=1e-6)
    order = np.array([3, 1, 0, 6, 5, 4, 2])
    np.testing.assert_allclose(channels(q[:, order], k[:, order], v[:, order]), channels(q, k, v)[:, order], rtol=1e-5, atol=1e-6)


def neighbourhood_by_definition(i, n, window, dilation, border):
    """The keys of position i, by the rule in words."""
    if border == "pad":
        keys = [i + dilation * (j - window // 2) for j in range(window)]
        return [k if 0 <= k < n else -1 for k in keys]
    members = [j for j in range(n) if j % dilation == i % dilation]
    start = min(max(members.index(i) - window // 2, 0), len(members) - window)
    return members[start : start + window]


@pytest.mark.parametrize("border", ["shift", "pad"])
@pytest.mark.parametrize("n, window, dilation", [(7, 3, 1), (8, 4, 1), (9, 3, 2), (11, 3, 3), (5, 5, 1), (4, 1, 1)])
def test_neighbourhoods_by_definition(n, window, dilation, border):
    expected = [neighbourhood_by_definition(i, n, window, dilation, border) for i in range(n)]
    assert neighbourhoods((n,), window, dilation=dilation, border=border).tolist() == expected


def test_neighbourhoods_of_a_grid_are_products():
    shape, window, dilation = (4, 6), (3, 2), (1, 3)
    for border in ("shift", "pad"):
        ours = neighbourhoods(shape, window, dilation=dilation, border=border).reshape(4, 6, 3, 2)
        rows, columns = (neighbourhoods((n,), w, dilation=d, border=border) for n, w, d in zip(shape, window, dilation))
        product = rows[:, None, :, None] * 6 + columns[None, :, None]
        outside = (rows < 0)[:, None, :, None] | (columns < 0)[None, :, None]
        assert (ours == np.where(outside, -1, product)).all()


def test_gathered_neighbours_are_a_convolutions_unfolding():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 4, 5, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 2))
    table = neighbourhoods((4, 5), (3, 3), border="pad")

    @jax.jit
    def unfolded(x):
        near = gather_neighbours(x.reshape(2, 20, 3), table)
        return jnp.einsum("btwc,wcd->btd", near, kernel.reshape(9, 3, 2)).reshape(2, 4, 5, 2)

    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(unfolded(x), expected, rtol=1e-5, atol=1e-5)


def test_empty_batches():
    x = jnp.zeros((0, 4, 4, 3))
    assert window_reverse(window_partition(x, (3, 3), shift=1), (3, 3), (4, 4), shift=1).shape == x.shape
    assert unfold_axes(fold_axes(x, 1, feature_axes=1), 1, (0, 4, 4), feature_axes=1).shape == x.shape
    assert gather_neighbours(jnp.zeros((2, 0, 3)), np.zeros((0, 4), np.int32)).shape == (2, 0, 4, 3)


@pytest.mark.parametrize("call, error, words", [
    (lambda: window_partition(jnp.ones((1, 4, 4, 1)), 2), TypeError, r"window: expected one integer for each spatial axis"),
    (lambda: window_partition(jnp.ones((1, 4)), (2, 2)), ValueError, r"x: expected shape \[B, 2 spatial axes"),
    (lambda: window_partition(jnp.ones((1, 4, 4, 1)), (2, 0)), ValueError, r"window: expected an integer of at least 1"),
    (lambda: window_partition(jnp.ones((1, 4, 4, 1)), (2, 2), shift=(1, 1, 1)), ValueError, r"shift: expected .* 2 axes"),
    (lambda: window_partition(jnp.ones((1, 0, 4, 1)), (2, 2)), ValueError, r"shape: expected spatial axes of at least 1"),
    (lambda: window_reverse(jnp.ones((3, 4, 1)), (2, 2), (4, 4)), ValueError, r"windows: expected shape \[B \* 4, 4, ...\]"),
    (lambda: fold_axes(jnp.ones((2, 3, 4, 5)), 2), ValueError, r"axes: expected distinct axes among 0..1"),
    (lambda: unfold_axes(jnp.ones((2, 3, 4, 5)), 1, (2, 4)), ValueError, r"y: expected shape \[2, 4\]"),
    (lambda: swap_channels(jnp.ones((2, 3, 4))), ValueError, r"x: expected shape \[B, T, N, H\]"),
    (lambda: neighbourhoods((4,), (3,), dilation=2), ValueError, r"window: expected window \* dilation of at most 4"),
    (lambda: neighbourhoods((4,), (3,), border="wrap"), ValueError, r"border: expected 'shift' or 'pad', got 'wrap'"),
    (lambda: gather_neighbours(jnp.ones((1, 4, 2)), jnp.zeros(3, int)), ValueError, r"table: expected shape \[T, W\]"),
])
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
