"""FFTNet: tokens mixed by a filter over their frequencies that depends on the input, and a non-linearity of magnitudes.

Fein-Ashley, Gupta, Kannan, Prasanna: "The FFT Strikes Back: An Efficient Alternative to Self-Attention" (2025, arXiv 2502.18394). For each head,

    F = FFT(x) over tokens,      W = base (1 + delta(c)),      out = Re IFFT(modReLU(F W, b + b(c))),      c = mean of x over tokens
    modReLU(z, b) = max(|z| + b, 0) z / |z|

where an MLP of the mean gives delta and the bias of each head and frequency. Global, O(T log T), equivariant to circular shifts, never causal: every output sees
all tokens. Without the MLP it is a circular convolution; with a fixed filter over both axes it would be FNet.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from attnx.core import checks
from attnx.nn.block import TransformerBlock
from attnx.nn.common import check_sequence, dropout
from attnx.nn.mlp import MLP

ACTIVATIONS = ("modrelu", "gelu_mag", "split_gelu")
NOT_CAUSAL = "FFTNet mixes all tokens with all, so it has no causal and no streaming form; use a causal mixer or attention"


def modrelu(z: Complex[Array, "..."], b: Float[Array, "..."]) -> Complex[Array, "..."]:
    """``max(|z| + b, 0) z / |z|``: shrinks (b < 0) or grows magnitudes, keeps phases.

    Magnitudes are sqrt(|z|^2 + 1e-8), so that the gradient at 0 is finite. Arjovsky, Shah, Bengio: "Unitary Evolution Recurrent Neural Networks" (ICML 2016,
    arXiv 1511.06464).

    Args:
      z: complex numbers.
      b: real, broadcasts to z.

    >>> modrelu(jnp.array([3j, 0.5, 0.0]), jnp.array(-1.0)).round(3)
    Array([0.+2.j, 0.+0.j, 0.+0.j], dtype=complex64)
    """
    magnitude = jnp.sqrt(z.real**2 + z.imag**2 + 1e-8)
    return jax.nn.relu(magnitude + b) / magnitude * z


def bins(length: int, fft: str = "real") -> int:
    """How many frequencies a sequence has: ``T // 2 + 1``, or T in the full transform."""
    checks.check_choice("fft", fft, ("real", "full"))
    return length // 2 + 1 if fft == "real" else length


def spectral_mix(x: Float[Array, "B T D"], base: Float[Array, "N F"], delta: Float[Array, "*B N F"] | None = None,
                 bias: Float[Array, "*B N F"] | None = None, *, activation: str = "modrelu", fft: str = "real", filter: str = "multiplicative"
                 ) -> Float[Array, "B T D"]:
    """Filters the frequencies of each head and bends their magnitudes.

    ::

        out = Re IFFT(phi(FFT(x) W)),        W = base (1 + delta)

    Args:
      x: [B, T, D], N a divisor of D; the FFT is orthonormal, over T.
      base: [N, F] with F = T // 2 + 1 frequencies (T of them with fft='full', in the order of ``jnp.fft.fftfreq``).
      delta: [B, N, F] or [N, F]; None for none.
      bias: the same, b of the activation; None for zero.
      activation: 'modrelu' of the paper; 'gelu_mag', ``gelu(|z|) z / |z|`` with the bias added to z, as released; 'split_gelu', GELU of real and imaginary parts, as
        first released, without bias.
      fft: 'real' or 'full'; the same where filter and bias of the full one are even in the frequency.
      filter: 'multiplicative', or 'additive', W = base + delta, as first released.

    Returns:
      [B, T, D] in the dtype of x; computed in at least float32.

    Raises:
      ValueError: shapes that do not fit, or an option that does not exist.

    Cost: O(T log T D) time, O(T D) memory.

    >>> x = jax.random.normal(jax.random.key(0), (2, 7, 8))
    >>> bool(jnp.allclose(spectral_mix(x, jnp.ones((2, 4))), x, atol=1e-5))
    True
    """
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_choice("filter", filter, ("multiplicative", "additive"))
    if x.ndim != 3 or not x.shape[1] or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected real numbers of shape [B, T, D] with T of at least 1, got {checks.describe(x)}")
    batch, length, features = x.shape
    count = bins(length, fft)
    if base.ndim != 2 or base.shape[1] != count or not base.shape[0] or features % base.shape[0]:
        raise ValueError(f"base: expected shape [N, {count}] with N a divisor of {features}, got {checks.describe(base)}")
    for name, given in (("delta", delta), ("bias", bias)):
        if given is not None and given.shape not in (base.shape, (batch, *base.shape)):
            raise ValueError(f"{name}: expected shape {[batch, *base.shape]} or {list(base.shape)}, got {checks.describe(given)}")
    if activation == "split_gelu" and bias is not None:
        raise ValueError("bias: expected None with activation='split_gelu', which has none")
    heads, wide = base.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    along = lambda a: jnp.swapaxes(jnp.asarray(a, wide), -1, -2)[..., None]  # [(B,) F, N, 1]
    forward, inverse = (jnp.fft.rfft, jnp.fft.irfft) if fft == "real" else (jnp.fft.fft, jnp.fft.ifft)
    gain = along(base)
    if delta is not None:
        gain = gain + along(delta) if filter == "additive" else gain * (1 + along(delta))
    z = forward(x.astype(wide).reshape(batch, length, heads, -1), axis=1, norm="ortho") * gain
    offset = jnp.zeros((), wide) if bias is None else along(bias)
    if activation == "modrelu":
        z = modrelu(z, offset)
    elif activation == "gelu_mag":
        z = z + offset
        magnitude = jnp.sqrt(z.real**2 + z.imag**2 + 1e-12)
        z = jax.nn.gelu(magnitude, approximate=False) / magnitude * z
    else:
        z = jax.lax.complex(jax.nn.gelu(z.real, approximate=False), jax.nn.gelu(z.imag, approximate=False))
    return inverse(z, length, axis=1, norm="ortho").real.reshape(x.shape).astype(x.dtype)


