"""Cross-image attention: a picture is painted with the looks of another by attending to that one's keys and values.

Alaluf, Garibi, Patashnik, Averbuch-Elor, Cohen-Or: "Cross-Image Attention for Zero-Shot Appearance Transfer" (SIGGRAPH 2024, arXiv 2311.03335).
Three pictures are denoised together: the output, which starts from the noise of the structure, the appearance and the structure. In self-attention of the
denoiser's decoder, during some of the steps, the output attends across:

    A   = softmax(Q_out K_app^T / sqrt(H))
    A'  = clip(c (A - mean) + mean, 0, 1)              contrast, mean that of the row; rows are not normalised again
    out = A' V_app                                     now and then of the structure's keys and values instead

What is predicted so is guided away from what is predicted without, and the output's colours are moved to those of the appearance, object to object
(:func:`attnx.core.moments.adain`). Nothing is trained; it works on any model that takes hooks (:mod:`attnx.nn.hooks`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnx.core.checks import as_array, check_integer, check_real, describe
from attnx.nn.hooks import Hooks
from pallas_kernels.parts import Operand, Softmax, Sum, Weights, part

OUTPUT, APPEARANCE, STRUCTURE = 0, 1, 2
"""The rows of a batch of three pictures."""


def cross_image_qkv(query: Float[Array, "3 T N H"], key: Float[Array, "3 S K H"], value: Float[Array, "3 S K Hv"], source=APPEARANCE, *,
                    output: int = OUTPUT) -> tuple[Array, Array, Array]:
    """Gives one picture the keys and values of another; its queries are its own, and the others are untouched.

    ::

        key[output] <- key[source],        value[output] <- value[source]

    Args:
      query: [B, T, N, H], the pictures one after another: output, appearance, structure.
      key: [B, S, K, H].
      value: [B, S, K, Hv].
      source: index of the picture attended to, an integer or a traced scalar; ``output`` itself changes nothing.
      output: index of the picture that attends.

    Returns:
      (query, key, value).

    Raises:
      ValueError: for pictures that do not exist, or arrays of different numbers of them.

    Cost: O(S K H); attention costs what it did.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(3.0).reshape(3, 1, 1, 1)
    >>> [y.ravel().tolist() for y in cross_image_qkv(x, x, x)]
    [[0.0, 1.0, 2.0], [1.0, 1.0, 2.0], [1.0, 1.0, 2.0]]
    """
    query, key, value = (as_array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[0] != query.shape[0]:
            raise ValueError(f"{name}: expected shape [{query.shape[0]}, S, K, H], a row a picture as in query, got {describe(x)}")
    output = check_integer("output", output, least=0, most=query.shape[0] - 1)
    if isinstance(source, int):
        check_integer("source", source, least=0, most=query.shape[0] - 1)
    return query, key.at[output].set(key[source]), value.at[output].set(value[source])


def contrast_weights(weights: Float[Array, "... T S"], contrast=1.67, where: Bool[Array, "... T S"] | None = None) -> Float[Array, "... T S"]:
    """Sharpens attention maps about the mean of each row.

    ::

        clip(c (a_ij - mean_i) + mean_i, 0, 1)

    Rows sum to 1 before clipping, and to 1 or more after it where c >= 1 and no entry is clipped at 1; they are not normalised again.

    Args:
      weights: [..., T, S].
      contrast: c, a number; 1 changes nothing, 0 makes all equal.
      where: booleans that broadcast to the weights: the pairs that are allowed; others count for nothing and weigh nothing.

    Returns:
      [..., T, S] in the dtype of the weights.

    >>> import jax.numpy as jnp
    >>> contrast_weights(jnp.array([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]]), 2.0)
    Array([[0.75, 0.25, 0.  , 0.  ],
           [1.  , 0.  , 0.  , 0.  ]], dtype=float32)
    """
    weights = check_real("weights", weights)
    wide = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    where = jnp.ones((), bool) if where is None else as_array("where", where, "booleans")
    allowed = jnp.broadcast_to(where, wide.shape)
    mean = jnp.sum(wide, axis=-1, keepdims=True, where=allowed) / jnp.maximum(jnp.sum(allowed, axis=-1, keepdims=True), 1)
    return jnp.where(allowed, jnp.clip(contrast * (wide - mean) + mean, 0, 1), 0).astype(weights.dtype)


@part
class ContrastSoftmax(Weights):
    """See :func:`contrast_softmax`."""

    contrast: Any

    @property
    def statistics(self):
        return _RESIDUAL, _COUNT

    def operands(self, sizes):
        return (Operand(self.contrast, ()),)

    def weight(self, s, statistics, contrast):
        residual, count = statistics
        contrast = contrast.astype(s.dtype)
        return jnp.clip(contrast * jnp.exp(s - residual) + (1 - contrast) / jnp.maximum(count, 1), 0, 1)


@part
class _Residual(Softmax):
    """Softmax's residual, deaf to the operands of the weight it serves."""

    def shift(self, s, *_):
        return s


