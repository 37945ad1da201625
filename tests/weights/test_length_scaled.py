"""Length-scaled softplus attention: what it reduces to, its rows, its numbers, and the layer."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import attnx
from attnx import masks, weights
from attnx.positions import Rotary

BASES = {"softplus": jax.nn.softplus, "exp": jnp.exp, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "relu2": lambda x: jax.nn.relu(x) ** 2}


def written_out(base, power, s, ok, offset=1.0, free_rows=3):
    """The formula of the paper, with the plain power."""
    count = ok.sum(-1, keepdims=True)
    a = jnp.where(ok, BASES[base](jnp.log(count) * s), 0)
    a = a / a.sum(-1, keepdims=True)
    if power is None:
        return a
    r = jax.nn.relu(count * a - jnp.where(count <= free_rows, 0, offset)) ** power
    return r / r.sum(-1, keepdims=True)


@pytest.mark.parametrize(("base", "power"), [("softplus", None), ("softplus", 15), ("softplus", 2.5), ("exp", 3), ("sigmoid", 3)])
def test_formula(x64, base, power):
    """Against the formula, forward and backward, causal: in tiles and materialised; rows sum to 1 and the first finds its own value."""
    query, key, value, cotangent = agreement.arrays(queries=11)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    ok = jnp.broadcast_to(jnp.tril(jnp.ones((11, 11), bool)), (2, 4, 11, 11))

    def dense(query, key, value):
        return oracles.attend(lambda s, ok: written_out(base, power, s, ok), unit(query), unit(key), value, ok, scale=np.log(5))

    def ours(implementation):
        return lambda *args: weights.lssar_attention(*args, power=power, base=base, mask=masks.causal(), implementation=implementation,
                                                     block_sizes=(4, 4) if implementation == "blockwise" else None)

    def gradients(attend):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.vdot(attend(*args), cotangent), (0, 1, 2)))(query, key, value)

    expected = gradients(dense)
    for implementation in ("blockwise", "reference"):
        agreement.assert_agree(gradients(ours(implementation)), expected, 1e-9)
    np.testing.assert_allclose(ours(None)(query, key, value)[:, 0], jnp.repeat(value[:, 0], 2, 1), atol=1e-12)
    np.testing.assert_allclose(ours(None)(query, key, jnp.ones_like(value)), 1, atol=1e-12)


def test_reductions(x64):
    """With exp and no length scale it is softmax; lengths of queries and keys do not matter; the first version's scores; no sums at all."""
    query, key, value, _ = agreement.arrays(queries=11)
    plain = dict(power=None, mask=masks.causal())
    softmax = attnx.attention(query, key, value, mask=masks.causal(), scale=1.7)
    np.testing.assert_allclose(weights.lssar_attention(query, key, value, base="exp", length_scaled=False, unit=False, scale=1.7, **plain), softmax, atol=1e-12)
    longer = jnp.arange(1.0, 12.0)[:, None, None]
    np.testing.assert_allclose(weights.lssar_attention(query * longer, key / longer, value, mask=masks.causal()),
                               weights.lssar_attention(query, key, value, mask=masks.causal()), atol=1e-10)
    first = attnx.attention(query, key, value, weights=weights.lssa(), scale=np.log(5) / np.sqrt(5), mask=masks.causal())
    np.testing.assert_allclose(weights.lssar_attention(query, key, value, unit=False, **plain), first, atol=1e-12)
    for base in BASES:
        got = attnx.attention_weights(query, key, weights=weights.lssa(base, length_scaled=False, normalize=False), mask=masks.causal(), scale=1.0)
        expected = jnp.tril(BASES[base](oracles.dot_products(query, key, 1.0)))
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_masked(x64):
    """Masked weights are 0, and counts are of keys that are seen: padding before a sequence changes nothing."""
    query, key, value, _ = agreement.arrays(queries=11)
    padded = jnp.where(jnp.arange(11) < 4, -1, jnp.arange(11) - 4)
    got = weights.lssar_attention(query, key, value, mask=masks.causal(), query_positions=padded, key_positions=padded)
    np.testing.assert_allclose(got[:, 4:], weights.lssar_attention(*(x[:, 4:] for x in (query, key, value)), mask=masks.causal()), atol=1e-10)
    assert not got[:, :4].any()
    w = attnx.attention_weights(query, key, weights=weights.lssa(power=3), mask=masks.causal())
    assert not jnp.triu(w, 1).any()


