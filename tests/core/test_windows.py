"""Attention in windows: the definition, in blocks, masks that repeat, and what is refused. The kernels have tests of their own."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx.core import windows
from attnx.core.windows import window_attention


def arrays(windows=6, length=5, heads=4, kv_heads=2, size=3, value_size=2, seed=0):
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape))
    return (normal(windows, length, heads, size), normal(windows, length, kv_heads, size), normal(windows, length, kv_heads, value_size),
            normal(heads, length, length), random.integers(0, 2, (3, length)), random.random((2, length, length)) < 0.7)


def by_hand(query, key, value, bias, regions, mask):
    """The equation, window by window and head by head."""
    query, key, value, bias = map(np.asarray, (query, key, value, bias))
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for w, n in np.ndindex(query.shape[0], query.shape[2]):
        kv = n * key.shape[2] // query.shape[2]
        s = query[w, :, n] @ key[w, :, kv].T / np.sqrt(query.shape[3]) + bias[n]
        ids = regions[w % len(regions)]
        e = np.where((ids[:, None] == ids) & mask[w % len(mask)], np.exp(s), 0)
        total = e.sum(1, keepdims=True)
        out[w, :, n] = np.where(total > 0, e / np.where(total > 0, total, 1), 0) @ value[w, :, kv]
    return out


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_is_the_equation(implementation, x64, monkeypatch):
    """Groups of heads, regions of three windows, a mask of two; in blocks of four windows, the last of them not whole."""
    monkeypatch.setattr(windows, "PAIRS", 4 * 4 * 25)
    query, key, value, bias, regions, mask = arrays()
    got = window_attention(query, key, value, bias=bias, regions=regions, mask=mask, implementation=implementation)
    np.testing.assert_allclose(got, by_hand(query, key, value, bias, regions, mask), atol=1e-12)


def test_blocks_have_the_gradients_of_the_definition(x64, monkeypatch):
    """By query, key, value, bias and a bias for every window, also with one of the second kind."""
    monkeypatch.setattr(windows, "PAIRS", 4 * 4 * 25)
    query, key, value, bias, regions, _ = arrays()
    own = jnp.sin(jnp.arange(6.0 * 25)).reshape(6, 1, 5, 5)

    def gradient(implementation):
        def loss(query, key, value, bias, own):
            scores = attnx.scores.bias(own), attnx.scores.soft_cap(2.0)
            return jnp.sum(jnp.sin(window_attention(query, key, value, bias=bias, regions=regions, scores=scores, implementation=implementation)))

        first = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
        second = jax.grad(lambda *x: sum(jnp.sum(g**2) for g in first(*x)), argnums=3)
        return jax.jit(lambda *x: (first(*x), second(*x)))(query, key, value, bias, own)

    agreement.assert_agree(gradient("blockwise"), gradient("reference"), 1e-11)


def test_the_bias_gradient_is_summed_over_windows(x64):
    """That of all windows is the sum of each one's, and a finite difference of an entry."""
    query, key, value, bias, regions, mask = arrays()

    @jax.jit
    def loss(bias):
        return jnp.sum(jnp.sin(window_attention(query, key, value, bias=bias, regions=regions)))

    def each(w):
        return jax.grad(lambda bias: jnp.sum(jnp.sin(window_attention(query[w:w + 1], key[w:w + 1], value[w:w + 1], bias=bias, regions=regions[w % 3:w % 3 + 1]))))(bias)

    whole = jax.grad(loss)(bias)
    np.testing.assert_allclose(whole, sum(map(each, range(6))), atol=1e-12)
    step = jnp.zeros_like(bias).at[1, 2, 3].set(1e-6)
    np.testing.assert_allclose(whole[1, 2, 3], (loss(bias + step) - loss(bias - step)) / 2e-6, atol=1e-3 * float(jnp.abs(whole).max()))


def test_axes_of_windows_and_none():
    query, key, value, bias, regions, _ = arrays()
    flat = window_attention(query, key, value, bias=bias, regions=regions)
    folded = window_attention(*(x.reshape(2, 3, *x.shape[1:]) for x in (query, key, value)), bias=bias, regions=regions)
    assert folded.shape == (2, 3, 5, 4, 2) and (folded.reshape(flat.shape) == flat).all()
    for chosen in ("reference", "blockwise"):
        assert window_attention(query[:0], key[:0], value[:0], bias=bias, implementation=chosen).shape == (0, 5, 4, 2)


def test_says_what_is_wrong():
    query, key, value, bias, regions, mask = arrays()
    for message, error, call in [
        ("bias: expected shape \\[4, 5, 5\\]", ValueError, {"bias": bias[:2]}),
        ("regions: expected shape \\[nW, 5\\] with nW a divisor of the 6", ValueError, {"regions": np.zeros((4, 5), int)}),
        ("mask: expected shape \\[nW, 5, 5\\]", ValueError, {"mask": mask[:, :4]}),
        ("mask: expected a mask", TypeError, {"mask": bias[:3]}),
        ("implementation: expected one of 'reference', 'blockwise', 'pallas'", ValueError, {"implementation": "ring"}),
    ]:
        with pytest.raises(error, match=message):
            window_attention(query, key, value, **call)
    with pytest.raises(ValueError, match="key: expected shape"):
        window_attention(query, key[:, :4], value)
