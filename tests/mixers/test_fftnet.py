"""FFTNet: what it reduces to, its symmetries, its energy, other lengths, padding, and the modules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import mixers

B, T, D, N = 2, 12, 8, 2
F = T // 2 + 1
mix = jax.jit(mixers.spectral_mix, static_argnames=("activation", "fft", "filter"))


def arrays(seed=0, length=T):
    """x, base, delta, bias."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (B, length, D), (N, length // 2 + 1), (B, N, length // 2 + 1), (N, length // 2 + 1)
    return [jax.random.normal(key, shape, float) for key, shape in zip(keys, shapes)]


@pytest.mark.parametrize("length", [T, 11])
def test_convolution(x64, length):
    """Without bias a circular convolution; with a filter of ones the identity."""
    x, base, *_ = arrays(length=length)
    np.testing.assert_allclose(mix(x, jnp.ones_like(base)), x, atol=1e-12)
    kernel = np.fft.irfft(base, length)  # [N, T]
    shifted = np.stack([np.roll(x, i, axis=1) for i in range(length)])
    expected = np.einsum("ni,ibtnh->btnh", kernel, shifted.reshape(length, B, length, N, -1)).reshape(x.shape)
    np.testing.assert_allclose(mix(x, base), expected, atol=1e-12)


@pytest.mark.parametrize("activation", ["modrelu", "gelu_mag", "split_gelu"])
def test_shifts(x64, activation):
    """A circular shift of tokens shifts the output (but where real and imaginary parts are bent apart), the mean being what it was."""
    x, base, delta, bias = arrays()
    bias = None if activation == "split_gelu" else bias if activation == "modrelu" else 0 * bias
    apply = partial(mix, base=base, delta=delta, bias=bias, activation=activation)
    same = np.allclose(apply(jnp.roll(x, 5, axis=1)), jnp.roll(apply(x), 5, axis=1), atol=1e-12)
    assert same == (activation != "split_gelu")


def test_energy(x64):
    """The transform keeps the energy; a filter of at most one and a bias of at most zero lose some."""
    x, base, _, bias = arrays()
    energy = lambda x: float(jnp.sum(x**2))
    spectrum = jnp.fft.fft(x, axis=1, norm="ortho")
    assert abs(float(jnp.sum(jnp.abs(spectrum) ** 2)) / energy(x) - 1) < 1e-12
    assert energy(mix(x, jnp.tanh(base), bias=-jnp.abs(bias))) < energy(x)


def test_modrelu(x64):
    """Phases stay, magnitudes below -b vanish, and gradients at zero are finite."""
    z = jnp.array([3 + 4j, -0.3j, 0.0])
    out = mixers.modrelu(z, jnp.array(-0.5))
    np.testing.assert_allclose(out, np.array([(3 + 4j) * 0.9, 0, 0]), atol=1e-8)
    slope = jax.grad(lambda real, b: jnp.sum(mixers.modrelu(real + 0j, b).real), (0, 1))(jnp.zeros(2), jnp.array(0.5))
    assert all(np.isfinite(x).all() for x in slope)


def test_released_forms(x64):
    """The first release's additive filter with GELU of real and imaginary parts, and the later one's with magnitudes, written out."""
    x, base, delta, bias = arrays()
    z = np.fft.rfft(np.asarray(x).reshape(B, T, N, -1), axis=1, norm="ortho")
    gelu = lambda x: np.asarray(jax.nn.gelu(jnp.asarray(x), approximate=False))
    last = lambda a: np.moveaxis(np.asarray(a), -1, -2)[..., None]
    first = z * (last(base) + last(delta))
    expected = np.fft.irfft(gelu(first.real) + 1j * gelu(first.imag), T, axis=1, norm="ortho").reshape(x.shape)
    np.testing.assert_allclose(mix(x, base, delta, activation="split_gelu", filter="additive"), expected, atol=1e-12)
    later = z * last(base) * (1 + last(delta)) + last(bias)
    expected = np.fft.irfft(gelu(np.abs(later)) * later / np.abs(later), T, axis=1, norm="ortho").reshape(x.shape)
    np.testing.assert_allclose(mix(x, base, delta, bias, activation="gelu_mag"), expected, atol=1e-9)


def test_resize():
    """Interpolation in cycles a token: a line stays a line, a sequence's own length changes nothing, and the full form is periodic."""
    frequency = lambda length: jnp.arange(length // 2 + 1) / length
    np.testing.assert_allclose(mixers.resize_filter(frequency(12), 12, 9), frequency(9), atol=1e-6)
    full = jax.random.normal(jax.random.key(0), (3, 7))
    np.testing.assert_allclose(mixers.resize_filter(full, 7, 7, "full"), full, atol=1e-6)
    np.testing.assert_allclose(mixers.resize_filter(full, 7, 14, "full")[:, 13], (full[:, 6] + full[:, 0]) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="filter: expected 4 frequencies"):
        mixers.resize_filter(full[:, :3], 7, 9)


def test_padding():
    """Padding counts as zeros, does not enter the mean, and its output is zero."""
    mixer = mixers.FFTNetMixer(D, T, num_heads=N, rngs=nnx.Rngs(0))
    x, *_ = arrays()
    positions = jnp.where(jnp.arange(T) < 9, jnp.arange(T), -1)
    apply = nnx.jit(lambda mixer, x, positions: mixer(x, positions=positions))
    out = apply(mixer, x, positions)
    np.testing.assert_allclose(out, apply(mixer, x.at[:, 9:].set(1e3), positions), atol=1e-6)
    assert not out[:, 9:].any() and out[:, :9].any()
    assert not apply(mixer, x, jnp.full(T, -1)).any()


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "fft": "full"}, {"activation": "split_gelu", "filter": "additive"}])
def test_modules(options):
    """A classifier of blocks: padding at the end does not matter to the pooling, and every parameter has a gradient."""
    model = mixers.FFTNetClassifier(3, D, T, 5, num_heads=N, dropout_rate=0.0, rngs=nnx.Rngs(0), **options)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (B, T, 3))
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params, rest)(x) ** 2)))(params)
    dead = [jax.tree_util.keystr(path) for path, slope in jax.tree_util.tree_leaves_with_path(slopes) if not jnp.any(slope)]
    assert not dead, dead


def test_refusals():
    """It is not causal, has no steps, and names what does not fit."""
    mixer = mixers.FFTNetMixer(D, T, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="no causal"):
        mixers.FFTNetBlock(D, T, rngs=nnx.Rngs(0)).init_state(1, 8)
    with pytest.raises(NotImplementedError, match="segment_ids"):
        mixer(jnp.ones((1, T, D)), segment_ids=jnp.zeros((1, T), int))
    with pytest.raises(ValueError, match=r"base: expected shape \[N, 7\]"):
        mixers.spectral_mix(jnp.ones((1, T, D)), jnp.ones((2, 6)))
    with pytest.raises(ValueError, match="delta: expected shape"):
        mixers.spectral_mix(jnp.ones((1, T, D)), jnp.ones((2, 7)), jnp.ones((3, 2, 7)))
    with pytest.raises(ValueError, match="bias: expected None"):
        mixers.spectral_mix(jnp.ones((1, T, D)), jnp.ones((2, 7)), bias=jnp.ones((2, 7)), activation="split_gelu")
