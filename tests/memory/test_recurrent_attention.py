"""Recurrent attention: a window written out, windows carried on, what sees what, padding, pooling, prefixes, tokens one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_modules import randomly

from attnx import memory

B, T, D, W = 2, 10, 4, 4
X = jax.random.normal(jax.random.key(0), (B, T, D))
silu = lambda x: x / (1 + np.exp(-x))


def made(**options):
    """A layer with random parameters."""
    return randomly(lambda: memory.RAN(D, 2, head_size=4, **dict(window_size=W, min_window=0) | options, rngs=nnx.Rngs(0)))


read = nnx.jit(lambda layer, x, **options: layer.read(x, **options))


def p(x):
    return np.asarray(x[...], np.float64)


def norm(x, layer):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p(layer.scale) + p(layer.bias)


def unit(x, layer):
    gate = x @ p(layer.gate.kernel) + p(layer.gate.bias)
    return (x @ p(layer.value.kernel) + p(layer.value.bias)) / (1 + np.exp(-gate))


def heads(x, layer):
    return silu(np.einsum("btd,dnh->btnh", x, p(layer.kernel)) + p(layer.bias))


def turn(x):
    """Pairs of neighbouring channels as complex numbers, turned by the position."""
    z = x[..., 0::2] + 1j * x[..., 1::2]
    return z * np.exp(1j * np.arange(x.shape[1])[:, None, None] * 10000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1]))


def weights(s):
    w = np.exp(s - s.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def written_out(layer, cell, window):
    """One window, in NumPy: (r, tokens)."""
    attention, z = layer.attention, norm(np.concatenate([cell, window], 1).astype(np.float64), layer.input_norm)
    q, k = turn(heads(z, attention.query)), turn(heads(z, attention.key))
    s = np.einsum("btnh,bsnh->bnts", q, k.conj()).real / np.sqrt(4)
    found = np.einsum("bnts,bsnh->btnh", weights(s), heads(z, attention.value))
    out = silu(np.einsum("btnh,nhd->btd", found, p(attention.out.kernel)) + p(attention.out.bias))
    u = norm(out + unit(z, attention.unit), attention.norm)
    u = (u - u.mean(-1, keepdims=True)) / np.sqrt((u**2).mean(-1, keepdims=True) + 1e-7)
    return u[:, :1], u[:, 1:]


def test_written_out():
    """Three windows, the cell carried through gated residuals, the review, and the text's vectors."""
    layer = made()
    out = read(layer, X)
    cell, previous, cells, tokens = np.broadcast_to(p(layer.first_cell), (B, 1, D)), None, [], []
    for low, high in memory.document_windows(T, W):
        r, found = written_out(layer, cell, X[:, low:high])
        cell = r if previous is None else norm(r + unit(previous, layer.cell_unit), layer.cell_norm)
        previous, cells, tokens = r, [*cells, r], [*tokens, found]
    cells, tokens = np.concatenate(cells, 1), np.concatenate(tokens, 1)
    np.testing.assert_allclose(out.found, tokens, atol=1e-5)
    np.testing.assert_allclose(out.cells, cells, atol=1e-5)
    np.testing.assert_allclose(out.pooled, cell[:, 0], atol=1e-5)
    reviewer = layer.reviewer
    q, k, v = (heads(x, part)[:, :, 0] for x, part in ((tokens, reviewer.query), (cells, reviewer.key), (cells, reviewer.value)))
    looked = silu(weights(q @ k.swapaxes(1, 2) / np.sqrt(D)) @ v @ p(reviewer.out.kernel)[0] + p(reviewer.out.bias))
    np.testing.assert_allclose(out.tokens, norm(looked + unit(q, reviewer.unit), reviewer.norm), atol=1e-5)
    one = read(layer, X[:, :3])
    np.testing.assert_allclose(one.found, written_out(layer, np.broadcast_to(p(layer.first_cell), (B, 1, D)), X[:, :3])[1], atol=1e-5)


def test_windows():
    """Ends that are shorter than the least window join the one before."""
    assert memory.document_windows(8, 4, 2) == ((0, 4), (4, 8)) and memory.document_windows(0, 4) == ((0, 0),)
    y = memory.second_moment_norm(X)
    np.testing.assert_allclose(y * np.sqrt((X**2).mean(-1, keepdims=True) + 1e-7) + X.mean(-1, keepdims=True), X, atol=1e-5)
    with pytest.raises(ValueError, match="min_window"):
        made(min_window=W)


@pytest.mark.parametrize("length", [T, 9])
def test_windows_carried_on(length):
    """Window by window with what is carried is the text at once, a joined end included."""
    layer = made(min_window=2)
    x = X[:, :length]
    whole, carry, cells, found = read(layer, x), layer.carry(B), [], []
    advance = nnx.jit(lambda layer, carry, window: layer.advance(carry, window))
    for low, high in memory.document_windows(length, W, 2):
        carry, cell, tokens = advance(layer, carry, x[:, low:high])
        cells, found = [*cells, cell], [*found, tokens]
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole.found, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(cells, 1), whole.cells, atol=1e-5)
    np.testing.assert_allclose(carry.cell, whole.carry.cell, atol=1e-5)
    rest = read(layer, x[:, W:], carry=read(layer, x[:, :W]).carry)
    np.testing.assert_allclose(rest.found, whole.found[:, W:], atol=1e-5)
    given = read(layer, x, carry=layer.carry(B, jnp.ones((B, D))))
    assert np.abs(given.found - whole.found).max() > 1e-3


