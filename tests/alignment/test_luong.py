"""Global and local attention of recurrent decoders: reductions, the centre's gradient, what a window costs, and the decoder's forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import alignment
from attnx.nn import StackedLSTM

B, T, S, D, E, A = 2, 5, 12, 6, 4, 7
KEYS = iter(jax.random.split(jax.random.key(0), 20))
QUERY, SOURCE, PLACED = (jax.random.normal(next(KEYS), shape) for shape in ((B, T, D), (B, S, E), (B, S, D)))
GENERAL, CONCAT, VECTOR, CENTRE, AIM = (jax.random.normal(next(KEYS), shape) for shape in ((D, E), (D + E, A), (A,), (D, A), (A,)))
LENGTHS = jnp.array([12, 8])
MASK = jnp.arange(S) < LENGTHS[:, None]
SCORE = dict(kind="general", kernel=GENERAL)


def test_scores():
    """The four scores written out for one pair; general with W = I is dot; location sees no contents, and is normalised over the words there are."""
    t, s = 3, 7
    one = lambda **score: alignment.luong_scores(QUERY, SOURCE, **score)[1, t, s]
    q, k = QUERY[1, t], SOURCE[1, s]
    np.testing.assert_allclose(one(**SCORE), q @ GENERAL @ k, rtol=1e-5)
    np.testing.assert_allclose(one(kind="concat", kernel=CONCAT, vector=VECTOR), VECTOR @ jnp.tanh(jnp.concatenate([q, k]) @ CONCAT), rtol=1e-5)
    longer = jax.random.normal(jax.random.key(5), (D, S + 4))
    np.testing.assert_allclose(one(kind="location", kernel=longer), q @ longer[:, s], rtol=1e-5)
    dot = alignment.luong_scores(QUERY, PLACED)
    np.testing.assert_allclose(dot[1, t, s], q @ PLACED[1, s], rtol=1e-5)
    np.testing.assert_allclose(alignment.luong_scores(QUERY, PLACED, kind="general", kernel=jnp.eye(D)), dot, rtol=1e-5)
    _, w = alignment.luong_global_attention(QUERY, SOURCE, kind="location", kernel=longer, mask=MASK, return_weights=True)
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-5)


def test_masked_words():
    """Words that are not there weigh nothing, and change nothing."""
    out, w = alignment.luong_global_attention(QUERY, SOURCE, mask=MASK, return_weights=True, **SCORE)
    assert (w[1, :, 8:] == 0).all() and (w[1, :, :8] > 0).all()
    np.testing.assert_allclose(out[1:], alignment.luong_global_attention(QUERY[1:], SOURCE[1:, :8], **SCORE), atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "gathered"])
def test_wide_window_is_global(implementation):
    """Local attention whose window holds the sentence is global: local-m, and local-p as sigma grows."""
    expected = alignment.luong_global_attention(QUERY, SOURCE, mask=MASK, return_weights=True, **SCORE)
    local = jax.jit(lambda centre, sigma=None: alignment.luong_local_attention(
        QUERY, SOURCE, centre, reach=S, sigma=sigma, mask=MASK, return_weights=True, implementation=implementation, **SCORE), static_argnames="sigma")
    centre = alignment.predicted_centre(QUERY, CENTRE, AIM, LENGTHS)
    for got in (local(jnp.arange(T)), local(centre, sigma=1e6)):
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, atol=1e-6)


def window(centre, implementation=None, **options):
    return alignment.luong_local_attention(QUERY, SOURCE, centre, reach=2, mask=MASK, implementation=implementation, return_weights=True, **options, **SCORE)


def test_window():
    """A window written out: the words around the rounded centre, weighed by a Gaussian around the real one, without normalising again."""
    centre = alignment.predicted_centre(QUERY, CENTRE, AIM, LENGTHS)
    assert (0 < centre).all() and (centre < LENGTHS[:, None]).all()
    _, w = window(centre, sigma=1.0)
    for b in range(B):
        for t in range(T):
            p, expected = float(centre[b, t]), np.zeros(S)
            inside = [s for s in range(int(LENGTHS[b])) if abs(s - round(p)) <= 2]
            scores = np.array([float(QUERY[b, t] @ GENERAL @ SOURCE[b, s]) for s in inside])
            e = np.exp(scores - scores.max())
            expected[inside] = e / e.sum() * np.exp(-((np.array(inside) - p) ** 2) / 2)
            np.testing.assert_allclose(w[b, t], expected, atol=1e-5)
    assert (w.sum(-1) < 1).all() and (w.sum(-1) > 0).all()


def test_gathered(x64):
    """Windows that are copied find what masked scores find, with the same gradients; a window outside the sentence finds nothing."""
    centre = jnp.array([-9.0, 0.2, 5.5, 11.4, 40.0])

    def run(centre, query, source, implementation):
        out, w = alignment.luong_local_attention(query, source, centre, reach=2, sigma=1.0, mask=MASK, implementation=implementation, return_weights=True)
        return jnp.sum(jnp.sin(out)), (out, w)

    args = centre, *(x.astype(float) for x in (QUERY, PLACED))
    gradient = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True), static_argnums=3)
    got, expected = (gradient(*args, name) for name in ("gathered", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, expected)
    assert not np.any(got[1][0][:, [0, 4]]) and np.all(np.any(got[1][0][0, 1:4], axis=-1))


def test_gradient_of_the_centre(x64):
    """The context moves with a predicted centre as finite differences say, and not at all without the Gaussian."""
    centre = jnp.array([1.1, 2.2, 3.3, 4.4, 5.2])
    query, source = QUERY.astype(float), PLACED.astype(float)

    @partial(jax.jit, static_argnums=1)
    def total(centre, sigma):
        return jnp.sum(jnp.sin(alignment.luong_local_attention(query, source, centre, reach=2, sigma=sigma, mask=MASK)))

    slope, h = jax.grad(total)(centre, 1.0), 1e-6
    numeric = jnp.stack([(total(centre + h * e, 1.0) - total(centre - h * e, 1.0)) / (2 * h) for e in jnp.eye(T)])
    np.testing.assert_allclose(slope, numeric, rtol=1e-6)
    assert (jnp.abs(slope) > 1e-4).all()
    assert total(centre + 0.01, None) == total(centre, None)


def test_cost_is_flat():
    """With copied windows the operations of a step do not grow with the source."""
    def operations(length):
        source = jax.ShapeDtypeStruct((B, length, D), jnp.float32)
        run = lambda query, source: alignment.luong_local_attention(query, source, jnp.arange(T), reach=2, implementation="gathered")
        return jax.jit(run).lower(QUERY, source).compile().cost_analysis()["flops"]

    assert operations(4096) < 1.05 * operations(64)


@nnx.jit
def advance(decoder, state, token):
    return decoder.step(state, token)


@pytest.mark.parametrize("mode", ["global", "local-m", "local-p"])
@pytest.mark.parametrize("feeding", [False, True])
def test_decoder(mode, feeding):
    """Token by token is what the call computes; without input feeding so are all tokens at once; with it that form is refused."""
    decoder = alignment.LuongDecoder(9, D, num_layers=2, source_features=E, mode=mode, reach=2, input_feeding=feeding, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 9)
    called = nnx.jit(lambda decoder, tokens: decoder(tokens, SOURCE, mask=MASK))(decoder, tokens)
    state, outs = decoder.init_state(SOURCE, mask=MASK), []
    for t in range(T):
        shapes = jax.tree.map(jnp.shape, state)
        state, logits = advance(decoder, state, tokens[:, t:t + 1])
        assert jax.tree.map(jnp.shape, state) == shapes
        outs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), called, atol=1e-6)
    if feeding:
        with pytest.raises(NotImplementedError, match="input_feeding=False"):
            decoder(tokens, SOURCE, implementation="parallel")


def test_feeding_matters():
    """With input feeding what is found at one step changes the states of later ones, without only through tokens."""
    tokens = jnp.zeros((B, T), int)
    for feeding in (False, True):
        decoder = alignment.LuongDecoder(9, D, num_layers=1, input_feeding=feeding, rngs=nnx.Rngs(0))
        state = decoder.init_state(PLACED)
        state, other = (advance(decoder, state._replace(source=x), tokens[:, :1])[0] for x in (PLACED, -PLACED))
        states = [advance(decoder, s._replace(source=PLACED), tokens[:, :1])[0].lstm.hidden for s in (state, other)]
        assert (jnp.abs(states[0] - states[1]).max() > 1e-5) == feeding


def test_every_parameter_learns():
    """All parameters of the richest attention have a gradient; inputs of the paper's initial values lie in [-0.1, 0.1]."""
    layer = alignment.LuongAttention(D, source_features=E, kind="concat", mode="local-p", reach=2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(QUERY, SOURCE, mask=MASK) ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))
    assert all(jnp.abs(p).max() <= 0.1 for p in jax.tree.leaves(params))


