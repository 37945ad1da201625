"""Mega: averages in all forms, attention written out, streaming, what a closed gate does, and another implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import mixers
from attnx.weights import laplace, relu_squared

B, T, D, Z, V, n = 2, 10, 6, 4, 5, 3


def params(rows=D, seed=0):
    shapes = [(rows, n)] * 4 + [(D,)]
    return mixers.EMA(*(jax.random.normal(key, shape, float) for key, shape in zip(jax.random.split(jax.random.key(seed), 5), shapes)))


def tokens(seed=1, shape=(B, T, D)):
    return jax.random.normal(jax.random.key(seed), shape, float)


def written_out(x, p):
    """The recurrence, token by token, without the skip: [B, T, D]."""
    sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x)))
    step, beta, gamma = sigmoid(p.delta), np.asarray(p.beta), np.asarray(p.gamma)
    h, ys = np.zeros((B, D, n)), []
    for t in range(x.shape[1]):
        h = (1 - step * sigmoid(p.alpha)) * h + step * beta * np.asarray(x)[:, t, :, None]
        ys.append((gamma * h).sum(-1) / np.sqrt(n))
    return np.stack(ys, 1)


def test_average(x64):
    """The recurrence; any cut with the state carried over; the textbook's average."""
    x, p = tokens(), params()
    y = mixers.multihead_ema(x, p)
    np.testing.assert_allclose(y, written_out(x, p) + p.omega * x, atol=1e-12)
    for cut in (1, 4, T):
        first, state = mixers.multihead_ema(x[:, :cut], p, return_state=True)
        rest, _ = mixers.multihead_ema(x[:, cut:], p, initial_state=state, return_state=True)
        np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), y, atol=1e-12)
    one = jnp.ones((D, 1))
    step, damping = 0.3, 0.6
    logit = lambda share: np.log(share / (1 - share))
    simple = mixers.multihead_ema(x, mixers.EMA(logit(step) * one, logit(damping) * one, one, one, jnp.zeros(D)))
    expected = [step * x[:, 0]]
    for t in range(1, T):
        expected.append(step * x[:, t] + (1 - damping * step) * expected[-1])
    np.testing.assert_allclose(simple, jnp.stack(expected, 1), atol=1e-12)


def test_both_ways(x64):
    """The sum of an average of the past and one of the future; padding enters neither; documents are apart."""
    x, p = tokens(), params(2 * D)
    halves = [mixers.EMA(*(a[part] for a in p[:4]), p.omega) for part in (slice(0, D), slice(D, None))]
    expected = written_out(x, halves[0]) + written_out(x[:, ::-1], halves[1])[:, ::-1]
    average = jax.jit(mixers.multihead_ema)
    np.testing.assert_allclose(average(x, p), expected + p.omega * x, atol=1e-12)
    ids = jnp.broadcast_to(jnp.arange(T) >= 6, (B, T)).astype(jnp.int32)
    packed = average(x, p, segment_ids=ids)
    np.testing.assert_allclose(packed[:, 6:], mixers.multihead_ema(x[:, 6:], p), atol=1e-12)
    positions = jnp.where(jnp.arange(T) < 6, jnp.arange(T), -1)
    np.testing.assert_allclose(average(x, p, positions=positions)[:, :6], mixers.multihead_ema(x[:, :6], p), atol=1e-12)


def test_activations(x64):
    """Laplace and squared ReLU have the value 1/2 and one slope at sqrt(1/2), and are close around it."""
    at, near = jnp.sqrt(0.5), jnp.linspace(0.5, 0.9, 9)
    for weights in (laplace(), relu_squared()):
        np.testing.assert_allclose(jax.value_and_grad(lambda s, weights=weights: weights.weight(s, ()))(at), (0.5, np.sqrt(2)), rtol=1e-12)
    assert jnp.abs(laplace().weight(near, ()) - relu_squared().weight(near, ())).max() < 0.06