def test_what_sees_what():
    """A late window changes no earlier token before the review, and every one after it; with a causal mask neither, and with a prefix what it says."""
    late = X.at[:, 8:].set(2.0)
    layer = made()
    a, b = read(layer, X), read(layer, late)
    np.testing.assert_allclose(a.found[:, :8], b.found[:, :8], atol=1e-6)
    assert (np.abs(a.tokens - b.tokens).max(-1) > 1e-6).all()
    plain = made(review=False)
    np.testing.assert_allclose(read(plain, X).tokens[:, :8], read(plain, late).tokens[:, :8], atol=1e-6)
    causal = made(attn_mask="causal")
    a, b = read(causal, X), read(causal, X.at[:, 6].multiply(-1))
    np.testing.assert_allclose(a.tokens[:, :6], b.tokens[:, :6], atol=1e-6)
    assert (np.abs(a.tokens[:, 6:] - b.tokens[:, 6:]).max(-1) > 1e-6).all()  # through the window, and the cell of windows after it
    prefix = made(attn_mask="prefix")
    for length, first in ((0, 6), (7, 0)):
        a, b = (read(prefix, x, prefix_length=length).tokens for x in (X, X.at[:, 6].multiply(-1)))
        assert (np.abs(a - b).max(-1) > 1e-6)[:, max(first, 4):].all()
        np.testing.assert_allclose(a[:, :4], b[:, :4], atol=1e-6)  # the second window is not all prefix, so nobody reviews it early
    a, b = (read(prefix, x, prefix_length=8).tokens for x in (X, X.at[:, 6].multiply(-1)))
    assert (np.abs(a - b).max(-1) > 1e-6).all()
    np.testing.assert_allclose(read(prefix, X, prefix_length=0).tokens, read(causal, X).tokens, atol=1e-6)


def test_padding():
    """Padding at the end changes neither cells nor tokens, also where it fills windows."""
    for pooling in ("last", "mean", "max"):
        layer = made(pooling=pooling)
        alone = read(layer, X)
        padded = jnp.pad(X, ((0, 0), (0, 8), (0, 0)), constant_values=5.0)
        out = read(layer, padded, positions=jnp.where(jnp.arange(18) < T, jnp.arange(18), -1))
        np.testing.assert_allclose(out.tokens[:, :T], alone.tokens, atol=1e-5)
        np.testing.assert_allclose(out.cells[:, :3], alone.cells, atol=1e-5)
        np.testing.assert_allclose(out.pooled, alone.pooled, atol=1e-5)
        assert out.seen.tolist() == [[True] * 3 + [False] * 2] * B


@pytest.mark.parametrize("review", [True, False])
def test_tokens(review):
    """Token by token, in any cut, a causal layer finds what it finds at once; the state is constant in the text's length but for the cells of the review."""
    layer = made(attn_mask="causal", review=review)

    @nnx.jit
    def stream(layer, x):
        state, out = layer.init_state(B, T), []
        for low, high in ((0, 3), (3, 4), (4, T)):
            state, y = layer.step(state, x[:, low:high])
            out.append(y)
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(stream(layer, X), read(layer, X).tokens, atol=1e-5)
    small, large = (jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda n=n: layer.init_state(B, n))) for n in (16, 4096))
    assert small._replace(cells=None) == large._replace(cells=None) and (small.cells == large.cells) == (not review)
    with pytest.raises(NotImplementedError, match="window by window"):
        made().init_state(B, T)


def test_net():
    """Numbers for each token or for the text; every parameter has a gradient; dropout is random."""
    tokens = jax.random.randint(jax.random.key(2), (B, T), 0, 11)
    options = dict(num_heads=2, head_size=4, window_size=W, min_window=2)
    net = randomly(lambda: memory.RanNet(11, D, num_layers=2, outputs=3, pooled=True, rngs=nnx.Rngs(0), **options))
    graph, params = nnx.split(net)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params)(tokens)))))(params)
    dead = [jax.tree_util.keystr(path) for path, slope in jax.tree_util.tree_leaves_with_path(slopes) if not jnp.any(slope)]
    assert all("['layers'][1]['reviewer']" in path for path in dead), dead  # the last layer's review is of tokens, which the text's vector does not use
    assert nnx.eval_shape(lambda: memory.RanNet(11, D, rngs=nnx.Rngs(0), **options)(tokens)).shape == (B, T, 11)
    call = nnx.jit(lambda net, key: net(tokens, dropout_key=key))
    first = call(net, jax.random.key(0))
    assert (first == call(net, jax.random.key(0))).all() and not (first == call(net, jax.random.key(1))).all()
    with pytest.raises(ValueError, match="outputs"):
        memory.RanNet(11, D, pooled=True, rngs=nnx.Rngs(0))
