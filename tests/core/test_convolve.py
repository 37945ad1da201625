"""Convolutions and moving averages: the direct, FFT, chunked and step forms against the sums that define them, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core import convolve
from attnx.core.convolve import (
    convolution,
    convolution_init,
    convolution_step,
    ema,
    ema_init,
    ema_kernel,
    ema_step,
    exponential_moving_average,
    two_sided_kernel,
)

# Convolution --------------------------------------------------------------------------------------------------------


def toeplitz(kernel, origin, time, past=0, segments=None):
    """[C, T, P + T]: the matrix of the convolution, y = matrix x."""
    lag = past + np.arange(time)[:, None] - np.arange(past + time) + origin
    inside = (lag >= 0) & (lag < kernel.shape[0])
    if segments is not None:
        inside = inside & (segments[past:, None] == segments)
    return jnp.where(inside, jnp.moveaxis(kernel[np.clip(lag, 0, kernel.shape[0] - 1)], -1, 0), 0)


def definition(x, kernel, origin=0, history=None, segments=None):
    past = 0 if history is None else history.shape[1]
    seen = x if history is None else jnp.concatenate([history, x], axis=1)
    return jnp.einsum("cts,bsc->btc", toeplitz(kernel, origin, x.shape[1], past, segments), seen)


def with_gradients(function):
    """Output, and gradients of a fixed nonlinear function of it, in one compiled program."""
    def scalar(*arrays):
        y = function(*arrays)
        return jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape)) / y.size, y

    @jax.jit
    def both(*arrays):
        gradients, y = jax.grad(scalar, tuple(range(len(arrays))), has_aux=True)(*arrays)
        return y, *gradients

    return both


def assert_close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1, float(jnp.max(jnp.abs(y), initial=0))))


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape)) for shape in shapes]


convolve_jit = jax.jit(convolution, static_argnames=("origin", "implementation"))
ema_jit = jax.jit(ema, static_argnames=("implementation", "return_state"))


@pytest.mark.parametrize("time, taps, origin", [(7, 3, 0), (7, 3, 1), (7, 3, 2), (5, 9, 0), (5, 9, 4), (5, 30, 11), (1, 4, 0), (1, 1, 0)])
def test_forms_agree_with_the_definition(time, taps, origin, x64):
    x, kernel = arrays((2, time, 3), (taps, 3))
    expected = with_gradients(functools.partial(definition, origin=origin))(x, kernel)
    for form in ("direct", "fft"):
        assert_close(with_gradients(functools.partial(convolution, origin=origin, implementation=form))(x, kernel), expected, 1e-12)


@pytest.mark.parametrize("past, taps, origin", [(2, 5, 0), (9, 5, 1), (3, 5, 4)])
def test_history(past, taps, origin, x64):
    x, kernel, history = arrays((2, 6, 3), (taps, 3), (2, past, 3))
    expected = with_gradients(lambda x, k, h: definition(x, k, origin, h))(x, kernel, history)
    for form in ("direct", "fft"):
        ours = functools.partial(convolution, origin=origin, implementation=form)
        assert_close(with_gradients(lambda x, k, h, ours=ours: ours(x, k, history=h))(x, kernel, history), expected, 1e-12)


@pytest.mark.parametrize("taps, origin", [(4, 0), (20, 10)])
def test_segments_do_not_meet(taps, origin, x64):
    x, kernel, history = arrays((2, 9, 3), (taps, 3), (2, 2, 3))
    segments = np.array([5, 5, 5, 5, 1, 1, 2, -1, -1, 7, 7])
    ours = with_gradients(lambda x, k, h: convolution(x, k, origin=origin, history=h, segment_ids=segments))(x, kernel, history)
    expected = with_gradients(lambda x, k, h: definition(x, k, origin, h, segments))(x, kernel, history)
    assert_close(ours, expected, 1e-12)
    x = x.at[:, 6:].set(jnp.nan)
    poisoned = convolve_jit(x, kernel, origin=origin, history=history, segment_ids=jnp.tile(segments, (2, 1)))
    np.testing.assert_allclose(poisoned[:, :4], ours[0][:, :4], rtol=1e-12)


def test_long_kernels_in_float32():
    """FFT against direct where both are long, and the default choice on each side of the threshold."""
    x, kernel = arrays((1, 300, 2), (300, 2))
    direct, fft = (convolve_jit(x, kernel, implementation=form) for form in ("direct", "fft"))
    np.testing.assert_allclose(fft, direct, atol=2e-6 * float(abs(direct).max()))
    assert "fft" in convolve_jit.lower(x, kernel).as_text()
    assert "fft" not in convolve_jit.lower(x, kernel[: convolve.SHORT]).as_text()


def test_impulses_and_shared_kernels():
    x, kernel = arrays((2, 6, 3), (4, 1))
    impulse = jnp.zeros((5, 3)).at[2].set(1)
    assert (convolve_jit(x, impulse, origin=2) == x).all()
    assert (convolve_jit(x, impulse)[:, 2:] == x[:, :-2]).all()  # a token shift
    out = convolve_jit(x, kernel)
    for other in (convolve_jit(x, jnp.tile(kernel, (1, 3))), convolve_jit(x[None], kernel)[0], jnp.stack([convolve_jit(each, kernel) for each in x])):
        np.testing.assert_allclose(other, out, atol=1e-6)


def test_correlation_of_lax():
    x, kernel = arrays((2, 8, 3), (5, 3))
    layout = ("NWC", "WIO", "NWC")
    expected = jax.lax.conv_general_dilated(x, kernel[:, None], (1,), "SAME", dimension_numbers=layout, feature_group_count=3)
    np.testing.assert_allclose(convolve_jit(x, kernel[::-1], origin=2), expected, rtol=1e-5, atol=1e-5)


def test_two_sided_kernel():
    x, forward, backward = arrays((1, 6, 2), (4, 2), (3, 2))
    both = convolve_jit(x, forward) + convolve_jit(x[:, ::-1], backward)[:, ::-1]
    np.testing.assert_allclose(convolve_jit(x, two_sided_kernel(forward, backward), origin=2), both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [1, 4])
def test_convolution_streams(taps):
    x, kernel = arrays((2, 7, 3), (taps, 3))
    step = jax.jit(convolution_step)
    state, ys = convolution_init(2, 3, taps), []
    for start, stop in ((0, 1), (1, 2), (2, 3), (3, 7)):
        state, y = step(state, kernel, x[:, start:stop])
        assert state.shape == (2, taps - 1, 3)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys, axis=1), convolve_jit(x, kernel), rtol=1e-6, atol=1e-6)


def test_dtypes_and_vmap():
    x, kernel = arrays((2, 40, 3), (40, 3))
    x = x.astype(jnp.bfloat16)
    exact = convolve_jit(x.astype(jnp.float32), kernel, implementation="direct")
    for form in ("direct", "fft"):
        half = convolve_jit(x, kernel, implementation=form)
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=2**-8 * float(abs(exact).max()))
    mapped = jax.jit(jax.vmap(convolution, (0, None)))(x, kernel)
    np.testing.assert_allclose(mapped.astype(jnp.float32), exact, atol=2**-8 * float(abs(exact).max()))


@pytest.mark.parametrize("form", ["direct", "fft"])
def test_forward_mode(form):
    """The derivative of a bilinear map."""
    x, kernel, dx, dk = arrays((1, 20, 2), (12, 2), (1, 20, 2), (12, 2))
    f = functools.partial(convolution, implementation=form)
    tangent, expected = jax.jit(lambda *a: (jax.jvp(f, a[:2], a[2:])[1], f(a[2], a[1]) + f(a[0], a[3])))(x, kernel, dx, dk)
    np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-4)


def test_sharded_channels():
    """Under shard_map each device convolves the same input with its own channels' kernel."""
    x, kernel = arrays((1, 20, 1), (12, 4))
    mesh, spec = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    specs = {"in_specs": (spec(), spec(None, "tensor")), "out_specs": spec(None, None, "tensor")}
    sharded = jax.jit(jax.shard_map(convolution, mesh=mesh, **specs))(x, kernel)
    np.testing.assert_allclose(sharded, convolve_jit(jnp.tile(x, (1, 1, 4)), kernel), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function, shapes", [
    (functools.partial(convolution, implementation="direct"), [(1024, 8)]),
    (functools.partial(ema, implementation="fft"), [(8, 16)] * 3),
    (functools.partial(ema, implementation="chunked"), [(8, 16)] * 3),
])
def test_memory_is_linear(function, shapes, optimised):
    """Forward and backward hold a few arrays of the input's size, however long the kernel and many the dimensions."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, 1024, 8), *shapes]]
    gradient = jax.grad(lambda *a: jnp.sum(function(*a) ** 2), tuple(range(len(inputs))))
    used = jax.jit(gradient).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    assert used < 32 * inputs[0].size * 4


# Moving averages ----------------------------------------------------------------------------------------------------


def recurrence(x, decay, gain, readout, state=None, segments=None):
    """The definition, a step at a time."""
    batch, time, channels = x.shape
    decay, gain, readout = (jnp.broadcast_to(a, (channels, decay.shape[1])) for a in (decay, gain, readout))
    h = jnp.zeros((batch, *decay.shape)) if state is None else state
    keep = jnp.ones(time, bool) if segments is None else jnp.concatenate([jnp.array([True]), segments[1:] == segments[:-1]])

    def step(h, at):
        x, keep = at
        h = jnp.where(keep, decay * h, 0) + gain * x[..., None]
        return h, jnp.sum(readout * h, axis=-1).real

    dtype = jnp.result_type(h, decay, gain)
    h, y = jax.lax.scan(step, h.astype(dtype), (jnp.moveaxis(x, 1, 0), keep))
    return jnp.moveaxis(y, 0, 1), h


def coefficients(channels, n, complex_decay=False):
    decay, gain, readout = arrays((channels, n), (channels, n), (channels, n), seed=1)
    decay = 1 / (1 + jnp.exp(-2 * decay))
    if complex_decay:
        decay, gain, readout = decay * jnp.exp(1j * gain), gain + 0.5j, readout * (1 - 1j)
    return decay, gain, readout


@pytest.mark.parametrize("time", [5, 150])
def test_moving_averages_agree_with_the_recurrence(time, x64):
    x, = arrays((2, time, 3))
    parameters = coefficients(3, 4)
    expected = with_gradients(lambda *a: recurrence(*a)[0])(x, *parameters)
    for form in ("direct", "fft", "chunked"):
        assert_close(with_gradients(functools.partial(ema, implementation=form))(x, *parameters), expected, 1e-10)


def test_complex_decays(x64):
    """A diagonal state-space model; gradients by the real and imaginary parts."""
    x, = arrays((2, 150, 3))
    parts = [f(a) for a in coefficients(3, 4, complex_decay=True) for f in (jnp.real, jnp.imag)]

    def of_parts(function):
        return lambda x, *p: function(x, *(re + 1j * im for re, im in zip(p[::2], p[1::2])))

    expected = with_gradients(of_parts(lambda *a: recurrence(*a)[0]))(x, *parts)
    for form in ("fft", "chunked"):
        assert_close(with_gradients(of_parts(functools.partial(ema, implementation=form)))(x, *parts), expected, 1e-10)


@pytest.mark.parametrize("time", [6, 150])
def test_states_and_resets(time, x64):
    x, state = arrays((2, time, 3), (2, 3, 4))
    parameters = coefficients(3, 4)
    segments = np.array([3, 3, 1, 3, 3, 3] if time == 6 else [0] * 40 + [1] * 24 + [2] + [1] * 70 + [5] * 15)

    def ours(ids, x, state, *p):
        return jnp.concatenate([a.ravel() for a in ema(x, *p, initial_state=state, segment_ids=ids, return_state=True)])

    def expected(ids, x, state, *p):
        return jnp.concatenate([a.ravel() for a in recurrence(x, *p, state, ids)])

    for ids in ([segments] if time == 6 else [None, segments]):
        results = (with_gradients(functools.partial(f, ids))(x, state, *parameters) for f in (ours, expected))
        assert_close(*results, 1e-10)


@pytest.mark.parametrize("complex_decay", [False, True])
def test_averages_stream(complex_decay):
    x, = arrays((2, 70, 3))
    parameters = coefficients(3, 4, complex_decay)
    state, ys, step = ema_init(2, parameters[0]), [], jax.jit(ema_step)
    for start, stop in ((0, 1), (1, 2), (2, 70)):
        shape, dtype = state.shape, state.dtype
        state, y = step(state, *parameters, x[:, start:stop])
        assert (state.shape, state.dtype) == (shape, dtype)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys, axis=1), ema_jit(x, *parameters), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["fft", "chunked"])
def test_extreme_decays_in_float32(form):
    """Decays of 0 and 1 and between: finite gradients, and the sums of the geometric series."""
    decay, ones, t = np.array([0, 1e-4, 0.999, 1], np.float32)[:, None], jnp.ones((4, 1)), np.arange(1, 4097)
    y, *gradients = with_gradients(functools.partial(ema, implementation=form))(jnp.ones((1, 4096, 4)), jnp.asarray(decay), ones, ones)
    assert all(np.isfinite(g).all() for g in gradients)
    series = [t if q == 1 else (1 - q**t) / (1 - q) for q in decay[:, 0].astype(float)]
    for ours, expected in zip(y[0].T, series):
        np.testing.assert_allclose(ours, expected, atol=2e-6 * max(expected), rtol=0)


def test_damped_average_of_mega():
    """One dimension with beta = eta = 1 is y_t = a x_t + (1 - a d) y_(t-1); a bidirectional one is two kernels in one."""
    x, = arrays((1, 9, 2))
    alpha, delta = jnp.array([[0.3], [0.9]]), jnp.array([[0.5], [0.8]])
    y, expected = np.zeros(2), []
    for step in np.asarray(x[0]):
        y = np.asarray(alpha)[:, 0] * step + (1 - np.asarray(alpha * delta)[:, 0]) * y
        expected.append(y)
    np.testing.assert_allclose(ema_jit(x, 1 - alpha * delta, alpha, 1.0)[0], np.stack(expected), rtol=1e-5, atol=1e-6)
    kernel = two_sided_kernel(ema_kernel(1 - alpha, alpha, alpha, 9), ema_kernel(1 - delta, delta, delta, 9))
    both = ema_jit(x, 1 - alpha, alpha, alpha) + ema_jit(x[:, ::-1], 1 - delta, delta, delta)[:, ::-1]
    np.testing.assert_allclose(convolve_jit(x, kernel, origin=8), both, rtol=1e-4, atol=1e-5)


def test_textbook_average():
    x, = arrays((2, 5, 3))
    alpha = jnp.array([0.1, 0.5, 1.0])
    y = jax.jit(exponential_moving_average)(x, alpha, initial_state=x[:, 0, :, None])  # starts at the first value
    np.testing.assert_allclose(y[:, 0], x[:, 0], rtol=1e-5)
    np.testing.assert_allclose(y[:, 2], alpha * x[:, 2] + (1 - alpha) * y[:, 1], rtol=1e-4, atol=1e-6)
    assert jax.eval_shape(exponential_moving_average, x.astype(jnp.bfloat16), alpha).dtype == jnp.bfloat16


def test_nothing_to_do():
    empty = jnp.zeros((2, 0, 3))
    y, state = ema(empty, *coefficients(3, 4), initial_state=jnp.ones((2, 3, 4)), return_state=True)
    assert y.shape == empty.shape and (state == 1).all()
    assert convolution(empty, jnp.ones((4, 3))).shape == empty.shape
    assert convolution(jnp.zeros((0, 5, 3)), jnp.ones((4, 3))).shape == (0, 5, 3)
    assert ema_kernel(*coefficients(3, 4), 0).shape == (0, 3)


X, KERNEL, HALF = jnp.ones((1, 4, 2)), jnp.ones((3, 2)), jnp.ones((2, 1))


@pytest.mark.parametrize("call, error, words", [
    (lambda: convolution(jnp.ones(4), KERNEL), ValueError, r"x: expected real numbers of shape \[..., T, C\], got float32\[4\]"),
    (lambda: convolution(X, jnp.ones((3, 5))), ValueError, r"kernel: expected real numbers of shape \[L, 2\] or \[L, 1\]"),
    (lambda: convolution(X, KERNEL, origin=3), ValueError, r"origin: expected an integer from 0 to 2, got 3"),
    (lambda: convolution(X, KERNEL, history=jnp.ones((2, 1, 2))), ValueError, r"history: expected shape \[1, 'P', 2\]"),
    (lambda: convolution(X, KERNEL, segment_ids=jnp.zeros(3, int)), ValueError, r"segment_ids: expected shape \[1, 4\] or \[4\]"),
    (lambda: convolution(X, KERNEL, implementation="pallas"), ValueError, r"implementation: expected None or one of \('direct', 'fft'\)"),
    (lambda: convolution(X, KERNEL, segment_ids=jnp.zeros(4, int), implementation="fft"), NotImplementedError, "segment_ids need 'direct'"),
    (lambda: convolution_step(jnp.ones((1, 3, 2)), KERNEL, X), ValueError, r"state: expected the last 2 inputs"),
    (lambda: ema(X, jnp.ones(2), HALF, HALF), ValueError, r"decay: expected shape \[C, n\] or a number, got float32\[2\]"),
    (lambda: ema(X, jnp.ones((3, 1)), 1.0, 1.0), ValueError, r"decay: expected shape \[C, n\] with C = 2"),
    (lambda: ema(X, HALF, HALF, HALF, initial_state=jnp.ones((1, 2))), ValueError, r"initial_state: expected shape \[1, 2, 1\]"),
    (lambda: ema(X, HALF, HALF, HALF, return_state=True, implementation="fft"), NotImplementedError, "'chunked' does"),
])
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
