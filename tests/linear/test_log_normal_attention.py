"""Linear log-normal attention: its forms, its distribution, what cancels, what it may not see, the blocks beside it, and the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import analysis, linear, masks

B, T, N, K, H, HV = 2, 17, 4, 2, 8, 6
ALPHA, BETA = jnp.array([1.0, 0.5, 2.0, 1.5]), jnp.array([1.0, 2.0])
attend = jax.jit(linear.lln_attention, static_argnames=("is_causal", "implementation", "chunk_size"))


def inputs(dtype=jnp.float64, seed=0):
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, HV)
    return [jax.random.normal(jax.random.key(seed + i), shape, dtype) for i, shape in enumerate(shapes)]


def naive(query, key, value, alpha=ALPHA, beta=BETA, allowed=True):
    """The matrix of weights."""
    q, k = jnp.exp(alpha[:, None] * query), jnp.repeat(jnp.exp(beta[:, None] * key), 2, 2)
    weights = jnp.einsum("btnh,bsnh->bnts", q, k) * allowed
    return jnp.einsum("bnts,bsnv->btnv", weights / weights.sum(-1, keepdims=True), jnp.repeat(value, 2, 2))


@pytest.mark.parametrize("is_causal", [True, False])
def test_forms(x64, is_causal):
    """Linear, and token by token, are the matrix, forward and backward."""
    args = inputs()
    allowed = jnp.tril(jnp.ones((T, T))) if is_causal else 1.0

    def graded(f):
        loss = lambda *args: (lambda out: (jnp.sum(jnp.sin(out)), out))(f(*args))
        slopes, out = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(*args, ALPHA, BETA)
        return out, *slopes

    expected = graded(lambda *args: naive(*args, allowed=allowed))
    for a, b in zip(graded(lambda *args: linear.lln_attention(*args, is_causal=is_causal, chunk_size=4)), expected):
        np.testing.assert_allclose(a, b, atol=1e-11)
    if is_causal:
        step = jax.jit(linear.lln_step)
        state, first = step(linear.lln_init(B, K, H, HV, dtype=jnp.float64), *(x[:, :16] for x in args), ALPHA, BETA)
        _, last = step(state, *(x[:, 16:] for x in args), ALPHA, BETA)
        np.testing.assert_allclose(jnp.concatenate([first, last], 1), expected[0], atol=1e-11)


def test_what_cancels(x64):
    """A constant added to all channels of a query, or to all keys; and with alpha = beta = 0 all weigh alike."""
    query, key, value = inputs()
    for is_causal in (True, False):
        out = attend(query, key, value, ALPHA, BETA, is_causal=is_causal)
        moved = attend(query.at[:, 3].add(50.0), key + 300.0, value, ALPHA, BETA, is_causal=is_causal)
        np.testing.assert_allclose(moved, out, atol=1e-9)
    means = jnp.cumsum(value, axis=1) / jnp.arange(1, T + 1)[:, None, None]
    np.testing.assert_allclose(attend(query, key, value, 0.0, 0.0), jnp.repeat(means, 2, 2), atol=1e-12)


def test_large_keys_hide_nothing():
    """A key so large that all others vanish beside it changes nothing before it, nor in another document, and is all that is seen after it; in float32."""
    query, key, value = inputs(jnp.float32)
    ids = jnp.broadcast_to(jnp.arange(T) >= 12, (B, T)).astype(jnp.int32)
    large = key.at[:, 8].add(1000.0)
    out, changed = (attend(query, k, value, 1.0, 1.0, segment_ids=ids) for k in (key, large))
    np.testing.assert_allclose(changed[:, :8], out[:, :8], atol=1e-6)
    np.testing.assert_allclose(changed[:, 12:], out[:, 12:], atol=1e-6)
    np.testing.assert_allclose(changed[:, 8:12], jnp.broadcast_to(jnp.repeat(value[:, 8:9], 2, 2), (B, 4, N, HV)), atol=1e-5)
    slopes = jax.grad(lambda *args: jnp.sum(attend(*args, value, 1.0, 1.0) ** 2), (0, 1))(query, large)
    assert all(jnp.isfinite(x).all() for x in slopes)


def test_documents(x64):
    args = inputs()
    ids = jnp.broadcast_to(jnp.where(jnp.arange(T) == 3, -1, jnp.arange(T) >= 9), (B, T)).astype(jnp.int32)
    packed = attend(*args, ALPHA, BETA, segment_ids=ids)
    np.testing.assert_allclose(packed[:, 9:], naive(*(x[:, 9:] for x in args), allowed=jnp.tril(jnp.ones((8, 8)))), atol=1e-12)
    assert not packed[:, 3].any()
    blocks = linear.block_diag_attention(*args, block=5, segment_ids=ids)
    assert not blocks[:, 3].any() and jnp.isfinite(blocks).all()


def test_log_variance(x64):
    """With the published constants the weights of heads of 64 have about the log-variance of softmax's at all temperatures, elu + 1 hardly any; constants
    that are fitted serve other sizes better."""
    def ratio(size, s, constants=(0.14855178, -0.35487039)):
        q, k = s * jax.random.normal(jax.random.key(0), (2, 512, size))
        alpha, beta = linear.moment_match(jnp.std(q), jnp.std(k), *constants)
        softmax = jax.nn.softmax(q @ k.T / size**0.5)
        of = lambda q, k: analysis.log_variance(q @ k.T / (q @ k.sum(0))[:, None]) / analysis.log_variance(softmax)
        return float(of(jnp.exp(alpha * q), jnp.exp(beta * k))), float(of(linear.elu_plus_one(q), linear.elu_plus_one(k)))

    for s in (0.8, 1.0, 1.2, 1.6):
        lln, elu = ratio(64, s)
        assert abs(lln - 1) <= 0.35 and elu < 0.03
    for size in (32, 128):
        fitted, published = (abs(ratio(size, 1.0, constants)[0] - 1) for constants in (linear.fit_moment_constants(size), (0.14855178, -0.35487039)))
        assert fitted < 0.2 and fitted < published


def test_measures(x64):
    uniform = jnp.full((9, 9), 1 / 9)
    np.testing.assert_allclose(analysis.row_entropy(uniform), np.log(9), rtol=1e-12)
    np.testing.assert_allclose(analysis.row_entropy(jnp.eye(9)), 0)
    np.testing.assert_allclose(analysis.spectral_gap(jnp.stack([uniform, jnp.eye(9), 0.75 * jnp.eye(9) + 0.25 * uniform])), [1, 0, 0.25], atol=1e-9)
    with pytest.raises(ValueError, match="weights: expected shape"):
        analysis.spectral_gap(jnp.ones((2, 3)))


def test_blocks(x64):
    """Softmax attention where one block holds all, and block by block where not; the remainder is a block. The mixes are what they say."""
    args, diag = inputs(), None
    for is_causal in (True, False):
        mask = masks.causal() if is_causal else None
        whole, parts, plain, cut = jax.jit(lambda *args: (
            linear.block_diag_attention(*args, block=20, is_causal=is_causal), linear.block_diag_attention(*args, is_causal=is_causal),
            attnx.attention(*args, mask=mask), [attnx.attention(*(x[:, i:i + H] for x in args), mask=mask) for i in range(0, T, H)]))(*args)
        np.testing.assert_allclose(whole, plain, atol=1e-12)
        np.testing.assert_allclose(parts, jnp.concatenate(cut, 1), atol=1e-12)
        diag = parts if is_causal else diag
    lln, r, p = attend(*args, ALPHA, BETA), *jax.random.uniform(jax.random.key(3), (2, N, HV))
    mixes = {"average": ((), (lln + diag) / 2), "learnable_scale": ((r, p), r * lln + p * diag), "learnable_ratio": ((r,), r * lln + (1 - r) * diag)}
    mixed = jax.jit(lambda *args: {mode: linear.lln_diag(*args, ALPHA, BETA, mode=mode, mix=mix) for mode, (mix, _) in mixes.items()})(*args)
    for mode, (_, expected) in mixes.items():
        np.testing.assert_allclose(mixed[mode], expected, atol=1e-12)


@pytest.mark.parametrize("mode", ["average", "learnable_scale", "learnable_ratio", None])
def test_layer(mode):
    """Prefill and steps find what the call finds; deviations are kept, not trained, all else is trained."""
    layer = linear.LLNAttention(16, 4, num_kv_heads=2, mode=mode, block=4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    layer.observe(x)
    np.testing.assert_allclose(layer.mechanism.sigma_key[...], layer.key(x).std((0, 1, 3)), rtol=1e-5)
    np.testing.assert_allclose(layer.mechanism.sigma_query[...], layer.query(x).reshape(2, 9, 2, 8).std((0, 1, 3)), rtol=1e-5)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        state, first = layer.step(layer.init_state(batch=2, max_length=9), x[:, :6])
        outs = [first]
        for t in range(6, 9):
            state, out = layer.step(state, x[:, t:t + 1])
            outs.append(out)
        return layer(x), jnp.concatenate(outs, 1)

    np.testing.assert_allclose(*both(params, x), atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert len(jax.tree.leaves(slopes)) == 4 + {"learnable_scale": 2, "learnable_ratio": 1}.get(mode, 0) and all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))
    short, long = (jax.eval_shape(lambda length=length: layer.init_state(1, length)) for length in (64, 4096))
    assert jax.tree.map(lambda x: x.shape, short) == jax.tree.map(lambda x: x.shape, long)


def test_statistics():
    """Kept deviations keep the future and the batch out; those of the call let both in, and have no streaming form."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    future, other = x.at[:, 6:].mul(3.0), x.at[1].mul(3.0)
    for statistics, sees in (("frozen", False), ("head", True), ("batch", True)):
        layer = linear.LLNAttention(16, 4, statistics=statistics, rngs=nnx.Rngs(0))
        out = layer(x)
        assert (jnp.abs(layer(future) - out)[:, :6].max() > 1e-4) == sees
        assert (jnp.abs(layer(other) - out)[0].max() > 1e-4) == sees
        if sees:
            with pytest.raises(NotImplementedError, match="statistics='frozen'"):
                layer.init_state(1, 4)
    spread = linear.LLNAttention(16, 4, statistics="batch", rngs=nnx.Rngs(0))
    q, k = spread._query(x), spread._key_value(x)[0]
    np.testing.assert_allclose(spread.mechanism._temperatures(q, k), linear.moment_match(q.std(), k.std()), rtol=1e-5)


def test_no_slope_by_deviations():
    """The choice of alpha and beta is not differentiated."""
    layer = linear.LLNAttention(16, 4, statistics="batch", mode=None, rngs=nnx.Rngs(0))
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 5, 4, 4))
    assert not any(x.any() for x in jax.grad(lambda q, k: sum(layer.mechanism._temperatures(q, k)), (0, 1))(q, k))


def test_errors():
    args = inputs(jnp.float32)
    for name, wrong in (("alpha", jnp.ones(3)), ("beta", jnp.ones(4)), ("key_mask", jnp.ones((2, 3), bool)), ("segment_ids", jnp.zeros((2, 3), jnp.int32))):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            linear.lln_attention(*args, **{"alpha": 1.0, "beta": 1.0, name: wrong})
    with pytest.raises(ValueError, match="mix: expected 2 arrays"):
        linear.lln_diag(*args, 1.0, 1.0, mode="learnable_scale")
    with pytest.raises(ValueError, match="mode: expected one of"):
        linear.lln_diag(*args, 1.0, 1.0, mode="sum")
    with pytest.raises(ValueError, match="statistics: expected"):
        linear.LLNAttention(16, 4, statistics="running", rngs=nnx.Rngs(0))
