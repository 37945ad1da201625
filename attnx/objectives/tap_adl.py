"""Robust token attention: a pooling that mixes tokens with their neighbours before they attend, and a loss that keeps rows of attention apart.

Guo, Stutz, Schiele: "Robustifying Token Attention for Vision Transformers" (ICCV 2023, arXiv 2303.11126). Vision transformers put most attention of all tokens on
the same few, so noise on those few decides. Token-aware average pooling (TAP) lets each token choose how far it looks around,

    x'(p) = sum_k m_k(p) pool_k(p),      m = softmax(conv(BN(conv(x)))),      pool_0 = x, pool_k a 3 x 3 mean of dilation k

and feeds x' to attention alone: the residual stream keeps x. The attention diversification loss (ADL) is the mean cosine between the rows of a layer's attention
and their mean row, entries below twice the uniform weight left out of both.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnx.core import checks
from attnx.core.halves import attend_scores
from attnx.mechanism import pairs
from attnx.nn import MLP, Attention
from attnx.nn.hooks import Hooks


def dilated_average_pool(x: Float[Array, "B H W C"], dilation: int) -> Float[Array, "B H W C"]:
    """The sum of the nine cells at distances -dilation, 0, dilation along both axes, over nine; what lies outside counts as zero.

    Args:
      x: [B, H, W, C].
      dilation: d, at least 1.

    Returns:
      The shape and dtype of x; summed in at least float32. O(H W C), whatever d.

    >>> import jax.numpy as jnp
    >>> dilated_average_pool(9 * jnp.ones((1, 3, 3, 1)), 1)[0, :, :, 0].tolist()
    [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    """
    dilation = checks.check_integer("dilation", dilation, least=1)
    if x.ndim != 4:
        raise ValueError(f"x: expected shape [B, H, W, C], got {checks.describe(x)}")
    total = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for axis in (1, 2):
        padded = jnp.pad(total, [(dilation, dilation) if i == axis else (0, 0) for i in range(4)])
        first, *others = (jax.lax.slice_in_dim(padded, tap * dilation, tap * dilation + x.shape[axis], axis=axis) for tap in range(3))
        total = first + others[0] + others[1]
    return (total / 9).astype(x.dtype)


def token_aware_pool(x: Float[Array, "B H W C"], logits: Float[Array, "B H W K"], *, temperature: float = 1.0, return_weights: bool = False):
    """Each token mixed with means of its surroundings at several scales, in proportions of its own.

    ::

        x'(p) = sum_k softmax_k(logits(p) / temperature) pool_k(p),      pool_0 = x,  pool_k the dilated mean of dilation k

    Args:
      x: [B, H, W, C].
      logits: [B, H, W, K], of scales 0 .. K-1.
      temperature: above 1 for more even proportions.
      return_weights: also return the proportions [B, H, W, K].

    Returns:
      The shape and dtype of x. O(K H W C).

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> bool((token_aware_pool(x, jnp.array([100.0, 0, 0, 0]) * jnp.ones((1, 3, 3, 4))) == x).all())
    True
    """
    if x.ndim != 4 or logits.ndim != 4 or logits.shape[:3] != x.shape[:3]:
        raise ValueError(f"logits: expected shape [B, H, W, K] for x {checks.describe(x)} of shape [B, H, W, C], got {checks.describe(logits)}")
    pools = jnp.stack([x, *(dilated_average_pool(x, dilation) for dilation in range(1, logits.shape[-1]))], axis=-2)
    out, weights = attend_scores(logits[..., None, :] / temperature, pools, return_weights=True)
    out, weights = out[..., 0, :], weights[..., 0, :]
    return (out, weights) if return_weights else out


def attention_diversification_loss(maps: Float[Array, "B N T T"] | Sequence[Float[Array, "B N T T"]], *, threshold: float = 2.0, pairwise: bool = False,
                                   mask: Bool[Array, "B T"] | None = None) -> Float[Array, ""]:
    """How alike the rows of attention maps are.

    ::

        A = mean over heads,   abar = mean over rows of A,   A+ = A where A > threshold / T, else 0   (abar+ alike)
        loss = mean over layers, images and rows i of cos(abar+, A+_i)

    A row of which nothing passes has cosine 0; what passes is no function of the maps to the gradient.

    Args:
      maps: weights [B, N, T, T] of each layer: a sequence, or an array with a leading axis of layers, as :func:`attnx.nn.record` gives; or one layer's.
      threshold: tau, in units of the uniform weight 1 / T.
      pairwise: whether it is the mean cosine of all pairs of rows i < j, which the mean row stands for in the paper.
      mask: booleans [B, T], which tokens there are: T is their number, and rows of others do not count.

    Returns:
      A number from 0 to 1 in at least float32. Costs O(T^2) a map, either way.

    >>> import jax.numpy as jnp
    >>> one, uniform, own = jnp.zeros((1, 1, 6, 6)).at[..., 2].set(1.0), jnp.full((1, 1, 6, 6), 1 / 6), jnp.eye(6)[None, None]
    >>> [float(attention_diversification_loss(maps)) for maps in (one, uniform, own)]
    [1.0, 0.0, 0.0]
    """
    layers = [maps] if getattr(maps, "ndim", 0) == 4 else list(maps)
    if not layers:
        raise ValueError("maps: expected at least one layer's attention weights [B, N, T, T], got none")
    return sum(_alike(i, layer, threshold, pairwise, mask) for i, layer in enumerate(layers)) / len(layers)


def _alike(index, weights, threshold, pairwise, mask):
    """The loss of one layer."""
    if weights.ndim != 4 or weights.shape[2] != weights.shape[3]:
        raise ValueError(f"maps[{index}]: expected attention weights [B, N, T, T], got {checks.describe(weights)}")
    rows = jnp.mean(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)), axis=1)
    there = jnp.ones(rows.shape[:2], bool) if mask is None else checks.as_array("mask", mask, "booleans")
    if there.shape != rows.shape[:2]:
        raise ValueError(f"mask: expected booleans {list(rows.shape[:2])} ([B, T]), got {checks.describe(mask)}")
    count = jnp.maximum(jnp.sum(there, axis=1), 1).astype(rows.dtype)
    rows = jnp.where(there[..., None] & there[:, None], rows, 0)

    def unit(x):
        passed = jnp.where(x > threshold / count[:, None, None], x, 0)
        square = jnp.sum(jnp.square(passed), axis=-1, keepdims=True)
        return passed * jax.lax.rsqrt(jnp.where(square > 0, square, 1))

    units = unit(rows)
    total = jnp.sum(units, axis=1)
    if pairwise:
        cosines = jnp.sum(jnp.square(total), axis=-1) - jnp.sum(jnp.square(units), axis=(1, 2))  # of ordered pairs
        return jnp.mean(cosines / jnp.maximum(count * (count - 1), 1))
    mean = unit(jnp.sum(rows, axis=1, keepdims=True) / count[:, None, None])[:, 0]
    return jnp.mean(jnp.sum(mean * total, axis=-1) / count)


class TokenAwarePooling(nnx.Module):
    """:func:`token_aware_pool` with its predictor: a 3 x 3 convolution to K channels, batch norm, and a 3 x 3 convolution, without biases or activation.

    Args:
      features: C.
      scales: K, the identity and K - 1 dilations.
      temperature: of the softmax over scales.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> TokenAwarePooling(8, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 6, 8))).shape
    (1, 5, 6, 8)
    """

    def __init__(self, features: int, *, scales: int = 4, temperature: float = 1.0, rngs: nnx.Rngs):
        conv = lambda inputs: nnx.Conv(inputs, scales, (3, 3), use_bias=False, rngs=rngs)
        self.first, self.second = conv(features), conv(scales)
        self.norm = nnx.BatchNorm(scales, use_running_average=True, momentum=0.9, rngs=rngs)
        self.temperature = temperature

    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False, return_weights: bool = False):
        """[B, H, W, C] to the same; in training the norm takes the statistics of the batch, and remembers them."""
        logits = self.second(self.norm(self.first(x), use_running_average=not train))
        return token_aware_pool(x, logits, temperature=self.temperature, return_weights=return_weights)


class TAPBlock(nnx.Module):
    """A transformer block of a picture's tokens whose attention reads pooled tokens.

    ::

        x <- x + gamma_1 * attention(LN(TAP(x))),        x <- x + gamma_2 * MLP(LN(x))

    Args:
      features: C.
      num_heads: of the attention.
      pooling: whether there is a TAP; without it this is a plain pre-norm block.
      scales, temperature: of :class:`TokenAwarePooling`.
      hidden_features: of the MLP; by default 4 C.
      layer_scale: initial value of gamma_1 and gamma_2.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> from attnx.nn import record
    >>> block = TAPBlock(8, 2, rngs=nnx.Rngs(0))
    >>> out, maps = record(block, jnp.ones((1, 3, 4, 8)))
    >>> out.shape, maps.shape, float(attention_diversification_loss(maps))  # even attention
    ((1, 3, 4, 8), (1, 1, 2, 12, 12), 0.0)
    """

    def __init__(self, features: int, num_heads: int, *, pooling: bool = True, scales: int = 4, temperature: float = 1.0, hidden_features: int | None = None,
                 layer_scale: float = 1.0, rngs: nnx.Rngs):
        self.pooling = TokenAwarePooling(features, scales=scales, temperature=temperature, rngs=rngs) if pooling else nnx.data(None)
        self.attention = Attention(features, num_heads, mechanism=pairs(), use_bias=True, rngs=rngs)
        self.mlp = MLP(features, hidden_features or 4 * features, activation=jax.nn.gelu, gated=False, use_bias=True, rngs=rngs)
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(features, rngs=rngs) for _ in range(2))
        self.attention_scale, self.mlp_scale = (nnx.Param(jnp.full(features, layer_scale)) for _ in range(2))

    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False, hooks: Hooks | None = None, layer=0) -> Float[Array, "B H W C"]:
        """[B, H, W, C] to the same; ``hooks`` and ``layer`` as in :class:`attnx.nn.Attention`, ``train`` as in :class:`TokenAwarePooling`."""
        tokens = x if self.pooling is None else self.pooling(x, train=train)
        sequence = self.attention_norm(tokens).reshape(x.shape[0], -1, x.shape[-1])
        x = x + (self.attention_scale[...] * self.attention(sequence, hooks=hooks, layer=layer).reshape(x.shape)).astype(x.dtype)
        change = self.mlp(self.mlp_norm(x).reshape(sequence.shape)).reshape(x.shape)
        return x + (self.mlp_scale[...] * change).astype(x.dtype)
