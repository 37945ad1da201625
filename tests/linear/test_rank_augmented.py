"""RALA: its equation, the weights of tokens, ranks, the layer, the block and the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import linear, models
from attnx.core import linear as engine
from attnx.positions import AxialRotary

B, T, N, H = 2, 15, 2, 8
rala = jax.jit(linear.rala, static_argnames=("position", "augment_kv", "implementation"))


def inputs(dtype=jnp.float64, heads=N, seed=0):
    shapes = (B, T, N, H), (B, T, heads, H), (B, T, heads, H)
    return [jax.random.normal(jax.random.key(seed + i), shape, dtype) for i, shape in enumerate(shapes)]


def pairs(x, angles):
    """Pairs of channels of [..., H] as complex numbers, turned."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * jnp.exp(1j * angles)
    return jnp.stack([z.real, z.imag], -1).reshape(x.shape)


def turned(x, width=5):
    """By row and column; angles 10000^-linspace(0, 1, H / 4)."""
    speed = 10000.0 ** -jnp.linspace(0, 1, H // 4)
    p = jnp.arange(T)[:, None, None]
    return pairs(x, jnp.concatenate([p // width * speed, p % width * speed], -1))


def written(query, key, value, rotate=True):
    """The released layer's attention, step by step."""
    q, k = (jax.nn.elu(x) + 1 for x in (query, key))
    e = jax.nn.softmax(jnp.einsum("bnh,btnh->btn", q.mean(1), k) / H**0.5, axis=1)
    k = T * e[..., None] * k
    z = 1 / (jnp.einsum("btnh,bnh->btn", q, k.mean(1)) + 1e-6)
    qr, kr = (turned(q), turned(k)) if rotate else (q, k)
    return z[..., None] * jnp.einsum("btnh,bnhv->btnv", qr, jnp.einsum("btnh,btnv->bnhv", kr, value) / T)


def test_equation(x64):
    for rotate in (True, False):
        out = rala(*inputs(), position=AxialRotary(5) if rotate else None)
        np.testing.assert_allclose(out, written(*inputs(), rotate=rotate), atol=2e-6)  # the released denominator has 1e-6 more


def test_weights(x64):
    """Without positions rows of weights sum to one, and are linear attention's where all tokens count alike; tokens weigh one on average."""
    query, key, _ = inputs()
    ones = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, N, T))
    for augment_kv in (True, False):
        np.testing.assert_allclose(rala(query, key, ones, augment_kv=augment_kv).sum(-1), 1, atol=1e-12)
    plain = engine.linear_attention(query, key, ones, is_causal=False, normalize=True, feature_map=linear.elu_plus_one)
    np.testing.assert_allclose(rala(query, key, ones, augment_kv=False), plain, atol=1e-12)
    weights = linear.token_weights(query, key)
    np.testing.assert_allclose(weights.mean(1), 1, atol=1e-12)
    assert weights.std() > 0.1
    np.testing.assert_allclose(weights[0, :, 1] / T, jax.nn.softmax(key[0, :, 1] @ query[0, :, 1].mean(0) / H**0.5), atol=1e-12)


def test_order_does_not_matter(x64):
    """Without positions tokens may be permuted."""
    args, order = inputs(), jax.random.permutation(jax.random.key(3), T)
    np.testing.assert_allclose(rala(*(x[:, order] for x in args)), rala(*args)[:, order], atol=1e-12)


def test_grouped_heads_and_masks(x64):
    """Fewer key heads; tokens that are not there are as if cut out."""
    args, seen = inputs(heads=1), jnp.broadcast_to(jnp.arange(T) % 3 != 1, (B, T))
    there = np.flatnonzero(seen[0])
    for augment_kv in (True, False):
        out = rala(*args, mask=seen, augment_kv=augment_kv)
        np.testing.assert_allclose(out[:, there], rala(*(x[:, there] for x in args), augment_kv=augment_kv), atol=1e-12)
        assert not jnp.delete(out, there, axis=1).any()


def test_ranks():
    """What is read of a sum of H x H has at most rank H; times numbers of its own it has more. Weighing tokens changes the sum."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 1, 16))
    y = rala(q, k, v)
    alone, times = (linear.output_rank(x[0, :, 0]) for x in (y, y * jax.random.normal(jax.random.key(1), y.shape)))
    assert alone.numerical <= 16 and alone.effective <= 16
    wide = jnp.concatenate([y[0, :, 0]] * 4, -1)
    assert linear.output_rank(wide).numerical <= 16 < linear.output_rank(wide * jax.random.normal(jax.random.key(1), wide.shape)).numerical
    assert times.effective > alone.effective
    assert linear.kv_rank(linear.elu_plus_one(k), v).numerical[0, 0] <= 16
    assert linear.kv_rank(jnp.ones((1, 9, 1, 4)), v[:, :9]).numerical[0, 0] == 1


def test_axial_rotary(x64):
    """Norms are kept, scores depend on the displacement in the plane alone, and angles are the released ones."""
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, H))
    both = AxialRotary(5)(*(jnp.broadcast_to(row, (1, T, 1, H)) for row in (x[:, :, :1], x[:, :, 1:])))
    np.testing.assert_allclose(jnp.linalg.norm(both[0], axis=-1), jnp.linalg.norm(x[0, 0, 0]), rtol=1e-12)
    scores = jnp.einsum("btnh,bsnh->ts", *both)
    for i, j in ((0, 6), (1, 12), (0, 7)):
        np.testing.assert_allclose(scores[i, j], scores[i + 2, j + 2], atol=1e-12)
    assert abs(scores[0, 1] - scores[0, 5]) > 1e-3
    np.testing.assert_allclose(both[0], turned(jnp.broadcast_to(x[:, :, :1], (1, T, 1, H))), atol=1e-12)


def test_layer():
    """The layer written out; without its parts it lacks their parameters; every parameter has a slope."""
    layer, x = linear.RALA2d(16, N, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (B, 3, 5, 16))
    q, k, v, o = jnp.split(layer.project(x), 4, -1)
    y = written(*(part.reshape(B, T, N, H) for part in (q, k, v))).reshape(x.shape)
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x), layer.out((y + layer.near(v)) * o), atol=1e-5)
    for each in (layer, linear.SoftmaxModulated2d(16, N, rngs=nnx.Rngs(0))):
        block = linear.RavltBlock(16, each, 24, drop_rate=0.999, rngs=nnx.Rngs(1))
        graph, params, rest = nnx.split(block, nnx.Param, ...)
        loss = lambda params, key: (lambda out: (jnp.sum(out**2), out))(nnx.merge(graph, params, rest)(x, dropout_key=key))
        slopes, _ = jax.jit(jax.grad(loss, has_aux=True))(params, None)
        assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(slopes))
    np.testing.assert_allclose(loss(params, jax.random.key(0))[1], x + block.position(x), atol=1e-6)  # hardly a branch is kept
    bare = linear.RALA2d(16, N, augment_kv=False, modulate=False, convolve=False, rotate=False, rngs=nnx.Rngs(0))
    assert bare.project.kernel.shape == (16, 48) and bare.near is None and bare(x).shape == x.shape


def test_model():
    """Two small stages train and evaluate at any size; the published tiny model has its published size."""
    config = models.RAVLTConfig((models.Stage(8, 1, 1), models.Stage(16, 1, 2, softmax=True)), classes=5, projection=12)
    model, x = models.RAVLT(config, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 17, 24, 3))
    model.train()
    assert nnx.jit(lambda model, x: model(x, dropout_key=jax.random.key(1)))(model, x).shape == (2, 5)
    model.eval()
    call = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(call(model, x.at[1].mul(2.0))[0], call(model, x)[0], atol=1e-4)
    tiny = nnx.eval_shape(lambda: models.RAVLT(models.RAVLTConfig.tiny(), rngs=nnx.Rngs(0)))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(nnx.state(tiny, nnx.Param)))
    assert 14e6 < count < 16e6


def test_errors():
    query, key, value = inputs(jnp.float32)
    for match, args, options in (("key: expected the query's length", (query, key[:, 1:], value[:, 1:]), {}), ("mask: expected booleans", (query, key, value), dict(
            mask=jnp.ones((B, 3), bool)))):
        with pytest.raises(ValueError, match=match):
            linear.rala(*args, **options)
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        linear.RALA2d(16, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="x: expected shape"):
        linear.RALA2d(16, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 16)))
