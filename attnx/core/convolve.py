"""Convolutions and moving averages along time, of any length, in forms that agree: direct, by FFT, by chunks, and step by step.

    convolution   y_t = sum over i of  kernel_i * x_(t - i + origin)
    ema           h_t = decay * h_(t-1) + gain * x_t,   y_t = Re <readout, h_t>

The first covers short convolutions, token shifts, long and oversized kernels, one- and two-sided, a channel at a time; the second, which is
a convolution with kernel_i = Re <readout, gain decay^i>, the damped multi-dimensional average of Mega and diagonal state-space models.
Sums and states are kept in at least float32, outputs have the dtype of x. Everything is linear in x, takes O(T) memory, and can be
differentiated in both modes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, Real

from attnx.core.checks import check_integer, check_integers, describe
from attnx.core.compat import vary, varying_axes
from pallas_kernels.tile import accumulator_dtype

# The coefficients of an average: one for each channel and dimension, or one for all.
Coefficients = Inexact[Array, "C n"] | float

# Up to this many taps, or outputs, the direct form is chosen over the FFT.
SHORT = 64

# Steps of a chunk in the chunked form of an EMA.
CHUNK = 64


def _fast_length(n: int) -> int:
    """The smallest length of at least n that is a power of two times 1, 3, 5, 9 or 15, for which FFTs are fast."""
    return min(odd << max(-(-n // odd) - 1, 0).bit_length() for odd in (1, 3, 5, 9, 15))


def _check_input(x):
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected real numbers of shape [..., T, C], got {describe(x)}")


def _check_segments(segment_ids, shape):
    segment_ids = check_integers("segment_ids", segment_ids, ranks=(1, len(shape)))
    if segment_ids.shape not in (shape, shape[-1:]):
        raise ValueError(f"segment_ids: expected shape {list(shape)} or {list(shape[-1:])}, got {describe(segment_ids)}")
    return jnp.broadcast_to(segment_ids, shape)


def _check_implementation(implementation, known):
    if implementation is not None and implementation not in known:
        raise ValueError(f"implementation: expected None or one of {known}, got {implementation!r}")


# Convolution --------------------------------------------------------------------------------------------------------


def _direct(x, kernel, segments, present):
    """Valid correlation of x [L - 1 + T, D] with kernel [L, D]; ``segments`` [L - 1 + T, D] or None, the outputs' from ``present`` on.

    One step for each tap or, where they are fewer, for each output. Recomputing the step in the backward pass keeps memory at O(T + L).
    """
    taps = kernel.shape[0]
    length = x.shape[0] - taps + 1
    here = None if segments is None else segments[present : present + length]

    def seen(start, size, of):
        window = lax.dynamic_slice_in_dim(x, start, size)
        return window if segments is None else jnp.where(lax.dynamic_slice_in_dim(segments, start, size) == of, window, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tap(y, at):
        i, weight = at
        return y + weight * seen(i, length, here), None

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def output(_, at):
        t, of = at
        return None, jnp.sum(kernel * seen(t, taps, of), axis=0)

    if taps <= length:
        empty = vary(jnp.zeros_like(x[:length]), varying_axes(x, kernel))
        return lax.scan(tap, empty, (jnp.arange(taps), kernel), unroll=taps <= 8)[0]
    return lax.scan(output, None, (jnp.arange(length), here), unroll=length <= 8)[1]


def convolution(x: Float[Array, "*B T C"], kernel: Float[Array, "L C"], *, origin: int = 0, history: Float[Array, "*B P C"] | None = None,
                segment_ids: Int[Array, "*B P+T"] | None = None, implementation: str | None = None) -> Float[Array, "*B T C"]:
    """Depthwise convolution along time: y_t = sum over i of kernel_i * x_(t - i + origin), x being 0 outside.

    Args:
      x: [..., T, C].
      kernel: [L, C], or [L, 1] for one kernel shared by all channels; shorter or longer than T.
      origin: the tap that meets the present. 0 is causal, (L - 1) // 2 centred, L - 1 anti-causal. (A correlation, as deep learning's
        convolutions are, takes ``kernel[::-1]``.)
      history: [..., P, C], inputs that came before x; the last L - 1 - origin of them matter.
      segment_ids: int [..., P + T] or [P + T], over history and x: only inputs of the same segment meet.
      implementation: 'direct', O(T L); 'fft', O((T + L) log(T + L)), with rounding errors relative to the largest outputs; None takes
        'direct' for segments and for at most 64 taps or outputs.

    Returns:
      [..., T, C] in the dtype of x.

    Raises:
      ValueError: shapes that do not fit. NotImplementedError: segments with 'fft'.

    >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    >>> kernel = jnp.array([[0.0], [1.0], [10.0]])
    >>> convolution(x, kernel)[:, 0], convolution(x, kernel, origin=1)[:, 0]
    (Array([ 0.,  1., 12., 23.], dtype=float32), Array([ 1., 12., 23., 34.], dtype=float32))
    """
    _check_input(x)
    _check_implementation(implementation, ("direct", "fft"))
    *lead, time, channels = x.shape
    if kernel.ndim != 2 or not kernel.shape[0] or kernel.shape[1] not in (1, channels) or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"kernel: expected real numbers of shape [L, {channels}] or [L, 1] with L of at least 1, got {describe(kernel)}")
    origin = check_integer("origin", origin, least=0, most=kernel.shape[0] - 1)
    past = 0 if history is None else history.shape[-2]
    if history is not None and history.shape != (*lead, past, channels):
        raise ValueError(f"history: expected shape {[*lead, 'P', channels]} as x, got {describe(history)}")
    if segment_ids is not None:
        segment_ids = _check_segments(segment_ids, (*lead, past + time))
        if implementation == "fft":
            raise NotImplementedError("implementation: 'fft' mixes all segments; segment_ids need 'direct'")
    if not x.size:
        return x
    dtype = accumulator_dtype(x.dtype)
    seen = x if history is None else jnp.concatenate([history.astype(x.dtype), x], axis=-2)

    # Taps that reach before the history or past the end only ever meet zeros, and so does history beyond the first tap's reach.
    first, last = max(origin - (time - 1), 0), min(origin + past + time - 1, kernel.shape[0] - 1)
    kernel, origin = kernel[first : last + 1].astype(dtype), origin - first
    reach = kernel.shape[0] - 1 - origin
    drop = max(past - reach, 0)
    seen, past = seen[..., drop:, :].astype(dtype), past - drop
    taps = kernel.shape[0]

    if implementation == "fft" or (implementation is None and segment_ids is None and min(taps, time) > SHORT):
        n = _fast_length(max(time + taps - 1 - origin, past + time + origin))  # what wraps around misses the outputs
        y = jnp.fft.irfft(jnp.fft.rfft(seen, n, axis=-2) * jnp.fft.rfft(kernel, n, axis=0), n, axis=-2)
        return y[..., past + origin : past + origin + time, :].astype(x.dtype)

    # The batch joins the channels: one long contiguous axis beside time.
    def columns(a):
        return jnp.moveaxis(a.reshape(-1, *a.shape[-2:]), 0, 1).reshape(a.shape[-2], -1)

    pad = ((reach - past, origin), (0, 0))
    if segment_ids is not None:
        segment_ids = columns(jnp.broadcast_to(segment_ids[..., drop:, None], seen.shape))
        segment_ids = jnp.pad(segment_ids, pad)
    batch = seen.size // (seen.shape[-2] * channels)
    weights = jnp.tile(jnp.broadcast_to(kernel[::-1], (taps, channels)), (1, batch))
    y = _direct(jnp.pad(columns(seen), pad), weights, segment_ids, reach)
    return jnp.moveaxis(y.reshape(time, batch, channels), 0, 1).reshape(x.shape).astype(x.dtype)


def two_sided_kernel(forward: Float[Array, "L C"], backward: Float[Array, "M C"]) -> Float[Array, "L+M-1 C"]:
    """One kernel for a sum of two convolutions, over the past and over the future, both with the present; its origin is M - 1.

        y_t = sum_(s <= t) forward_(t - s) x_s + sum_(s >= t) backward_(s - t) x_s

    >>> two_sided_kernel(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]]))[:, 0]
    Array([4., 4., 2.], dtype=float32)
    """
    return jnp.concatenate([backward[:0:-1], forward[:1] + backward[:1], forward[1:]])


def convolution_init(batch: int, channels: int, taps: int, dtype=jnp.float32) -> Float[Array, "B L-1 C"]:
    """The state of a causal convolution before the first input: the last L - 1 inputs, all zero.

    >>> convolution_init(2, 8, 4).shape
    (2, 3, 8)
    """
    return jnp.zeros((batch, check_integer("taps", taps, least=1) - 1, channels), dtype)


def convolution_step(state: Float[Array, "B L-1 C"], kernel: Float[Array, "L C"], x: Float[Array, "B t C"]
                     ) -> tuple[Float[Array, "B L-1 C"], Float[Array, "B t C"]]:
    """Convolves t new inputs causally: ``(state, y)``, with y that of :func:`convolution` over the whole stream. O(t L) and O(L) memory.

    Args:
      state: from :func:`convolution_init` with the kernel's length, or from the step before.
      kernel: [L, C] or [L, 1].
      x: [B, t, C], t of one or more.

    >>> x, kernel = jnp.arange(6.0).reshape(1, 6, 1), jnp.ones((3, 1))
    >>> state, first = convolution_step(convolution_init(1, 1, 3), kernel, x[:, :2])
    >>> state, second = convolution_step(state, kernel, x[:, 2:])
    >>> jnp.concatenate([first, second], axis=1)[0, :, 0]
    Array([ 0.,  1.,  3.,  6.,  9., 12.], dtype=float32)
    """
    if state.shape[-2] != kernel.shape[0] - 1:
        raise ValueError(f"state: expected the last {kernel.shape[0] - 1} inputs for kernel {describe(kernel)}, got {describe(state)}")
    y = convolution(x, kernel, history=state)
    return jnp.concatenate([state, x.astype(state.dtype)], axis=-2)[..., x.shape[-2] :, :], y


# Moving averages ----------------------------------------------------------------------------------------------------


def _coefficients(decay, gain, readout, channels, dtype):
    """The three of an EMA, each [C, n] and real or complex in the accumulator's precision."""
    for name, a in (("decay", decay), ("gain", gain), ("readout", readout)):
        if jnp.ndim(a) not in (0, 2):
            raise ValueError(f"{name}: expected shape [C, n] or a number, got {describe(a)}")
    shape = jnp.broadcast_shapes(*map(jnp.shape, (decay, gain, readout)), (1, 1))
    if channels is not None:
        if shape[0] not in (1, channels):
            raise ValueError(f"decay: expected shape [C, n] with C = {channels} as in x, got {shape}")
        shape = (channels, shape[1])
    precision = jnp.promote_types(dtype, jnp.complex64) if any(map(jnp.iscomplexobj, (decay, gain, readout))) else dtype
    return tuple(jnp.broadcast_to(jnp.asarray(a, precision), shape) for a in (decay, gain, readout))