def resize_filter(filter: Float[Array, "... F"], length: int, new_length: int, fft: str = "real") -> Float[Array, "... G"]:
    """A filter for sequences of another length: linear interpolation between the frequencies (cycles a token) of the given one.

    Args:
      filter: [..., F], of any meaning: base, delta or bias.
      length: T that it is for.
      new_length: that it is to be for. Frequencies above the highest known have its value.
      fft: as in :func:`spectral_mix`.

    Returns:
      [..., G], G frequencies of the new length.

    Raises:
      ValueError: a filter that is not for ``length``.

    >>> resize_filter(jnp.array([0.0, 1.0, 2.0]), 4, 8)
    Array([0. , 0.5, 1. , 1.5, 2. ], dtype=float32)
    """
    if filter.shape[-1] != bins(length, fft):
        raise ValueError(f"filter: expected {bins(length, fft)} frequencies for length={length}, got {checks.describe(filter)}")
    count = bins(checks.check_integer("new_length", new_length, least=1), fft)
    at = np.arange(count) / new_length * length  # in bins of the given filter
    low = np.floor(at).astype(int)
    share = jnp.asarray(at - low, filter.dtype)
    if fft == "full":
        first, second = filter[..., low % length], filter[..., (low + 1) % length]
    else:
        first, second = (filter[..., np.minimum(index, filter.shape[-1] - 1)] for index in (low, low + 1))
    return first * (1 - share) + second * share