def test_lstm_is_torchs():
    """The stack of layers is torch's, and reads only what is there."""
    torch = pytest.importorskip("torch")
    stack = StackedLSTM(D, 5, 2, rngs=nnx.Rngs(0))
    peer = torch.nn.LSTM(D, 5, 2, batch_first=True)
    with torch.no_grad():
        for name, params in (("weight_ih", stack.kernels), ("weight_hh", stack.recurrent), ("bias_ih", stack.biases)):
            for layer, param in enumerate(params):
                getattr(peer, f"{name}_l{layer}").copy_(torch.tensor(np.asarray(param[...]).T))
        for layer in range(2):
            getattr(peer, f"bias_hh_l{layer}").zero_()
        expected, (hidden, cell) = peer(torch.tensor(np.asarray(PLACED)))
    state, got = stack(PLACED)
    for a, b in ((got, expected), (state.hidden, hidden), (state.cell, cell)):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)
    short, _ = stack(PLACED[1:, :8])
    np.testing.assert_allclose(stack(PLACED, mask=MASK)[0].hidden[:, 1:], short.hidden, atol=1e-6)
    backward, y = stack(PLACED, reverse=True)
    np.testing.assert_allclose(y, stack(PLACED[:, ::-1])[1][:, ::-1], atol=1e-6)


def test_errors():
    """Wrong arguments are named."""
    for match, call in (("kind: expected", lambda: alignment.luong_scores(QUERY, SOURCE, kind="other")),
                        ("key: expected states of size 6", lambda: alignment.luong_scores(QUERY, SOURCE)),
                        ("kernel: expected shape", lambda: alignment.luong_scores(QUERY, SOURCE, kind="general")),
                        ("vector: expected shape", lambda: alignment.luong_scores(QUERY, SOURCE, kind="concat", kernel=CONCAT)),
                        ("kernel: expected at least 12", lambda: alignment.luong_scores(QUERY, SOURCE, kind="location", kernel=GENERAL)),
                        ("mask: expected booleans", lambda: alignment.luong_global_attention(QUERY, SOURCE, mask=MASK[:1], **SCORE)),
                        ("centre: expected shape", lambda: window(jnp.arange(T + 1))),
                        ("got 'location'", lambda: alignment.luong_local_attention(QUERY, SOURCE, jnp.arange(T), kind="location", kernel=GENERAL)),
                        ("mode: expected", lambda: alignment.LuongAttention(D, mode="local", rngs=nnx.Rngs(0)))):
        with pytest.raises(ValueError, match=match):
            call()
