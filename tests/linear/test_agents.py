"""Agent attention: the weights that it implies, its limits, the layer against torch, and running trained attention this way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import linear, nn

B, T, S, N, K, H, M = 2, 7, 9, 4, 2, 8, 3
attend = jax.jit(linear.agent_attention, static_argnames=("scale", "scale_out"))


def inputs():
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, M, N, H), (N, M, S), (N, T, M))
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def weights(q, k, a, bias_in=0, bias_out=0, scale_out=H**-0.5):
    """P1 [B, N, M, S] and P2 [B, N, T, M], each with a softmax of its own."""
    first = jnp.einsum("bmnh,bsnh->bnms", a, jnp.repeat(k, N // K, 2)) * H**-0.5 + bias_in
    second = jnp.einsum("btnh,bmnh->bntm", q, a) * scale_out + bias_out
    return jax.nn.softmax(first, -1), jax.nn.softmax(second, -1)


def test_product():
    """Two matrices whose rows sum to 1, as do those of their product, of rank M at most."""
    q, k, v, a, bias_in, bias_out = inputs()
    first, second = weights(q, k, a, bias_in, bias_out)
    both = second @ first
    np.testing.assert_allclose(both.sum(-1), 1, atol=1e-6)
    assert (jnp.linalg.svd(both, compute_uv=False)[..., M:] < 1e-6).all()
    expected = jnp.einsum("bnts,bsnh->btnh", both, jnp.repeat(v, N // K, 2))
    np.testing.assert_allclose(attend(q, k, v, a, bias_in=bias_in, bias_out=bias_out), expected, atol=1e-5)


def test_one_agent():
    """Every token receives what it found."""
    q, k, v, a, *_ = inputs()
    first, _ = weights(q, k, a[:, :1])
    expected = jnp.einsum("bnms,bsnh->bmnh", first, jnp.repeat(v, N // K, 2))
    np.testing.assert_allclose(attend(q, k, v, a[:, :1]), jnp.broadcast_to(expected, (B, T, N, H)), atol=1e-5)


def test_order_of_tokens():
    """With agents given and no biases the order of tokens does not matter; with the layer's convolution it does."""
    q, k, v, a, *_ = inputs()
    order = jnp.array([3, 1, 0, 2, 6, 5, 4])
    np.testing.assert_allclose(attend(q[:, order], k[:, order], v[:, order], a), attend(q, k[:, :T], v[:, :T], a)[:, order], atol=1e-5)
    layer = linear.AgentAttention(8, 2, grid=(2, 2), agents=1, biased=False, rngs=nnx.Rngs(0))
    x, swap = jax.random.normal(jax.random.key(0), (1, 4, 8)), jnp.array([1, 0, 3, 2])
    assert jnp.abs(layer(x[:, swap]) - layer(x)[:, swap]).max() > 1e-3
    plain = linear.AgentAttention(8, 2, grid=(2, 2), agents=1, biased=False, kernel_size=None, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(plain(x[:, swap]), plain(x)[:, swap], atol=1e-6)  # one agent is the mean of all queries


def test_masked_agents_and_keys():
    q, k, v, a, *_ = inputs()
    got = attend(q, k, v, a, agent_mask=jnp.broadcast_to(jnp.arange(M) < 2, (B, M)), key_positions=jnp.where(jnp.arange(S) < 5, jnp.arange(S), -1))
    np.testing.assert_allclose(got, attend(q, k[:, :5], v[:, :5], a[:, :2]), atol=1e-5)


def test_pooled_agents():
    """Of a sequence: contiguous bins, of what is seen."""
    x = jax.random.normal(jax.random.key(0), (B, 8, N, H))
    np.testing.assert_allclose(linear.pool_agents(x, 4), x.reshape(B, 4, 2, N, H).mean(2), atol=1e-6)
    seen = jnp.broadcast_to(jnp.arange(8) < 3, (B, 8))
    pooled, some = linear.pool_agents(x, 4, seen=seen)
    np.testing.assert_allclose(pooled[:, 1], x[:, 2], atol=1e-6)
    assert some.tolist() == [[True, True, False, False]] * B


@pytest.mark.parametrize("cls_token", [False, True])
def test_layer(cls_token):
    """The paper's layer in torch: adaptive pooling, bilinear maps, biases of rows, columns and the class token, depthwise convolution."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    d, n, m, (h, w) = 16, 4, 4, (5, 6)
    layer = linear.AgentAttention(d, n, grid=(h, w), agents=m, cls_token=cls_token, rngs=nnx.Rngs(0))
    leaves, structure = jax.tree.flatten(nnx.state(layer, nnx.Param))
    random = [0.3 * jax.random.normal(key, x.shape) for key, x in zip(jax.random.split(jax.random.key(1), len(leaves)), leaves)]
    nnx.update(layer, jax.tree.unflatten(structure, random))
    t = lambda x: torch.from_numpy(np.array(x[...]))
    x = jax.random.normal(jax.random.key(0), (2, h * w + cls_token, d))
    first = int(cls_token)
    q, k, v = (t(x) @ t(p.kernel).reshape(d, d) for p in (layer.query, layer.key, layer.value))
    image = lambda z: z[:, first:].reshape(2, h, w, d).permute(0, 3, 1, 2)
    heads = lambda z: z.reshape(2, -1, n, d // n).transpose(1, 2)
    agents = heads(f.adaptive_avg_pool2d(image(q), 2).reshape(2, d, m).transpose(1, 2))

    def bias(part):
        out = (f.interpolate(t(part.map), size=(h, w), mode="bilinear") + t(part.row) + t(part.column)).reshape(n, m, h * w)
        return torch.cat([t(part.token), out], -1) if cls_token else out

    scale = (d // n) ** -0.5
    found = torch.softmax(agents @ heads(k).transpose(2, 3) * scale + bias(layer.bias_in), -1) @ heads(v)
    out = torch.softmax(heads(q) @ agents.transpose(2, 3) * scale + bias(layer.bias_out).transpose(1, 2), -1) @ found
    out = out.transpose(1, 2).reshape(2, -1, d)
    near = f.conv2d(image(v), t(layer.convolution.kernel).permute(3, 2, 0, 1), t(layer.convolution.bias), padding=1, groups=d)
    out[:, first:] += near.permute(0, 2, 3, 1).reshape(2, h * w, d)
    expected = out @ t(layer.out.kernel).reshape(d, d) + t(layer.out.bias)
    np.testing.assert_allclose(layer(x), expected.numpy(), atol=2e-5)


def test_in_a_block():
    """It is called as any attention is."""
    layer = linear.AgentAttention(8, 2, grid=(2, 2), agents=1, rngs=nnx.Rngs(0))
    block = nn.TransformerBlock(8, attention=layer, rngs=nnx.Rngs(0))
    assert jax.eval_shape(block, jnp.ones((1, 4, 8))).shape == (1, 4, 8)
    with pytest.raises(NotImplementedError, match="positions: expected None"):
        layer(jnp.ones((1, 4, 8)), positions=jnp.arange(4))


def test_patch():
    """A trained layer runs with agents, of the scales and shortcut that are given; few tokens go the full way."""
    layer = nn.Attention(16, N, mechanism=attnx.pairs(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (B, 12, 16))
    full = layer(x[:, :5])
    q, k, v = (p(x) for p in (layer.query, layer.key, layer.value))
    agents = linear.pool_agents(q, 3)
    assert nn.set_mechanism(layer, linear.agent_patch(3, k_scale2=0.3, k_shortcut=0.075)) == 1
    expected = linear.agent_attention(q, k, v, agents, scale=0.5, scale_out=0.5**0.3) + 0.075 * v
    np.testing.assert_allclose(layer(x), layer.out(expected), atol=1e-5)
    np.testing.assert_allclose(layer(x[:, :5]), full, atol=1e-5)
    shorter = layer(x, positions=jnp.where(jnp.arange(12) < 9, jnp.arange(12), -1))
    changed = layer(x.at[:, 9:].set(3.0), positions=jnp.where(jnp.arange(12) < 9, jnp.arange(12), -1))
    np.testing.assert_allclose(changed[:, :9], shorter[:, :9], atol=1e-5)


def test_errors():
    q, k, v, a, *_ = inputs()
    with pytest.raises(ValueError, match="agents: expected the 4 heads"):
        linear.agent_attention(q, k, v, a[:, :, :2])
    with pytest.raises(ValueError, match="agents: expected a share"):
        linear.agent_patch(1.5)
    with pytest.raises(ValueError, match="grid: expected"):
        linear.pool_agents(q, 4, grid=(2, 2))
    with pytest.raises(ValueError, match="x: expected 4 tokens"):
        linear.AgentAttention(8, 2, grid=(2, 2), agents=1, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8)))
    with pytest.raises(NotImplementedError, match="no streaming form"):
        linear.agent_patch().init(1, 1, 1, 1, 1, jnp.float32)