def test_reweight():
    """The order of weights stays, those above the uniform level remain; a power of the ratio is the plain power in float64; a large one takes the largest."""
    a = jax.nn.softmax(jax.random.normal(jax.random.key(0), (40, 12)))
    w = np.asarray(weights.reweight(a, 12, 3))
    np.testing.assert_array_equal(w > 0, a > 1 / 12)
    order = np.argsort(a, -1)
    assert (np.diff(np.take_along_axis(w, order, -1)) >= 0).all()
    plain = np.maximum(12 * np.asarray(a, np.float64) - 1, 0) ** 15
    np.testing.assert_allclose(weights.reweight(a, 12, 15), plain / plain.sum(-1, keepdims=True), atol=1e-6)
    peaked = jnp.full((1, 4000), 0.5 / 3999).at[0, 7].set(0.5)  # 2000^15 is no float32
    np.testing.assert_allclose(weights.reweight(peaked, 4000, 15)[0, 7], 1, atol=1e-6)
    close = jnp.array([[0.42, 0.40, 0.18, 0.0]])  # above 1 / 4 by 0.17 and 0.15: a gap of more than a tenth
    assert weights.reweight(close, 4, 50).max() > 0.99
    free = jnp.array([[0.5, 0.3, 0.2]])
    np.testing.assert_allclose(weights.reweight(free, 3, 2), free**2 / jnp.sum(free**2), atol=1e-6)
    np.testing.assert_allclose(weights.reweight(jnp.full((1, 7), 1 / 7), 7), 1 / 7, atol=1e-6)  # none lies above: as it was
    assert not weights.reweight(jnp.zeros((1, 7)), 7).any()


def test_long_rows():
    """In float32 at 2048 tokens, output and gradients are finite and rows sum to 1."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 2048, 1, 8))
    value = value.at[..., 0].set(1)

    @jax.jit
    def run(*args):
        def loss(*args):
            out = weights.lssar_attention(*args, mask=masks.causal(), implementation="blockwise")
            return jnp.sum(jnp.sin(out)), out
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)

    (_, out), slopes = run(query, key, value)
    np.testing.assert_allclose(out[..., 0], 1, atol=1e-5)
    assert all(np.isfinite(g).all() and g.any() for g in slopes)


@pytest.mark.parametrize("options", [{}, dict(unit=False, power=None), dict(mask=masks.sliding_window(4), num_kv_heads=2)], ids=str)
def test_layer(options):
    """Prefill and steps find what the call finds; it is attention of turned vectors of length 1."""
    layer = weights.LengthScaledAttention(16, 4, rngs=nnx.Rngs(0), **options)
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    graph, params = nnx.split(layer)

    @jax.jit
    def both(params):
        layer = nnx.merge(graph, params)
        state, first = layer.step(layer.init_state(2, 7), x[:, :5])
        state, second = layer.step(state, x[:, 5:6])
        return layer(x), jnp.concatenate([first, second, layer.step(state, x[:, 6:])[1]], 1)

    whole, stepped = both(params)
    np.testing.assert_allclose(stepped, whole, atol=1e-4)
    if not options:
        turned = Rotary()(layer.query(x), layer.key(x), None, None)
        found = weights.lssar_attention(*turned, layer.value(x), mask=masks.causal())
        np.testing.assert_allclose(layer.out(found), whole, atol=1e-5)


def test_errors():
    """Wrong arguments are named."""
    for error, match, call in ((ValueError, "base: expected", lambda: weights.lssa("tanh")), (ValueError, "power: expected", lambda: weights.lssa(power=0.5)),
                               (ValueError, "power: expected", lambda: weights.lssa(power=3, normalize=False)),
                               (TypeError, "power: expected", lambda: weights.lssa(power="3")), (TypeError, "free_rows: expected", lambda: weights.lssa(free_rows=0.5)),
                               (TypeError, "offset: expected", lambda: weights.reweight(jnp.ones((1, 1)), 1, offset=None))):
        with pytest.raises(error, match=match):
            call()
