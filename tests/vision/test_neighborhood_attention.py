"""Neighbourhood attention in images: loops, the two steps, equivariance, classes of a dilation, layers, models."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, models, vision

B, N, K, H = 2, 4, 2, 8


def inputs(grid, window=None, dtype=jnp.float64):
    """Query, key, value and biases."""
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((B, *grid, heads, H)) for heads in (N, K, K)]
    if window is not None:
        arrays.append(random.standard_normal((N, *(2 * w - 1 for w in window))))
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def by_loops(query, key, value, bias, window, dilation):
    """The definition, pixel by pixel."""
    grid, out = query.shape[1:-2], np.zeros(query.shape)
    for place in itertools.product(*map(range, grid)):
        axes = []
        for i, n, w, d in zip(place, grid, window, dilation):
            size = len(range(i % d, n, d))
            start = min(max(i // d - w // 2, 0), size - w)
            axes.append([((start + a) * d + i % d, start + a - i // d + w - 1) for a in range(w)])
        for n in range(N):
            seen = list(itertools.product(*axes))
            at = tuple(np.array([[pair[0] for pair in one] for one in seen]).T)
            entry = tuple(np.array([[pair[1] for pair in one] for one in seen]).T)
            kv = n // (N // K)
            s = np.einsum("bh,bph->bp", query[:, *place, n], key[:, *at, kv]) / np.sqrt(H) + bias[n][entry]
            w = np.exp(s - s.max(-1, keepdims=True))
            out[:, *place, n] = np.einsum("bp,bph->bh", w / w.sum(-1, keepdims=True), value[:, *at, kv])
    return out


@pytest.mark.parametrize(("grid", "window", "dilation"), [((7,), (3,), (2,)), ((5, 6), (4, 3), (1, 2)), ((3, 4, 3), (2, 3, 1), (1, 1, 2))], ids=["1-D", "2-D", "3-D"])
def test_definition(x64, grid, window, dilation):
    """By loops, by tiles and in two steps, with all gradients, of the biases too."""
    args = inputs(grid, window)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(args[0].shape))
    expected = by_loops(*map(np.asarray, args), window, dilation)

    def tiled(q, k, v, bias, implementation):
        tile = (2,) * len(grid)
        return masks.neighborhood_attention(q, k, v, window, dilation=dilation, bias=bias, implementation=implementation, query_tile=tile, key_tile=tile)

    def two_steps(q, k, v, bias):
        return vision.neighborhood_av(jax.nn.softmax(vision.neighborhood_qk(q, k, window, dilation=dilation, bias=bias)), v, window, dilation=dilation)

    forms = [two_steps, *(lambda *args, name=name: tiled(*args, name) for name in ("reference", "blockwise"))]
    found = [jax.jit(jax.value_and_grad(lambda args, form=form: (lambda out: (jnp.vdot(out, cotangent), out))(form(*args)), has_aux=True))(args) for form in forms]
    for (_, out), slopes in found:
        np.testing.assert_allclose(out, expected, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), slopes, found[0][1])


def test_ends_of_the_range(x64):
    """A window as large as the grid is full attention with the same biases; one of 1 returns values."""
    (q, k, v, bias), grid = inputs((4, 5), (4, 5)), (4, 5)
    place = np.stack(np.unravel_index(np.arange(20), grid), -1)
    dy, dx = np.moveaxis(place[None] - place[:, None], -1, 0)
    flat = lambda x: x.reshape(B, 20, *x.shape[3:])
    full = attnx.attention(*map(flat, (q, k, v)), scores=attnx.scores.bias(bias[:, dy + 3, dx + 4][None]), implementation="reference")
    np.testing.assert_allclose(flat(masks.neighborhood_attention(q, k, v, grid, bias=bias)), full, atol=1e-12)
    np.testing.assert_allclose(vision.neighborhood_av(jax.nn.softmax(vision.neighborhood_qk(q, k, 1)), v, 1), np.repeat(v, N // K, -2), atol=1e-12)


def test_translation_and_residues(x64):
    """Away from borders outputs move with the input; with a dilation they do for multiples of it, and a class does not influence another."""
    q, k, v = inputs((12, 12))
    moved = lambda x, by: jnp.roll(x, by, (1, 2))
    for window, dilation, by in ((3, 1, (1, 1)), (3, 2, (2, 2))):
        attend = jax.jit(lambda *args, window=window, dilation=dilation: masks.neighborhood_attention(*args, window, dilation=dilation))
        here, there = moved(attend(q, k, v), by), attend(*(moved(x, by) for x in (q, k, v)))
        inside = slice(5, -3)
        np.testing.assert_allclose(there[:, inside, inside], here[:, inside, inside], atol=1e-12)
    others = jnp.asarray((np.arange(12)[:, None] % 2 == 1) | (np.arange(12) % 2 == 1))[None, :, :, None, None]
    changed = attend(*(jnp.where(others, 3 * x + 1, x) for x in (q, k, v)))
    np.testing.assert_allclose(changed[:, ::2, ::2], attend(q, k, v)[:, ::2, ::2], atol=1e-12)


@pytest.mark.parametrize("dilation", [(3,), (2, 3), (1, 2, 2)])
def test_partition(dilation):
    grid = (7, 8, 5)[:len(dilation)]
    x = jnp.arange(2 * np.prod(grid) * 3).reshape(2, *grid, 3)
    parts = vision.dilation_partition(x, dilation)
    assert len(parts) == np.prod(dilation) and sum(part.size for part in parts) == x.size
    np.testing.assert_array_equal(vision.dilation_merge(parts, dilation), x)
    with pytest.raises(ValueError, match="parts: expected"):
        vision.dilation_merge(parts[1:] + parts, dilation)


def test_layer():
    """Its biases are used and learn; bfloat16 goes through; a grid smaller than the window is refused, not filled up."""
    layer = vision.NeighborhoodAttention(16, 2, 3, dilation=2, rngs=nnx.Rngs(0))
    assert layer.bias.shape == (2, 5, 5) and 0 < jnp.abs(layer.bias[...]).max() < 0.1
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 7, 16)), jnp.float32)
    slopes = nnx.jit(nnx.grad(lambda layer: (layer(x) ** 2).sum()))(layer)
    assert jnp.abs(slopes["bias"][...]).min() > 0
    half = vision.NeighborhoodAttention(16, 2, 3, relative_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16 and half.bias is None
    with pytest.raises(ValueError, match="dilation: expected"):
        layer(x[:, :5])
    with pytest.raises(ValueError, match="window: expected"):
        layer(x[:, :2])
    with pytest.raises(ValueError, match=r"bias: expected shape \(2, 5, 5\)"):
        masks.neighborhood_attention(*(x.reshape(1, 6, 7, 2, 8),) * 3, 3, bias=layer.bias[...][:1])


@pytest.mark.parametrize(("config", "millions"), [(models.NATConfig.mini(), 20), (models.NATConfig.tiny(), 28), (models.NATConfig.small(), 51),
                                                  (models.NATConfig.base(), 90), (models.DiNATConfig.mini(), 20), (models.DiNATConfig.large(), 201),
                                                  (models.DiNATConfig.swin("tiny"), 28), (models.DiNATConfig.swin("small"), 50),
                                                  (models.DiNATConfig.swin("base"), 88), (models.DiNATConfig.swin("large"), 197)])
def test_sizes_of_the_papers(config, millions):
    """The numbers of parameters that the papers report, in millions (200 of the largest), and blocks dilated in turn."""
    model = nnx.eval_shape(lambda: models.NAT(config, rngs=nnx.Rngs(0)))
    assert round(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1e6) == millions
    for stage, blocks in enumerate(model.stages):
        expected = [config.dilations[stage] if config.dilations and index % 2 else 1 for index in range(len(blocks))]
        assert [block.attention.dilation for block in blocks] == expected


@pytest.mark.parametrize("patches", [False, True])
def test_model(patches):
    """Two stages with gradients everywhere; stochastic depth needs a key and keeps the mean."""
    config = models.DiNATConfig(8, (1, 2), (2, 2), window=2, dilations=(2, 1), drop_rate=0.5, layer_scale=0.5, patches=patches, classes=3)
    model = models.NAT(config, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 16, 3)), jnp.float32)
    run = nnx.jit(lambda model, key=None: model(x, dropout_key=key))
    out, slopes = run(model), nnx.jit(nnx.grad(lambda model: (model(x) ** 2).sum()))(model)
    assert out.shape == (2, 3) and all(jnp.abs(slope).max() > 0 for slope in jax.tree.leaves(slopes))
    assert not np.allclose(run(model, jax.random.key(0)), out)
    with pytest.raises(ValueError, match="x: expected shape"):
        model(x[..., :1])
