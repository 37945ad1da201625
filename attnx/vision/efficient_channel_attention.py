"""ECA: gates of channels from a short convolution over the channels' means, a handful of parameters in all.

Wang, Wu, Zhu, Li, Zuo, Hu: "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks" (CVPR 2020, arXiv 1910.03151). With
g_c the mean of channel c over space,

    ECA       a_c = sigmoid(sum over |j| <= (k - 1) / 2 of w_j g_(c + j))         one kernel of k weights, shared by all channels
    ECA-NS    a_c = sigmoid(sum over |j| <= (k - 1) / 2 of w_cj g_(c + j))        a kernel each
    SE        a   = sigmoid(W_2 relu(W_1 g))                                      squeeze and excitation, 2 C^2 / r weights

and SE without its bottleneck: SE-Var1 sigmoid(g), SE-Var2 sigmoid(w * g), SE-Var3 sigmoid(W g). Each is x_c a_c. The gate stands after the last norm of a residual
branch, before the sum. SE is Hu, Shen, Albanie, Sun, Wu: "Squeeze-and-Excitation Networks" (CVPR 2018, arXiv 1709.01507).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import checks
from attnx.core.convolve import convolution

RESNET_KERNELS = {18: (3, 5, 7, 7), 34: (3, 3, 5, 7), 50: (3, 5, 5, 7), 101: (3, 3, 5, 7), 152: (3, 3, 5, 7)}
"""Kernel sizes of the published ResNets by depth, one a stage. They are not what :func:`eca_kernel_size` says: the 80 parameters of ECA-Net50 are these."""


def eca_kernel_size(channels: int, gamma: float = 2.0, b: float = 1.0) -> int:
    """The kernel size for a number of channels: ``int(|log2 C + b| / gamma)``, made odd by adding one.

    >>> [eca_kernel_size(c) for c in (64, 128, 1024, 2048)]
    [3, 5, 5, 7]
    """
    size = int(abs((math.log2(checks.check_integer("channels", channels, least=1)) + b) / gamma))
    return size if size % 2 else size + 1


def _means(x, name="x"):
    """[B, C] in at least float32."""
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected real numbers of shape [B, ..., C], got {checks.describe(x)}")
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32))


def _gated(x, logits):
    gates = jax.nn.sigmoid(logits).reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    return (x * gates).astype(x.dtype)


def _reach(w, channels, padding):
    """How many neighbours a side a kernel [.., k] sees."""
    checks.check_choice("padding", padding, ("zero", "circular"))
    size = w.shape[-1]
    if size % 2 == 0 or (padding == "circular" and size // 2 > channels):
        raise ValueError(f"w: expected an odd number of weights{f', at most {2 * channels + 1}' if padding == 'circular' else ''}, got {checks.describe(w)}")
    return size // 2


def _padded(g, reach, padding):
    return jnp.pad(g, ((0, 0), (reach, reach)), mode="wrap" if padding == "circular" else "constant")


def eca(x: Float[Array, "B H W C"], w: Float[Array, " k"], *, padding: str = "zero") -> Float[Array, "B H W C"]:
    """Gates channels by a convolution over their means with one kernel for all.

    Args:
      x: [B, H, W, C], or any number of spatial axes.
      w: [k], k odd; ``w[k // 2]`` meets the channel itself.
      padding: what lies beyond the first and last channel: 'zero', or 'circular', the channels of the other end.

    Returns:
      Like x.

    Raises:
      ValueError: an even kernel, or shapes that do not fit.

    Cost: O(H W C + k C).

    >>> eca(jnp.ones((1, 2, 2, 3)), jnp.zeros(3))[0, 0, 0]
    Array([0.5, 0.5, 0.5], dtype=float32)
    """
    if w.ndim != 1:
        raise ValueError(f"w: expected shape [k], got {checks.describe(w)}")
    g, reach = _means(x), _reach(w, x.shape[-1], padding)
    g = _padded(g, reach, padding)[..., None]
    s = convolution(g, w[::-1, None].astype(g.dtype), origin=reach)[..., 0]  # a correlation
    return _gated(x, s[:, reach:s.shape[1] - reach])


def eca_ns(x: Float[Array, "B H W C"], w: Float[Array, "C k"], *, padding: str = "zero") -> Float[Array, "B H W C"]:
    """:func:`eca` with a kernel for each channel, w: [C, k].

    >>> x = jax.random.normal(jax.random.key(0), (2, 3, 3, 8))
    >>> w = jnp.array([0.5, 1.0, -1.0])
    >>> bool(jnp.allclose(eca_ns(x, jnp.tile(w, (8, 1))), eca(x, w), atol=1e-6))
    True
    """
    channels = x.shape[-1]
    if w.ndim != 2 or w.shape[0] != channels:
        raise ValueError(f"w: expected shape [C, k] with C = {channels} as in x, got {checks.describe(w)}")
    g, reach = _means(x), _reach(w, channels, padding)
    near = np.arange(channels)[:, None] + np.arange(w.shape[1])
    return _gated(x, jnp.sum(_padded(g, reach, padding)[:, near] * w, axis=-1))


def se(x: Float[Array, "B H W C"], w1: Float[Array, "C R"], w2: Float[Array, "R C"]) -> Float[Array, "B H W C"]:
    """Squeeze and excitation: gates ``sigmoid(relu(g w1) w2)``, R as a rule C / 16. O(H W C + R C).

    >>> se(jnp.ones((1, 2, 2, 4)), jnp.ones((4, 1)), jnp.zeros((1, 4))).shape
    (1, 2, 2, 4)
    """
    channels = x.shape[-1]
    if w1.ndim != 2 or w1.shape[0] != channels or w2.shape != w1.shape[::-1]:
        raise ValueError(f"w1: expected shapes [C, R] and [R, C] with C = {channels} as in x, got {checks.describe(w1)} and {checks.describe(w2)}")
    return _gated(x, jax.nn.relu(_means(x) @ w1) @ w2)


def se_var1(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Gates ``sigmoid(g)``: no parameters.

    >>> se_var1(jnp.zeros((1, 2, 2, 4))).shape
    (1, 2, 2, 4)
    """
    return _gated(x, _means(x))


def se_var2(x: Float[Array, "B H W C"], w: Float[Array, " C"]) -> Float[Array, "B H W C"]:
    """Gates ``sigmoid(w * g)``: each channel by itself.

    >>> se_var2(jnp.ones((1, 2, 2, 4)), jnp.zeros(4))[0, 0, 0, 0]
    Array(0.5, dtype=float32)
    """
    if w.shape != x.shape[-1:]:
        raise ValueError(f"w: expected shape [C] with C = {x.shape[-1]} as in x, got {checks.describe(w)}")
    return _gated(x, _means(x) * w)


def se_var3(x: Float[Array, "B H W C"], w: Float[Array, "C C"]) -> Float[Array, "B H W C"]:
    """Gates ``sigmoid(g w)``: all channels from all, without a bottleneck.

    >>> se_var3(jnp.ones((1, 2, 2, 4)), jnp.zeros((4, 4)))[0, 0, 0, 0]
    Array(0.5, dtype=float32)
    """
    if w.shape != (x.shape[-1],) * 2:
        raise ValueError(f"w: expected shape [C, C] with C = {x.shape[-1]} as in x, got {checks.describe(w)}")
    return _gated(x, _means(x) @ w)


class ECA(nnx.Module):
    """A layer of :func:`eca`.

    Args:
      channels: C.
      kernel_size: k, odd; by default :func:`eca_kernel_size`.
      padding: as in :func:`eca`.
      shared: one kernel for all channels; otherwise :func:`eca_ns`.
      rngs: the generator of initial values, uniform within +-1 / sqrt(k).

    >>> ECA(64, rngs=nnx.Rngs(0))(jnp.ones((1, 8, 8, 64))).shape
    (1, 8, 8, 64)
    """

    def __init__(self, channels: int, kernel_size: int | None = None, *, padding: str = "zero", shared: bool = True, param_dtype=jnp.float32, rngs: nnx.Rngs):
        size = eca_kernel_size(channels) if kernel_size is None else checks.check_integer("kernel_size", kernel_size, least=1)
        if size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {size}")
        checks.check_choice("padding", padding, ("zero", "circular"))
        bound = size**-0.5
        shape = (size,) if shared else (channels, size)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound))
        self.padding, self.shared = padding, shared

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """x with its channels gated."""
        return (eca if self.shared else eca_ns)(x, self.kernel[...], padding=self.padding)
