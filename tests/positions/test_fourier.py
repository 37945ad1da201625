"""Fourier position embedding: rotary embedding as its special case, what its series do to scores, its variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, positions
from attnx.nn import Attention
from attnx.positions import FourierPosition, Rotary

LENGTH = 1024


def module(heads=2, size=16, **options):
    return FourierPosition(heads, size, rngs=nnx.Rngs(0), **{"train_length": LENGTH, **options})


def scores(place, first=0):
    """Dot products of 2 heads, [2, 12, 12], at positions from ``first`` on."""
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 12, 2, 16))
    where = first + jnp.arange(12)
    q, k = place(q, k, where, where)
    return jnp.einsum("btnh,bsnh->nts", q, k)


def test_rotary():
    """Without noise and floor, and with a tone a pair, rotary embedding bit for bit, as others write it out too."""
    place = module(gain=0.0, train_length=10**9, columns=8)
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 9, 2, 16))
    where = jnp.array([range(9), range(70, 79)])
    for got, expected in zip(place(q, k, where, where), Rotary()(q, k, where, where)):
        np.testing.assert_array_equal(got, expected)
    got, _ = place(q, k, where, where)
    angle = np.asarray(where)[..., None, None] * np.tile(10000.0 ** (-np.arange(0, 16, 2) / 16), 2)  # the usual half-split form
    half = np.concatenate([-q[..., 8:], q[..., :8]], -1)
    np.testing.assert_allclose(got, q * np.cos(angle) + half * np.sin(angle), atol=1e-5)


def test_floor(x64):
    """As many tones are dropped as have no whole period; with none left scores do not know positions."""
    tones = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    kept, dropped = positions.fope_frequencies(64, train_length=1024)
    assert dropped == np.sum(tones < 2 * np.pi / 1024) == 14 and (kept == tones[:18]).all()
    deaf = module(train_length=2)
    assert deaf.sine.shape == (2, 0, 0)
    np.testing.assert_allclose(scores(deaf, 100), scores(deaf), atol=1e-12)
    half = module(columns=1, gain=0.0)
    q = jax.random.normal(jax.random.key(0), (1, 12, 2, 16))
    free = np.r_[1:8, 9:16]
    np.testing.assert_array_equal(half(q, q)[0][..., free], q[..., free])


def test_not_a_function_of_the_difference(x64):
    """With noise a shift of all positions changes scores, without it not."""
    assert jnp.abs(scores(module(), 5) - scores(module())).max() > 1e-2
    np.testing.assert_allclose(scores(module(gain=0.0), 5), scores(module(gain=0.0)), atol=1e-4)


def test_series(x64):
    """Tables are the series written out."""
    tones, _ = positions.fope_frequencies(16, train_length=LENGTH)
    sine, cosine = (positions.fope_init(key, 2, len(tones), 3, 0.5, jnp.float64) for key in jax.random.split(jax.random.key(0)))
    where = jnp.arange(5) * 7
    got = positions.fope_tables(where, tones, sine, cosine, 16)
    for table, weights, wave, still in zip(got, (sine, cosine), (np.sin, np.cos), (0, 1)):
        for p, k, m in np.ndindex(5, 2, 3):
            expected = sum(weights[k, j, m] * wave(tone * where[p]) for j, tone in enumerate(tones))
            np.testing.assert_allclose(table[p, k, m], expected, atol=1e-12)
        np.testing.assert_array_equal(table[..., 3:], np.full((5, 2, 5), still))


def test_pad():
    """The released code's padding doubles what pairs without a series bring to scores."""
    free = lambda pad: scores(module(columns=0, pad=pad))
    np.testing.assert_allclose(free("reference"), 2 * free("zero-phase"), rtol=1e-4, atol=1e-4)


def test_init():
    """One dominant tone a pair, at m ceil(D / M), as far as there are tones; noise of Xavier's width, independent for both bases and all heads."""
    assert np.argwhere(positions.fope_init(jax.random.key(0), None, 5, 4, gain=0.0)[0] == 1).tolist() == [[0, 0], [2, 1], [4, 2]]
    noise = positions.fope_init(jax.random.key(0), 8, 60, 50, gain=0.5)
    pairs = np.arange(30)
    noise = noise.at[:, 2 * pairs, pairs].add(-1)
    np.testing.assert_allclose(jnp.std(noise), 0.5 * (2 / (68 * 50)) ** 0.5, rtol=0.02)
    place = module()
    assert (place.sine[...] != place.cosine[...]).any() and (place.sine[0] != place.sine[1]).any()
    shared = module(separate_heads=False, separate_basis=False)
    assert shared.sine.shape[0] == 1 and shared.cosine is shared.sine


def test_layer():
    """Wherever rotary embedding is: grouped keys, steps; coefficients are no parameters unless said so."""
    for learnable in (False, True):
        layer = Attention(32, 2, num_kv_heads=1, mechanism=attnx.pairs(mask=masks.causal()), position=module(1, learnable=learnable), rngs=nnx.Rngs(0))
        assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 4 + 2 * learnable
        x = jax.random.normal(jax.random.key(0), (1, 6, 32))
        state, first = layer.step(layer.init_state(1, 6), x[:, :4])
        _, rest = layer.step(state, x[:, 4:])
        np.testing.assert_allclose(jnp.concatenate([first, rest], 1), layer(x), atol=2e-6)


def test_expand():
    """At a longer length more tones have a period; those known keep their coefficients."""
    place = module(size=32, train_length=64)
    before, known = place.sine[...], len(place.frequencies)
    place.expand(4096, rngs=nnx.Rngs(1))
    assert len(place.frequencies) == len(positions.fope_frequencies(32, train_length=4096)[0]) > known
    np.testing.assert_array_equal(place.sine[:, :known], before)
    assert (place.sine[:, known:] != 0).all() and place.cosine.shape == place.sine.shape
    assert place(jnp.ones((1, 3, 2, 32)), jnp.ones((1, 3, 2, 32)))[0].shape == (1, 3, 2, 32)


def test_errors():
    """Wrong arguments are named."""
    tones, _ = positions.fope_frequencies(16, train_length=LENGTH)
    w = positions.fope_init(jax.random.key(0), 2, len(tones), 3)
    sine, cosine = positions.fope_tables(jnp.arange(4), tones, w, w, 16)
    for match, call in (("head_size: expected", lambda: positions.fope_frequencies(15, train_length=8)),
                        ("pad: expected", lambda: positions.fope_tables(jnp.arange(4), tones, w, w, 16, pad="ones")),
                        ("cosine: expected", lambda: positions.fope_tables(jnp.arange(4), tones, w, w[:1], 16)),
                        ("x: expected", lambda: positions.fope(jnp.ones((1, 4, 3, 16)), sine, cosine)),
                        ("sine: expected", lambda: positions.fope(jnp.ones((1, 5, 2, 16)), sine, cosine))):
        with pytest.raises(ValueError, match=match):
            call()