def dense(q, k, v, table, allowed, activation):
    """[B, T, V]; allowed [B, T, T]."""
    s = jnp.einsum("btz,bsz->bts", q, k)
    offset = jnp.arange(T) - jnp.arange(T)[:, None]
    bias = table[offset + len(table) // 2]
    if activation == "softmax":
        w = jax.nn.softmax(jnp.where(allowed, s / np.sqrt(Z) + bias, -jnp.inf), axis=-1, where=allowed)
        return jnp.where(allowed, w, 0) @ v
    s = s / jnp.maximum(allowed.sum(-1, keepdims=True), 1) + bias
    f = 0.5 * (1 + jax.lax.erf((s - np.sqrt(0.5)) / np.sqrt(1 / (4 * np.pi)) / np.sqrt(2))) if activation == "laplace" else jnp.maximum(s, 0) ** 2
    return jnp.where(allowed, f, 0) @ v


@pytest.mark.parametrize(("activation", "causal", "chunk", "given"), [
    ("softmax", True, 4, "positions"), ("laplace", True, None, "segment_ids"), ("laplace", False, 4, ""), ("relu2", True, 4, ""),
    ("relu2", False, None, "positions")])
def test_attention(x64, activation, causal, chunk, given):
    """Written out, forward and backward; the number of keys is that of those seen."""
    q, k, v, table = tokens(1, (B, T, Z)), tokens(2, (B, T, Z)), tokens(3, (B, T, V)), tokens(4, (2 * (chunk or T) - 1,))
    at = np.arange(T)
    allowed = np.ones((T, T), bool) if not causal else at[:, None] >= at
    allowed &= at[:, None] // (chunk or T) == at // (chunk or T)
    options = {"positions": {"positions": jnp.where(at < 7, at, -1)}, "segment_ids": {"segment_ids": jnp.broadcast_to(at // 6, (B, T))}, "": {}}[given]
    if given == "positions":
        allowed &= (at < 7) & (at < 7)[:, None]
    elif given:
        allowed &= at[:, None] // 6 == at // 6
    padded = jnp.zeros(2 * T - 1).at[T - (len(table) + 1) // 2: T + len(table) // 2].set(table)
    attend = lambda *a: mixers.gated_attention(*a, activation=activation, causal=causal, chunk=chunk, **options)
    wide = lambda q, k, v, table: dense(q, k, v, padded + 0 * table.sum(), jnp.asarray(allowed)[None], activation)
    got, expected = (jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(q, k, v, table) for f in (attend, wide))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_rotary_table(x64):
    """Two vectors turned by their positions."""
    a, b = tokens(1, (6,)), tokens(2, (6,))
    turn = lambda x, i: np.exp(1j * i * 10000.0 ** (-np.arange(3) / 3)) * (np.asarray(x[:3]) + 1j * np.asarray(x[3:]))
    expected = [[(np.conj(turn(a, i)) * turn(b, j)).real.sum() for j in range(4)] for i in range(4)]
    table = mixers.rotary_table(a, b, 4)
    np.testing.assert_allclose([[table[j - i + 3] for j in range(4)] for i in range(4)], expected, atol=1e-12)


OPTIONS = {"softmax": {}, "laplace, chunks": dict(activation="laplace", chunk=4, bias="rotary"), "relu2, post-norm": dict(activation="relu2", norm_position="post"),
           "both ways": dict(causal=False, chunk=4)}


@pytest.mark.parametrize("name", OPTIONS)
def test_layer(name):
    """Prefill and steps find what the call finds, every parameter has a gradient."""
    options = dict(max_length=T) | OPTIONS[name]
    layer = mixers.MegaLayer(D, Z, V, n, rngs=nnx.Rngs(0), **options)
    graph, state, rest = nnx.split(layer, nnx.Param, ...)
    state = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), state)
    x = tokens().astype(jnp.float32)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(x)))))(state)
    assert all(jnp.any(slope) for slope in jax.tree.leaves(slopes))
    layer = nnx.merge(graph, state, rest)
    if not layer.causal:
        with pytest.raises(NotImplementedError, match="causal=False"):
            layer.init_state(B, T)
        return

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        memory = layer.init_state(B, T)
        outs = []
        for first, last in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 10)):
            memory, out = layer.step(memory, x[:, first:last])
            outs.append(out)
        return layer(x), jnp.concatenate(outs, axis=1)

    np.testing.assert_allclose(*both(state, x), atol=2e-5)


