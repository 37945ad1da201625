"""Linformer: what it equals without loss, its projections against loops and torch, padding, sharing, the random projection's error, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import linear

B, T, S, N, K, H = 2, 5, 12, 4, 2, 8
attend = jax.jit(linear.linformer_attention)


def inputs(length=S):
    shapes = ((B, T, N, H), (B, length, K, H), (B, length, K, H))
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def test_identity_is_softmax_attention():
    q, k, v = inputs()
    expected = attnx.attention(q, k, v)
    np.testing.assert_allclose(attend(q, k, v, jnp.eye(S)), expected, atol=1e-5)
    np.testing.assert_allclose(attend(q, k, v, jnp.stack([jnp.eye(S)] * K), jnp.eye(S)), expected, atol=1e-5)


def test_written_out():
    """Kernels of heads, of sequences shorter than they are made for."""
    q, k, v = inputs()
    e, f = (jax.random.normal(jax.random.key(i), (K, 3, 20)) for i in (5, 6))
    keys, values = jnp.einsum("kis,bskh->bikh", e[..., :S], k), jnp.einsum("kis,bskh->bikh", f[..., :S], v)
    scores = jnp.einsum("btnh,binh->bnti", q, jnp.repeat(keys, 2, 2)) / H**0.5
    expected = jnp.einsum("bnti,binh->btnh", jax.nn.softmax(scores, -1), jnp.repeat(values, 2, 2))
    np.testing.assert_allclose(attend(q, k, v, e, f), expected, atol=1e-4)


def test_repeated_keys():
    """Means of groups of equal keys and values are attention to one of each."""
    q, k, v = inputs(4)
    keys, values = (linear.project_sequence(jnp.repeat(x, 3, axis=1), "mean_pool", window=3) for x in (k, v))
    np.testing.assert_allclose(attnx.attention(q, keys, values), attnx.attention(q, k, v), atol=1e-6)


def test_windows():
    """Pools and convolutions, the last window short, against torch."""
    torch = pytest.importorskip("torch")
    x = inputs()[1][:1, :10, :1]
    rows = torch.from_numpy(np.array(x[:, :, 0])).transpose(1, 2)
    for kind, peer in (("mean_pool", torch.nn.functional.avg_pool1d), ("max_pool", torch.nn.functional.max_pool1d)):
        np.testing.assert_allclose(linear.project_sequence(x, kind, window=4)[0, :, 0], peer(rows, 4, ceil_mode=True)[0].T.numpy(), atol=1e-6)
    kernel = jax.random.normal(jax.random.key(3), (5, H, H))
    expected = torch.nn.functional.conv1d(rows, torch.from_numpy(np.array(kernel)).permute(2, 1, 0), stride=5)
    np.testing.assert_allclose(linear.project_sequence(x, "conv", kernel=kernel)[0, :, 0], expected[0].T.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mean_pool", "max_pool", "conv"])
def test_padding(kind):
    """What stands at padded positions does not matter; windows of padding alone get no weight; where all is padding the output is zero."""
    layer = linear.LinformerAttention(16, N, max_length=S, slots=4, kind=kind, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (B, S, 16))
    seen = jnp.arange(S) < 7
    graph, params = nnx.split(layer)

    @jax.jit
    def run(x, positions):
        return nnx.merge(graph, params)(x, positions=positions)

    positions = jnp.where(seen, jnp.arange(S), -1)
    out = run(x, positions)
    np.testing.assert_allclose(run(jnp.where(seen[:, None], x, 9.0), positions)[:, :7], out[:, :7], atol=1e-6)
    if kind != "linear":  # fewer windows are fewer slots
        np.testing.assert_allclose(run(x[:, :7], jnp.arange(7)), out[:, :7], atol=1e-5)
    else:  # zeros are keys of score 0
        np.testing.assert_allclose(layer(x[:, :7]), out[:, :7], atol=1e-5)
    assert not run(x, jnp.full(S, -1)).any()


def test_random_projections():
    """Random E of normal numbers keeps e^(q.k) with an error that falls as one over the square root of the slots (the theory)."""
    sizes, length = np.array([32, 64, 128, 256, 512]), 512
    w = jax.nn.softmax(jax.random.normal(jax.random.key(0), (8, length)), -1)  # rows of attention, to be read through random slots
    values = jax.random.normal(jax.random.key(1), (length,))

    def error(slots, key):
        e = jax.random.normal(key, (slots, length)) * slots**-0.5
        return jnp.median(jnp.abs(w @ e.T @ (e @ values) - w @ values) / jnp.linalg.norm(w, axis=-1) / jnp.linalg.norm(values))

    errors = [jax.vmap(lambda key, slots=int(slots): error(slots, key))(jax.random.split(jax.random.key(2), 20)).mean() for slots in sizes]
    slope = np.polyfit(np.log(sizes), np.log(np.array(errors)), 1)[0]
    assert abs(slope + 0.5) < 0.15


def test_sharing():
    """Numbers of parameters beyond those of the projections of tokens, also over layers."""
    count = lambda module: sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
    plain = 4 * 16 * 16
    make = lambda share, **options: linear.LinformerAttention(16, N, max_length=S, slots=4, share=share, rngs=nnx.Rngs(0), **options)
    for share, kernels in (("none", 2 * N), ("headwise", 2), ("kv", 1)):
        assert count(make(share)) == plain + kernels * 4 * S, share
    projection = linear.LinformerProjection(S, 4, rngs=nnx.Rngs(0))
    layers = nnx.List([make("layerwise", projection=projection) for _ in range(3)])
    assert count(layers) == 3 * plain + 4 * S
    one_head = make("headwise", num_kv_heads=1)
    assert one_head.key.kernel.shape == (16, 1, 4) and one_head(jnp.ones((1, S, 16))).shape == (1, S, 16)


def test_context():
    """Cross-attention projects the context, once for all steps."""
    layer = linear.LinformerAttention(16, N, max_length=S, slots=4, rngs=nnx.Rngs(0))
    x, context = jnp.ones((B, T, 16)), jax.random.normal(jax.random.key(0), (B, S, 16))
    state = layer.init_state(B, T, context=context)
    np.testing.assert_allclose(layer.step(state, x)[1], layer(x, context), atol=1e-6)


def test_refusals():
    """There is no causal form; and arguments that do not fit are named."""
    q, k, v = inputs()
    layer = linear.LinformerAttention(16, N, max_length=S, slots=4, rngs=nnx.Rngs(0))
    for call in (lambda: linear.linformer_attention(q, k, v, jnp.eye(S), is_causal=True), lambda: layer.init_state(1, S),
                 lambda: linear.LinformerAttention(16, N, max_length=S, slots=4, is_causal=True, rngs=nnx.Rngs(0))):
        with pytest.raises(NotImplementedError, match="is_causal: every slot mixes all positions"):
            call()
    for match, call in (("kernel: expected shape", lambda: linear.linformer_attention(q, k, v, jnp.eye(S - 1))),
                        ("value_projection: expected as many slots", lambda: linear.linformer_attention(q, k, v, jnp.eye(S), jnp.ones((2, S)))),
                        ("kind: expected", lambda: linear.project_sequence(k, "median")),
                        ("kernel: expected none", lambda: linear.project_sequence(k, "mean_pool", kernel=jnp.eye(S), window=2)),
                        ("share: expected", lambda: linear.LinformerAttention(16, N, max_length=S, slots=4, share="layerwise", rngs=nnx.Rngs(0)))):
        with pytest.raises(ValueError, match=match):
            call()
