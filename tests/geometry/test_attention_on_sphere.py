"""Attention on the sphere: quadrature, means, turning the sphere, neighbourhoods, and another implementation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import geometry
from attnx.geometry.attention_on_sphere import GRIDS

SHAPE = (5, 8)


def fields(shape=SHAPE, seed=0, heads=2, size=4):
    """Query, key and value."""
    return jax.random.normal(jax.random.key(seed), (3, 2, *shape, heads, size), float)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("latitudes", [2, 7, 10])
def test_quadrature(grid, latitudes):
    """Weights are positive, sum to 4 pi, and integrate harmonics to zero up to the rule's degree, not beyond."""
    theta, w = geometry.sphere_quadrature(latitudes, 6, grid)
    assert (w > 0).all() and (np.diff(theta) > 0).all()
    np.testing.assert_allclose(6 * w.sum(), 4 * math.pi, rtol=1e-12)
    degree = {"equiangular": latitudes - 1, "legendre-gauss": 2 * latitudes - 1, "lobatto": 2 * latitudes - 3}[grid]
    integrals = [w @ np.polynomial.legendre.Legendre.basis(l)(np.cos(theta)) for l in range(1, 2 * latitudes + 1)]
    np.testing.assert_allclose(integrals[:degree], 0, atol=1e-12)
    assert np.abs(integrals[degree:]).max() > 1e-3


def test_means(x64):
    """A constant stays, and without keys the mean is that of the sphere."""
    query, key, value = fields()
    ones = jnp.ones_like(value)
    for attend in (geometry.s2_attention, geometry.s2_neighborhood_attention):
        np.testing.assert_allclose(attend(query, key, ones), ones, atol=1e-12)
    theta, w = geometry.sphere_quadrature(*SHAPE)
    mean = jnp.einsum("brlnh,r->bnh", value, w) / (4 * math.pi)
    out = geometry.s2_attention(query, 0 * key, value)
    np.testing.assert_allclose(out, jnp.broadcast_to(mean[:, None, None], out.shape), atol=1e-12)
    assert jnp.abs(mean - value.mean((1, 2))).max() > 1e-2


@pytest.mark.parametrize(("out_shape", "in_shape"), [((5, 8), (5, 8)), ((3, 4), (5, 8)), ((5, 8), (3, 4))])
def test_longitudes(x64, out_shape, in_shape):
    """Turning about the axis by whole points of both grids changes nothing else."""
    query, (_, key, value) = fields(out_shape)[0], fields(in_shape, 1)
    turn = lambda x, share: jnp.roll(x, round(share * x.shape[2]), axis=2)
    for attend in (jax.jit(geometry.s2_attention), jax.jit(geometry.s2_neighborhood_attention)):
        got = attend(*(turn(x, 0.25) for x in (query, key, value)))
        np.testing.assert_allclose(got, turn(attend(query, key, value), 0.25), atol=1e-12)


def rotation_error(shape, seed=0):
    """How far attention of turned smooth fields is from turned attention, relative."""
    rng = np.random.default_rng(seed)
    theta, _ = geometry.sphere_quadrature(*shape)
    lam = 2 * np.pi * np.arange(shape[1]) / shape[1]
    sine = np.sin(theta)[:, None]
    points = np.stack([sine * np.cos(lam), sine * np.sin(lam), np.broadcast_to(np.cos(theta)[:, None], shape)], axis=-1)
    turned = points @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    maps, directions = rng.normal(size=(3, 4, 4)), rng.normal(size=(4, 3))
    evaluate = lambda points: [jnp.asarray((points @ directions.T) ** 2 @ m)[None, :, :, None] for m in maps]  # polynomials of degree 2
    keys, (turned_query, key, value) = evaluate(points)[1:], evaluate(turned)
    one, other = geometry.s2_attention(turned_query, *keys), geometry.s2_attention(turned_query, key, value)
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one))


def test_rotations(x64):
    """Any rotation: the error falls by more than four as the grid is doubled."""
    errors = np.array([[rotation_error(shape, seed) for shape in ((9, 16), (17, 32))] for seed in range(3)]).mean(0)
    assert 0 < 4 * errors[1] < errors[0] < 0.2


def test_all_in_disk(x64):
    """A disk of radius pi is the sphere."""
    x = fields()
    np.testing.assert_allclose(geometry.s2_neighborhood_attention(*x, theta_cutoff=math.pi), geometry.s2_attention(*x), atol=1e-12)