def test_chunk_of_all():
    """A chunk as long as the sequence is no chunk; a closed update gate leaves the residual."""
    x = tokens().astype(jnp.float32)
    whole, chunked = (mixers.MegaLayer(D, Z, V, n, max_length=16, chunk=chunk, activation="laplace", rngs=nnx.Rngs(0)) for chunk in (None, 16))
    np.testing.assert_allclose(chunked(x), whole(x), atol=1e-6)
    assert jnp.abs(whole(x) - x).max() > 1e-3
    whole.mixed.bias.set_value(whole.mixed.bias[...].at[:D].set(-40.0))
    np.testing.assert_allclose(whole(x), x, atol=1e-6)


def test_dropout():
    """With a key the layer is random, with the same key the same."""
    layer = mixers.MegaLayer(D, Z, V, n, max_length=T, dropout_rate=0.2, attention_dropout_rate=0.2, hidden_dropout_rate=0.2, rngs=nnx.Rngs(0))
    x = tokens().astype(jnp.float32)
    apply = partial(nnx.jit(lambda layer, x, key: layer(x, dropout_key=key)), layer, x)
    first, second = apply(jax.random.key(0)), apply(jax.random.key(1))
    assert (first == apply(jax.random.key(0))).all() and not (first == second).all()


def test_peer():
    """Transformers' implementation, where its version still has it."""
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("transformers.models.deprecated.mega.modeling_mega")
    config = peers.MegaConfig(hidden_size=D, shared_representation_size=Z, intermediate_size=V, ema_projection_size=n, bidirectional=False, max_positions=T,
                              attention_activation="laplace", norm_affine=True, normalize_before_mega=True, dropout_prob=0.0)
    torch.manual_seed(0)
    peer = peers.MegaMovingAverageGatedAttention(config).eval()
    give_and_compare(peer, dict(delta=peer.ema_gate.damping_factor, alpha=peer.ema_gate.decay_factor, beta=peer.ema_gate.ema_expansion_matrix,
                                gamma=peer.ema_gate.kernel_projection_matrix, omega=peer.ema_gate.residual_weight, value=peer.v_proj, mixed=peer.mx_proj,
                                out=peer.h_proj, affine=peer.qk_weight, affine_bias=peer.qk_bias, bias=peer.rel_pos_bias.rel_pos_bias),
                     lambda peer, x: peer(x, causal_mask=torch.tril(torch.ones(T, T)))[0])


def give_and_compare(peer, weights, call, **options):
    """Copies the weights of a peer [T, B, D] -> [T, B, D] to a causal layer of the same sizes and compares."""
    import torch

    for parameter in peer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    layer = mixers.MegaLayer(D, Z, V, n, max_length=T, activation="laplace", rngs=nnx.Rngs(0), **options)
    for name, given in weights.items():
        ours = getattr(layer, name)
        if isinstance(given, torch.nn.Linear):
            ours.kernel.set_value(given.weight.detach().numpy().T)
            ours.bias.set_value(given.bias.detach().numpy())
        else:
            ours.set_value(given.detach().numpy().reshape(ours.shape))
    x = np.random.default_rng(0).normal(size=(T, B, D)).astype(np.float32)
    expected = call(peer, torch.tensor(x)).detach().numpy().swapaxes(0, 1)
    np.testing.assert_allclose(layer(jnp.asarray(x.swapaxes(0, 1))), expected, atol=1e-4)


def test_refusals():
    """Sizes that do not fit, and states of what has none."""
    x = jnp.ones((B, T, D))
    with pytest.raises(ValueError, match="params: expected 6 or 12 rows"):
        mixers.multihead_ema(x, params(D + 1))
    with pytest.raises(NotImplementedError, match="two-sided"):
        mixers.multihead_ema(x, params(2 * D), return_state=True)
    with pytest.raises(ValueError, match=r"table: expected shape \[2 L - 1\] with L of at least 10"):
        mixers.gated_attention(x, x, x, jnp.ones(17))
    with pytest.raises(ValueError, match="activation: expected one of"):
        mixers.MegaLayer(D, Z, V, activation="gelu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="max_length: expected at most"):
        mixers.MegaLayer(D, Z, V, max_length=4, rngs=nnx.Rngs(0)).init_state(1, 5)