def _one(s, *_):
    return jnp.ones_like(s)


def _same(total, *_):
    return total


_RESIDUAL, _COUNT = _Residual(), Sum(_one, _same)


def contrast_softmax(contrast=1.67) -> Weights:
    """Softmax with contrast, ``clip(c (softmax(s)_ij - 1/n_i) + 1/n_i, 0, 1)`` for n_i allowed keys, as weights of any execution of attention: where maps need
    not be seen, attention from one picture to another is ``attnx.attention(q_out, k_app, v_app, weights=contrast_softmax(c))``, in O(T + S) memory.

    Args:
      contrast: c, a number.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.log(jnp.array([4.0, 2.0, 1.0, 1.0])).reshape(1, 4, 1, 1)
    >>> [f"{x:.3f}" for x in attnx.attention_weights(q, k, weights=contrast_softmax(2.0)).ravel()]
    ['0.750', '0.250', '0.000', '0.000']
    """
    return ContrastSoftmax(check_real("contrast", contrast, ranks=(0,)))


def swap_guidance(plain: Float[Array, "..."], swapped: Float[Array, "..."], strength) -> Float[Array, "..."]:
    """Goes from what is predicted without cross-image attention to what is predicted with it, and ``strength`` times as far.

    ::

        plain + s (swapped - plain)

    Args:
      plain, swapped: predictions of one shape, of noise or, since one is affine in the other, of the picture.
      strength: s; 1 is the prediction with it.

    >>> import jax.numpy as jnp
    >>> swap_guidance(jnp.array([1.0]), jnp.array([2.0]), 3.5)
    Array([4.5], dtype=float32)
    """
    plain = check_real("plain", plain)
    return plain + strength * (check_real("swapped", swapped) - plain)


def rescale_noise(noise: Float[Array, "B ..."], reference: Float[Array, "B ..."], share=1.0) -> Float[Array, "B ..."]:
    """Gives predicted noise the standard deviation of other noise, picture by picture: guidance makes it too large.

    ::

        share * noise * std(reference) / std(noise) + (1 - share) * noise

    Source: Shanchuan Lin, Bingchen Liu, Jiashi Li, Xiao Yang, "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023, arXiv:2305.08891.

    Args:
      noise: [B, ...].
      reference: [B, ...].
      share: how much of it; the released code of cross-image attention has 0.

    >>> import jax.numpy as jnp
    >>> rescale_noise(jnp.array([[-4.0, 4.0]]), jnp.array([[-1.0, 1.0]]))
    Array([[-1.,  1.]], dtype=float32)
    """
    noise, reference = check_real("noise", noise), check_real("reference", reference)
    axes = tuple(range(1, noise.ndim))
    spread, wanted = (jnp.std(x, axis=axes, keepdims=True, ddof=1) for x in (noise, reference))
    return noise * (1 + share * (jnp.where(spread > 0, wanted / jnp.where(spread > 0, spread, 1), 1) - 1))