def test_index():
    """Exactly the points within the great-circle distance, from dot products; at a pole whole rings."""
    in_shape, out_shape, cutoff = (9, 16), (5, 8), 0.5
    near = geometry.s2_neighborhood_index(in_shape, out_shape, ("equiangular", "legendre-gauss"), cutoff)
    assert near.points.shape[:2] == (5, 1) and near.stride == 2

    def points(shape, grid):
        theta, lam = geometry.sphere_quadrature(*shape, grid)[0][:, None], 2 * np.pi * np.arange(shape[1]) / shape[1]
        return np.stack(np.broadcast_arrays(np.sin(theta) * np.cos(lam), np.sin(theta) * np.sin(lam), np.cos(theta)), axis=-1)

    distance = np.arccos(np.clip(np.einsum("pqc,rlc->pqrl", points(out_shape, "legendre-gauss"), points(in_shape, "equiangular")), -1, 1))
    found = np.zeros(distance.shape, bool)
    for row in range(5):
        for column in range(8):
            latitude, longitude = near.points[row, 0][near.mask[row, 0]].T
            found[row, column, latitude, (longitude + 2 * column) % 16] = True
    assert (found == (distance <= cutoff)).all()
    assert (geometry.s2_neighborhood_index((9, 16), (9, 16)).mask[0, 0].sum()) == 32
    assert geometry.s2_neighborhood_index((3, 4), (5, 8)).points.shape[1] == 2  # two phases


@pytest.mark.filterwarnings("ignore:Default theta_cutoff")
@pytest.mark.parametrize(("local", "out_shape", "in_shape", "grids", "norm"), [
    (False, (6, 8), (6, 8), ("equiangular", "equiangular"), True), (False, (4, 8), (6, 8), ("legendre-gauss", "equiangular"), False),
    (True, (6, 8), (6, 8), ("equiangular", "equiangular"), True), (True, (5, 8), (9, 16), ("lobatto", "legendre-gauss"), False),
    (True, (9, 16), (5, 8), ("equiangular", "lobatto"), False)])
def test_peer(local, out_shape, in_shape, grids, norm):
    """torch-harmonics finds the same with the same weights: global, local, to coarser and to finer grids."""
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("torch_harmonics")
    torch.manual_seed(0)
    make = peers.NeighborhoodAttentionS2 if local else peers.AttentionS2
    peer = make(in_channels=6, num_heads=2, in_shape=in_shape, out_shape=out_shape, grid_in=grids[0], grid_out=grids[1], k_channels=4, out_channels=8,
                use_qknorm=norm)
    layer = (geometry.NeighborhoodAttentionS2 if local else geometry.AttentionS2)(
        6, 2, in_shape, out_shape, grids=grids, key_features=4, out_features=8, qk_norm=norm, rngs=nnx.Rngs(0))
    for name, prefix in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj")):
        ours, bias = getattr(layer, name), getattr(peer, f"{prefix}_bias")
        torch.nn.init.normal_(bias, std=0.3)
        ours.kernel.set_value(getattr(peer, f"{prefix}_weights").detach().numpy()[:, :, 0, 0].T.reshape(ours.kernel.shape))
        ours.bias.set_value(bias.detach().numpy().reshape(ours.bias.shape))
    if norm:
        for ours, theirs in ((layer.query_norm, peer.q_norm_weights), (layer.key_norm, peer.k_norm_weights)):
            torch.nn.init.normal_(theirs, std=0.3)
            ours.scale.set_value(1 + theirs.detach().numpy())
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=(2, 6, *shape)).astype(np.float32) for shape in (out_shape, in_shape))
    expected = peer(*map(torch.tensor, (x, context, context))).detach().numpy().transpose(0, 2, 3, 1)
    got = layer(*(jnp.asarray(field.transpose(0, 2, 3, 1)) for field in (x, context)))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_masked_points():
    """A layer does not see points that are masked."""
    layer = geometry.NeighborhoodAttentionS2(8, 2, SHAPE, theta_cutoff=1.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, *SHAPE, 8))
    sea = jnp.arange(5)[None, :, None] + 0 * jnp.arange(8) > 1
    other = x.at[:, :2].set(7.0)
    apply = nnx.jit(lambda layer, x: layer(x, key_mask=sea))
    np.testing.assert_allclose(apply(layer, x)[:, 2:], apply(layer, other)[:, 2:], atol=1e-6)


def test_refusals():
    """Grids that do not fit each other, and options that do not exist."""
    x = jnp.ones((1, 5, 8, 1, 4))
    with pytest.raises(ValueError, match="out_shape: expected a number of longitudes"):
        geometry.s2_neighborhood_attention(x, x[:, :, :6], x[:, :, :6])
    with pytest.raises(ValueError, match="grid: expected one of"):
        geometry.s2_attention(x, x, x, grid="healpix")
    with pytest.raises(ValueError, match="theta_cutoff: expected a positive"):
        geometry.s2_neighborhood_index(SHAPE, SHAPE, theta_cutoff=0.0)
    with pytest.raises(ValueError, match="key_mask: expected bool"):
        geometry.s2_attention(x, x, x, key_mask=jnp.ones((1, 5), bool))
    with pytest.raises(ValueError, match="key_features: expected a multiple"):
        geometry.AttentionS2(8, 2, SHAPE, key_features=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="context: expected shape"):
        geometry.AttentionS2(8, 2, SHAPE, (3, 4), rngs=nnx.Rngs(0))(jnp.ones((1, 3, 4, 8)))
