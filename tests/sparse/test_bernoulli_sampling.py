"""YOSO: the law of collisions, unbiased samples and their variance, both forms and their gradients, padding, and the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import sparse, weights
from attnx.sparse.bernoulli_sampling import unit

B, T, S, N, K, H, V = 2, 7, 9, 4, 2, 8, 3
BITS, HASHES = 3, 6
STATIC = ("bits", "hashes", "hash", "gradient", "implementation")
sample = jax.jit(sparse.yoso_sample, static_argnames=STATIC)
expectation = jax.jit(sparse.yoso_expectation, static_argnames=STATIC)
KEY = jax.random.key(7)


def inputs(dtype=jnp.float32):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V))
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def probability(q, k, bits):
    dots = jnp.einsum("btnh,bsnh->bnts", unit(q), jnp.repeat(unit(k), N // K, 2))
    return (1 - jnp.arccos(jnp.clip(dots, -1, 1)) / jnp.pi) ** bits


def test_expectation():
    """Written out; a key like the query has weight 1, its opposite 0."""
    q, k, v = inputs()
    expected = jnp.einsum("bnts,bsnv->btnv", probability(q, k, BITS), jnp.repeat(v, N // K, 2))
    np.testing.assert_allclose(expectation(q, k, v, bits=BITS), expected, atol=1e-5)
    odd = (jnp.arange(S) % 2)[:, None, None]
    near = jnp.where(odd, -1, 1) * jnp.broadcast_to(q[:, :1, :1], k.shape)
    counted = jnp.broadcast_to(jnp.where(odd, 100.0, 1.0), v.shape)  # five ones beside what is not to be found
    np.testing.assert_allclose(expectation(jnp.broadcast_to(q[:, :1, :1], q.shape), near, counted, bits=BITS), 5, atol=1e-2)


@pytest.mark.parametrize("hash", ["gaussian", "hadamard"])
def test_law_of_collisions(hash):
    """Codes are equal as often as the formula says; always for a vector itself and never for its opposite."""
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 64))
    dots = jnp.linspace(-0.8, 0.9, 5)
    other = jax.random.normal(jax.random.key(1), (1, 5, 1, 64))
    other = unit(other - jnp.sum(other * unit(x), -1, keepdims=True) * unit(x))
    y = dots[:, None, None] * unit(x) + jnp.sqrt(1 - dots**2)[:, None, None] * other
    codes = jax.jit(lambda x: sparse.lsh_codes(KEY, x, bits=2, hashes=20_000, kind=hash))
    own, met = codes(x), codes(jnp.concatenate([y, 3 * x, -x], 1))
    rates = (own == met).mean((0, 1, 3))
    np.testing.assert_allclose(rates[:5], (1 - jnp.arccos(dots) / jnp.pi) ** 2, atol=0.01)
    assert rates[5] == 1 and rates[6] == 0


def test_unbiased():
    """The mean of 2000 single tables is the expectation within four standard errors; a pair's variance is at most P (1 - P); more tables vary less, as 1 / m."""
    q, k, _ = inputs()
    one_hot = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, K, S))  # outputs are the weights
    single = jax.jit(jax.vmap(lambda key: sparse.yoso_sample(key, q, k, one_hot, bits=BITS, hashes=1)))(jax.random.split(KEY, 2000))
    p = jnp.moveaxis(probability(q, k, BITS), 1, 2)
    assert (jnp.abs(single.mean(0) - p) <= 4.5 * jnp.sqrt(p * (1 - p) / 2000) + 1e-4).all()
    assert (single.var(0) <= p * (1 - p) + 4.5 * jnp.sqrt(p / 2000)).all()
    sizes = np.array([1, 4, 16])
    variances = [single[:1920].reshape(-1, size, *single.shape[1:]).mean(1).var(0).mean() for size in sizes]
    slope = np.polyfit(np.log(sizes), np.log(variances), 1)[0]
    assert abs(slope + 1) < 0.1