@dataclasses.dataclass(frozen=True)
class CrossImageSchedule:
    """When to do what. Steps are counted from the first that is run; ranges have their first step and not their last.

    Attributes:
      steps: of the sampler in all.
      skip: how many of them, the noisiest, are not run.
      swap: ``((side, (first, last)), ...)``: the steps in which self-attention between side x side tokens looks across.
      normalise: the steps after which the output's colours are normalised.
      structure_every, structure_until: below step ``structure_until`` every ``structure_every``-th looks at the structure instead of the appearance.
      strength: of the guidance, at the first step and at the last; linear in between.

    >>> schedule = CrossImageSchedule()
    >>> [bool(schedule.swaps(step, side=32)) for step in (9, 10, 69, 70)], int(schedule.source(15)), int(schedule.source(16))
    ([False, True, True, False], 2, 1)
    >>> schedule.scaled(25)
    CrossImageSchedule(steps=25, skip=8, swap=((32, (2, 18)), (64, (2, 22))), normalise=(5, 25), structure_every=5, structure_until=10, strength=(3.5, 1.75))
    """

    steps: int = 100
    skip: int = 32
    swap: tuple[tuple[int, tuple[int, int]], ...] = ((32, (10, 70)), (64, (10, 90)))
    normalise: tuple[int, int] = (20, 100)
    structure_every: int = 5
    structure_until: int = 40
    strength: tuple[float, float] = (3.5, 1.75)

    def swaps(self, step, side: int) -> Bool[Array, ""]:
        """Whether self-attention between ``side`` x ``side`` tokens looks across in a step, which may be traced."""
        first, last = dict(self.swap).get(side, (0, 0))
        return (first <= jnp.asarray(step)) & (step < last)

    def source(self, step) -> Array:
        """The picture that it looks at: :data:`APPEARANCE` or :data:`STRUCTURE`."""
        step = jnp.asarray(step)
        return jnp.where((step % self.structure_every == 0) & (step < self.structure_until), STRUCTURE, APPEARANCE)

    def normalises(self, step) -> Bool[Array, ""]:
        """Whether the colours of the output are normalised after a step."""
        first, last = self.normalise
        return (first <= jnp.asarray(step)) & (step < last)

    def guidance(self, step) -> Float[Array, ""]:
        """The strength for :func:`swap_guidance`."""
        first, last = self.strength
        return first + (last - first) * jnp.asarray(step) / max(self.steps - self.skip - 1, 1)

    def scaled(self, steps: int) -> "CrossImageSchedule":
        """The same for a sampler of another number of steps; every so-many-th step stays so many."""
        scale = lambda x: round(x * steps / self.steps)
        both = lambda x: (scale(x[0]), scale(x[1]))
        return dataclasses.replace(self, steps=steps, skip=scale(self.skip), swap=tuple((side, both(x)) for side, x in self.swap),
                                   normalise=both(self.normalise), structure_until=scale(self.structure_until))


def cross_image_hooks(step, layers: Sequence[int], *, schedule: CrossImageSchedule = CrossImageSchedule(), contrast: float = 1.67) -> Hooks:
    """Hooks by which the first picture of a batch of three attends across, for one step of sampling.

    Args:
      step: its number, from 0, counted as :class:`CrossImageSchedule` does; may be traced.
      layers: the self-attention layers of the decoder: those of the encoder stay as they are. Which of them look across in a step depends on the
        number of tokens they see, a square.
      schedule: when.
      contrast: c; with the number 1 there is no hook on weights, and any execution will do.

    Returns:
      ``{'qkv': hook, 'weights': hook}`` for the call of a model on pictures [3, ...]: output, appearance, structure; map over more with ``jax.vmap``.

    >>> import attnx, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = attnx.nn.Attention(8, 2, mechanism=attnx.pairs(), rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (3, 16, 8))
    >>> hooks = cross_image_hooks(0, [0], schedule=CrossImageSchedule(swap=((4, (0, 9)),)))
    >>> (jnp.abs(layer(x, hooks=hooks) - layer(x)).max((1, 2)) > 1e-3).tolist()
    [True, False, False]
    """
    chosen = jnp.asarray(tuple(layers), jnp.int32)

    def active(tokens, layer):
        side = math.isqrt(tokens)
        return jnp.any(layer == chosen) & schedule.swaps(step, side) if side**2 == tokens else jnp.zeros((), bool)

    def swap(value, layer, at):
        source = jnp.where(active(value[0].shape[1], layer), schedule.source(step), OUTPUT)
        return cross_image_qkv(*value, source)

    def sharpen(value, layer, at):
        changed = active(value.shape[-2], layer) & (jnp.arange(value.shape[0]) == OUTPUT)
        return jnp.where(changed[:, None, None, None], contrast_weights(value, contrast), value)

    return {"qkv": swap} | ({} if isinstance(contrast, (int, float)) and contrast == 1 else {"weights": sharpen})