def _powers(decay, exponents):
    """decay^i for each of the exponents, [.., C, n]."""
    return decay ** jnp.asarray(exponents, jnp.int32)[:, None, None]


# Decays multiply up to T times, so products of their powers want every bit, also where float32 matrix products default to less.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def ema_kernel(decay: Coefficients, gain: Coefficients, readout: Coefficients, length: int) -> Float[Array, "L C"]:
    """The kernel of :func:`ema`: k_i = Re sum over n of readout gain decay^i, for i = 0..length-1.

    Two of them make a bidirectional average: ``two_sided_kernel(ema_kernel(...), ema_kernel(...))``.

    >>> ema_kernel(jnp.array([[0.5]]), jnp.array([[1.0]]), jnp.array([[2.0]]), 3)[:, 0]
    Array([2. , 1. , 0.5], dtype=float32)
    """
    dtype = jnp.finfo(accumulator_dtype(jnp.result_type(decay, gain, readout))).dtype
    decay, gain, readout = _coefficients(decay, gain, readout, None, dtype)
    if not check_integer("length", length, least=0):
        return jnp.zeros((0, decay.shape[0]), dtype)
    # decay^(j stride + r) is a product of two powers, so 2 sqrt(length) of them and a matrix product do.
    stride = math.isqrt(length - 1) + 1
    coarse = gain * readout * _powers(decay, range(0, length, stride))
    fine = _powers(decay, range(stride))
    return _einsum("jcn,rcn->jrc", coarse, fine).real.reshape(-1, decay.shape[0])[:length]