@pytest.mark.usefixtures("x64")
def test_tables_are_pairs_of_codes():
    """Both forms agree, forward and in all three gradients; that of values is the output's map transposed."""
    q, k, v = inputs(jnp.float64)
    slope = jax.random.normal(jax.random.key(5), (B, T, N, V), jnp.float64)

    def run(implementation):
        out, back = jax.vjp(lambda *args: sparse.yoso_sample(KEY, *args, bits=BITS, hashes=HASHES, implementation=implementation), q, k, v)
        return out, back(slope)

    pairs, tables = jax.jit(lambda: run("reference"))(), jax.jit(lambda: run("gathered"))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), tables, pairs)
    np.testing.assert_allclose(jnp.vdot(pairs[0], slope), jnp.vdot(v, pairs[1][2]), atol=1e-10)
    codes = [sparse.lsh_codes(KEY, unit(x), bits=BITS, hashes=HASHES, kv_heads=K) for x in (q, k)]
    share = (codes[0].transpose(1, 3, 0, 2)[..., None] == jnp.repeat(codes[1], N // K, 3).transpose(1, 3, 0, 2)[..., None, :]).mean(2, dtype=v.dtype)
    np.testing.assert_allclose(pairs[0], jnp.einsum("bnts,bsnv->btnv", share, jnp.repeat(v, N // K, 2)), atol=1e-12)

    def surrogate(q, k):  # of slope bits / 2 times the share that meets
        dots = jnp.einsum("btnh,bsnh->bnts", unit(q), jnp.repeat(unit(k), N // K, 2))
        return jnp.vdot(jnp.einsum("bnts,bsnv->btnv", BITS / 2 * share * dots, jnp.repeat(v, N // K, 2)), slope)

    for a, b in zip(pairs[1][:2], jax.grad(surrogate, (0, 1))(q, k)):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradients_of_the_expectation():
    """The lower bound is bits / 2 times the weight, finite where query and key are one, and below the exact slope."""
    s = jnp.array([-0.9, 0.0, 0.5, 0.99, 1.0])
    bound, exact = (jax.vmap(jax.value_and_grad(lambda s: w.weight(s, ())))(s) for w in (weights.collision(BITS), weights.collision(BITS, gradient="exact")))
    np.testing.assert_allclose(bound[0], (1 - jnp.arccos(s) / jnp.pi) ** BITS, atol=1e-12)
    np.testing.assert_allclose(bound[1], BITS / 2 * bound[0], atol=1e-12)
    np.testing.assert_allclose(exact[0], (1 - jnp.arccos(0.98 * s) / jnp.pi) ** BITS, atol=1e-12)
    slope = 0.98 * BITS * (1 - jnp.arccos(0.98 * s) / jnp.pi) ** (BITS - 1) / (jnp.pi * jnp.sqrt(1 - (0.98 * s) ** 2))
    np.testing.assert_allclose(exact[1], slope, atol=1e-12)
    assert (bound[1][:4] <= slope[:4] / 0.98 + 0.05).all()
    q, k, v = inputs(jnp.float64)
    slope = jnp.ones((B, T, N, V))
    for sampled, expected in (("lower_bound_expectation", "lower_bound"), ("exact_expectation", "exact")):
        got = jax.jit(jax.grad(lambda q, k: jnp.vdot(sparse.yoso_sample(KEY, q, k, v, bits=BITS, hashes=HASHES, gradient=sampled), slope), (0, 1)))(q, k)
        wanted = jax.jit(jax.grad(lambda q, k: jnp.vdot(sparse.yoso_expectation(q, k, v, bits=BITS, gradient=expected), slope), (0, 1)))(q, k)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), got, wanted)


def test_padding_and_order():
    """Padded keys are in no table, padded queries find zero; the order of keys does not matter."""
    q, k, v = inputs()
    common = dict(bits=BITS, hashes=HASHES, implementation="gathered")
    out = sample(KEY, q, k, v, **common)
    order = jnp.array([3, 1, 0, 2, 8, 5, 7, 6, 4])
    np.testing.assert_allclose(sample(KEY, q, k[:, order], v[:, order], **common), out, atol=1e-6)
    places = jnp.where(jnp.arange(S) < 6, jnp.arange(S), -1)
    padded = sample(KEY, q, k, v, key_positions=places, query_positions=places[:T], **common)
    np.testing.assert_allclose(padded[:, :6], sample(KEY, q, k[:, :6], v[:, :6], **common)[:, :6], atol=1e-6)
    assert not padded[:, 6].any()
    expected = expectation(q, k, v, bits=BITS, key_positions=places, query_positions=places[:T])
    assert not expected[:, 6].any()


OPTIONS = {"sampled": dict(hashes=4, window=3), "expected": dict(hashes=None), "hadamard": dict(hashes=4, hash="hadamard", num_kv_heads=1)}


@pytest.mark.parametrize("name", OPTIONS)
def test_layer(name):
    """Unit outputs plus a convolution of the values in torch's terms; keys of randomness matter in samples alone; every parameter has a gradient."""
    layer = sparse.YosoAttention(16, 2, bits=2, rngs=nnx.Rngs(0), **OPTIONS[name])
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    run = jax.jit(lambda params, x, key: nnx.merge(graph, params, rest)(x, dropout_key=key))
    one, other = run(params, x, jax.random.key(1)), run(params, x, jax.random.key(2))
    assert bool(jnp.allclose(one, other)) == (name == "expected")
    found = layer.mechanism(*(p(x) for p in (layer.query, layer.key, layer.value)))
    if name == "sampled":
        torch = pytest.importorskip("torch")
        value, kernel = (torch.from_numpy(np.array(y)) for y in (layer.value(x), layer.mechanism.kernel[...]))
        near = torch.nn.functional.conv2d(value.permute(0, 2, 1, 3), kernel.T[:, None, :, None], padding=(1, 0), groups=2)
        found = found - near.permute(0, 2, 1, 3).numpy()
    lengths = jnp.linalg.norm(found, axis=-1)
    np.testing.assert_allclose(lengths, jnp.where(lengths > 0.5, 1, 0), atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(run(params, x, KEY) ** 3)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_errors():
    q, k, v = inputs()
    for match, options in (("gradient: expected", dict(gradient="none")), ("kind: expected", dict(hash="simhash")),
                           ("bits: expected at most 8", dict(hash="hadamard", bits=9))):
        with pytest.raises(ValueError, match=match):
            sparse.yoso_sample(KEY, q, k, v, **options)
    with pytest.raises(NotImplementedError, match="'gathered'"):
        sparse.yoso_sample(KEY, q, k, v, implementation="pallas")
    with pytest.raises(ValueError, match="shrink: expected a factor"):
        weights.collision(3, gradient="exact", shrink=1.0)
    layer = sparse.YosoAttention(16, 2, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="no streaming form"):
        layer.init_state(1, 4)