class FFTNetMixer(nnx.Module):
    """:func:`spectral_mix` with its filter, and the MLP that adapts it to the mean of the tokens. Called like :class:`attnx.nn.Attention`.

    Args:
      features: D.
      length: T of the sequences that it is made for; at others its filter is resized.
      num_heads: N.
      adaptive: whether the MLP D -> D -> 2 N F adapts the filter; otherwise it is fixed after training.
      activation, fft, filter: as in :func:`spectral_mix`.
      dropout_rate: of the output, where a dropout_key is given.
      rngs: the generator of initial values: base 1, bias -0.1.

    Cost: O(T log T D + D^2 + D N T) time, O(D N T) parameters of the MLP.

    >>> mixer = FFTNetMixer(16, 10, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((2, 10, 16))).shape, mixer(jnp.ones((2, 13, 16))).shape
    ((2, 10, 16), (2, 13, 16))
    """

    def __init__(self, features: int, length: int, *, num_heads: int = 4, adaptive: bool = True, activation: str = "modrelu", fft: str = "real",
                 filter: str = "multiplicative", dropout_rate: float = 0.0, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        checks.check_choice("activation", activation, ACTIVATIONS)
        checks.check_choice("filter", filter, ("multiplicative", "additive"))
        if features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        count = bins(checks.check_integer("length", length, least=1), fft)
        self.features, self.length, self.num_heads = features, length, num_heads
        self.options: dict[str, Any] = dict(activation=activation, fft=fft, filter=filter)
        self.dropout_rate = checks.check_dropout_rate(dropout_rate)
        self.base = nnx.Param(jnp.ones((num_heads, count), param_dtype))
        self.bias = nnx.data(None) if activation == "split_gelu" else nnx.Param(jnp.full((num_heads, count), -0.1, param_dtype))
        outputs = num_heads * count * (1 if self.bias is None else 2)
        dense = lambda inputs, outputs: nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.hidden: Any = dense(features, features) if adaptive else nnx.data(None)
        self.modulation: Any = dense(features, outputs) if adaptive else nnx.data(None)

    def __call__(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids=None, dropout_key: Array | None = None,
                 hooks=None, layer=0) -> Float[Array, "B T D"]:
        """Mixes tokens.

        Args:
          x: [B, T, D], normalised.
          positions: int32 [T] or [B, T]; -1 marks padding, which counts as zeros and whose output is zero. Else they do not matter.
          segment_ids, hooks: None; documents cannot be kept apart, and there are no scores.
          dropout_key: the key of dropout; None for none.
          layer: not used.
        """
        del layer
        check_sequence("x", x, self.features)
        if segment_ids is not None or hooks:
            raise NotImplementedError("segment_ids, hooks: FFTNet mixes whole sequences and has no scores; expected None")
        batch, length, _ = x.shape
        real = jnp.ones((1, length), bool) if positions is None else jnp.broadcast_to(positions >= 0, (batch, length))
        x = jnp.where(real[..., None], x, 0)
        parts: list[Any] = [self.base[...], None, None if self.bias is None else self.bias[...]]
        if self.hidden is not None:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            mean = (jnp.sum(x, axis=1, dtype=wide) / jnp.maximum(real.sum(axis=1, keepdims=True), 1)).astype(x.dtype)
            change = self.modulation(jax.nn.gelu(self.hidden(mean), approximate=False)).reshape(batch, -1, *self.base.shape)
            parts[1] = change[:, 0]
            if self.bias is not None:
                parts[2] = parts[2] + change[:, 1]
        if length != self.length:
            parts = [None if part is None else resize_filter(part, self.length, length, self.options["fft"]) for part in parts]
        out = jnp.where(real[..., None], spectral_mix(x, *parts, **self.options), 0)
        return dropout(out, self.dropout_rate, dropout_key)

    def init_state(self, batch: int, max_length: int, **options):
        """Raises NotImplementedError: there is no streaming form."""
        raise NotImplementedError(NOT_CAUSAL)


class FFTNetBlock(TransformerBlock):
    """``x <- x + mix(norm(x))``, then ``x <- x + MLP(norm(x))``, with layer norms and an MLP of four times the width with GELU.

    Args:
      features, length: as in :class:`FFTNetMixer`.
      mlp_ratio: of the MLP's hidden size.
      dropout_rate: of what both add.
      rngs: the generator of initial values.
      **options: of :class:`FFTNetMixer`.

    >>> FFTNetBlock(16, 10, rngs=nnx.Rngs(0))(jnp.ones((2, 10, 16))).shape
    (2, 10, 16)
    """

    def __init__(self, features: int, length: int, *, mlp_ratio: float = 4.0, dropout_rate: float = 0.1, rngs: nnx.Rngs, **options):
        mlp = MLP(features, int(mlp_ratio * features), activation=_gelu, gated=False, use_bias=True, rngs=rngs)
        super().__init__(features, attention=FFTNetMixer(features, length, rngs=rngs, **options), mlp=mlp, norm="layer", dropout_rate=dropout_rate, rngs=rngs)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


class FFTNetClassifier(nnx.Module):
    """Vectors in, logits of the whole sequence out: a linear map, learned positions, blocks, a norm, the mean over tokens, a linear map.

    Args:
      input_size: size of the input vectors.
      features, length: D and T, as in :class:`FFTNetMixer`.
      outputs: number of classes.
      num_blocks: how many blocks.
      mixer: ``mixer(rngs) -> module`` in place of :class:`FFTNetMixer`, for comparisons.
      positions: whether positions are added; mixing alone does not see where a sequence begins.
      rngs: the generator of initial values.
      **options: of :class:`FFTNetBlock`.

    >>> FFTNetClassifier(3, 16, 10, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 10, 3))).shape
    (2, 5)
    """

    def __init__(self, input_size: int, features: int, length: int, outputs: int, *, num_blocks: int = 2, mixer: Callable | None = None,
                 positions: bool = True, rngs: nnx.Rngs, **options):
        self.inputs, self.outputs = nnx.Linear(input_size, features, rngs=rngs), nnx.Linear(features, outputs, rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, features))) if positions else nnx.data(None)
        self.blocks = nnx.List([FFTNetBlock(features, length, rngs=rngs, **options) for _ in range(num_blocks)])
        if mixer is not None:
            for block in self.blocks:
                block.attention = mixer(rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, x: Float[Array, "B T F"], *, positions: Int[Array, "*B T"] | None = None, dropout_key: Array | None = None) -> Float[Array, "B C"]:
        """Logits [B, outputs]; positions of -1 mark padding."""
        x = self.inputs(x)
        if self.places is not None:
            x = x + self.places[...][:x.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, positions=positions, dropout_key=None if dropout_key is None else jax.random.fold_in(dropout_key, index))
        x = self.norm(x)
        if positions is None:
            return self.outputs(x.mean(axis=1))
        real = jnp.broadcast_to(positions >= 0, x.shape[:2])[..., None]
        return self.outputs(jnp.sum(jnp.where(real, x, 0), axis=1) / jnp.maximum(real.sum(axis=1), 1))