def _by_chunks(x, decay, gain, readout, state, entry, runs, chunk):
    """``(y, state)`` of x [B, T, C], T a multiple of ``chunk``: within chunks by convolution, between them by their last states.

    ``runs`` [B, T] numbers the segments or is None, ``entry`` [B] is the number of the one that ``state`` belongs to.
    """
    batch, _, channels = x.shape
    x = x.reshape(batch, -1, chunk, channels)
    y = convolution(x, ema_kernel(decay, gain, readout, chunk), segment_ids=None if runs is None else runs.reshape(x.shape[:3]),
                    implementation="direct")
    arriving, factor = x, _powers(decay, [chunk])
    if runs is not None:
        runs = runs.reshape(x.shape[:3])
        last = runs[:, :, -1]
        entry = jnp.concatenate([entry[:, None], last[:, :-1]], axis=1)
        arriving = jnp.where((runs == last[:, :, None])[..., None], x, 0)
        factor = jnp.where((entry == last)[..., None, None], factor, 0)
    gained = gain * _einsum("bjrc,rcn->bjcn", arriving.astype(decay.dtype), _powers(decay, range(chunk - 1, -1, -1)))

    def compose(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    factor, gained = lax.associative_scan(compose, (jnp.broadcast_to(factor, gained.shape), gained), axis=1)
    states = jnp.concatenate([state[:, None], gained + factor * state[:, None]], axis=1)
    carried = _einsum("bjcn,rcn->bjrc", readout * states[:, :-1], _powers(decay, range(1, chunk + 1))).real
    if runs is not None:
        carried = jnp.where((runs == entry[:, :, None])[..., None], carried, 0)
    return (y + carried).reshape(batch, -1, channels), states[:, -1]


def ema(x: Float[Array, "B T C"], decay: Coefficients, gain: Coefficients, readout: Coefficients, *,
        initial_state: Inexact[Array, "B C n"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
        implementation: str | None = None, return_state: bool = False):
    """Multi-dimensional moving average: h_t = decay * h_(t-1) + gain * x_t, y_t = Re sum over n of readout * h_t.

    Each channel is spread over n averages, which are then read out. Mega's damped EMA with sigmoids alpha and delta has
    ``decay = 1 - alpha * delta, gain = alpha * beta, readout = eta``; a diagonal state-space model has a complex
    ``decay = exp(dt A)``, ``gain = (decay - 1) / A`` and ``readout = 2 C`` for one of each conjugate pair.

    Args:
      x: [B, T, C].
      decay, gain, readout: real or complex, broadcastable to [C, n]; |decay| <= 1 for a bounded state.
      initial_state: h_(-1), [B, C, n]; zero by default.
      segment_ids: int [B, T] or [T]; the state is forgotten where they change. The initial state belongs to the first segment.
      implementation: 'fft' or 'direct', a :func:`convolution` with :func:`ema_kernel`, O(T (n + log T)) or O(T^2); 'chunked',
        O(T (64 + n)), which passes states between chunks of 64 steps, and alone knows states and segments; None takes 'fft' where
        neither is asked for.
      return_state: return the last state too.

    Returns:
      y [B, T, C] in the dtype of x; with ``return_state`` a pair with h_(T-1) [B, C, n], in at least float32.

    Raises:
      ValueError: shapes that do not fit. NotImplementedError: states or segments with 'fft' or 'direct'.

    Sources: Ma et al., Mega: Moving Average Equipped Gated Attention, 2022, arXiv 2209.10655; Gu et al., On the Parameterization and
    Initialization of Diagonal State Space Models, 2022, arXiv 2206.11893.

    >>> half = jnp.array([[0.5]])
    >>> ema(jnp.array([1.0, 0.0, 2.0]).reshape(1, 3, 1), half, half, 1.0, implementation="chunked")[0, :, 0]
    Array([0.5  , 0.25 , 1.125], dtype=float32)
    """
    _check_input(x)
    _check_implementation(implementation, ("direct", "fft", "chunked"))
    if x.ndim != 3:
        raise ValueError(f"x: expected shape [B, T, C], got {describe(x)}")
    batch, time, channels = x.shape
    dtype = accumulator_dtype(x.dtype)
    decay, gain, readout = _coefficients(decay, gain, readout, channels, dtype)
    stateful = initial_state is not None or segment_ids is not None or return_state
    if stateful and implementation in ("direct", "fft"):
        raise NotImplementedError(f"implementation: {implementation!r} knows neither states nor segment_ids; 'chunked' does")
    if initial_state is None:
        state = jnp.zeros((batch, *decay.shape), decay.dtype)
    elif initial_state.shape != (batch, *decay.shape):
        raise ValueError(f"initial_state: expected shape {[batch, *decay.shape]}, got {describe(initial_state)}")
    else:
        state = initial_state.astype(decay.dtype)
    if not x.size:
        return (x, state) if return_state else x
    if implementation != "chunked" and not stateful:
        kernel = ema_kernel(decay, gain, readout, time)
        return convolution(x.astype(dtype), kernel, implementation=implementation or "fft").astype(x.dtype)
    runs = entry = None
    if segment_ids is not None:
        segment_ids = _check_segments(segment_ids, (batch, time))
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        runs = jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
        entry = runs[:, 0]
    ys, whole = [], time - time % CHUNK
    for start, stop, chunk in ((0, whole, CHUNK), (whole, time, time - whole)):
        if start < stop:
            here = None if runs is None else runs[:, start:stop]
            y, state = _by_chunks(x[:, start:stop].astype(dtype), decay, gain, readout, state, entry, here, chunk)
            entry = None if runs is None else runs[:, stop - 1]
            ys.append(y.astype(x.dtype))
    y = jnp.concatenate(ys, axis=1)
    return (y, state) if return_state else y


def ema_init(batch: int, decay: Inexact[Array, "C n"], dtype=jnp.float32) -> Inexact[Array, "B C n"]:
    """The state of :func:`ema` before the first input: zeros, complex where the decay is.

    >>> ema_init(2, jnp.ones((8, 4))).shape
    (2, 8, 4)
    """
    return jnp.zeros((batch, *decay.shape), jnp.result_type(accumulator_dtype(dtype), decay))


def ema_step(state: Inexact[Array, "B C n"], decay: Coefficients, gain: Coefficients, readout: Coefficients,
             x: Float[Array, "B t C"]) -> tuple[Inexact[Array, "B C n"], Float[Array, "B t C"]]:
    """Averages t new inputs: ``(state, y)``, with y that of :func:`ema` over the whole stream. O(t n) and a state of constant shape.

    >>> half, state = jnp.array([[0.5]]), ema_init(1, jnp.array([[0.5]]))
    >>> state, y = ema_step(state, half, half, 1.0, jnp.ones((1, 1, 1)))
    >>> state, y = ema_step(state, half, half, 1.0, jnp.ones((1, 1, 1)))
    >>> y[0, 0, 0]
    Array(0.75, dtype=float32)
    """
    y, state = ema(x, decay, gain, readout, initial_state=state, implementation="chunked", return_state=True)
    return state, y


def exponential_moving_average(x: Float[Array, "B T C"], alpha: Real[Array, " C"] | float, **kwargs):
    """The textbook average y_t = alpha * x_t + (1 - alpha) * y_(t-1), from y_(-1) = 0 unless an ``initial_state`` [B, C, 1] says otherwise.

    Args:
      x: [B, T, C].
      alpha: in (0, 1], a number or [C].
      **kwargs: as for :func:`ema`.

    >>> exponential_moving_average(jnp.ones((1, 3, 1)), 0.5, implementation="chunked")[0, :, 0]
    Array([0.5  , 0.75 , 0.875], dtype=float32)
    """
    alpha = jnp.reshape(alpha, (-1, 1))
    return ema(x, 1 - alpha, alpha, 1.0, **kwargs)
