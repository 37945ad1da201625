"""Probes for syntax: how much of a sentence's tree can be read from all attention maps together, and how much from words and distances alone.

Clark, Khandelwal, Levy, Manning: "What Does BERT Look At? An Analysis of BERT's Attention" (BlackboxNLP 2019, arXiv 1906.04341). A probe gives for each word
j logits over its heads: column 0 is the root, column 1 + i is word i:

    p(i is the head of j) = softmax_i( sum_k w_k a^k_ji + u_k a^k_ij )
    root of j             =            sum_k w_k (s a^k_j[CLS] + e a^k_j[SEP]) + u_k (s a^k_[CLS]j + e a^k_[SEP]j)

In the released code the word probe's root column is out of step with the weights by one; here it is the root's.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core.checks import as_array, check_integers, check_real, describe

DISTANCES = 8
"""Number of :func:`distance_features`."""


def probe_maps(weights: Float[Array, "B M W W"], start: Int[Array, " B"], stop: Int[Array, " B"], root_start, root_end) -> Float[Array, "B W W+1 2M"]:
    """The maps that probes weigh: of word j, in column 0 ``root_start * (to [CLS]) + root_end * (to [SEP])``, in column 1 + i that to word i; for all M maps,
    then for their transposes.

    Args:
      weights: [B, M, W, W], between words, [CLS] and [SEP] among them; see :func:`attnx.analysis.token_to_word`.
      start, stop: int32 [B], where they are.
      root_start, root_end: numbers.

    Returns:
      [B, W, 1 + W, 2 M], in float32 (float64 for float64).
    """
    weights = check_real("weights", weights, ranks=(4,))
    batch, maps, size, other = weights.shape
    if size != other:
        raise ValueError(f"weights: expected shape [B, M, W, W], got {describe(weights)}")
    both = jnp.concatenate([weights, jnp.swapaxes(weights, -1, -2)], axis=1).astype(jnp.promote_types(weights.dtype, jnp.float32))
    ends = (check_integers(name, x, ranks=(1,)) for name, x in (("start", start), ("stop", stop)))
    first, last = (jnp.take_along_axis(both, index[:, None, None, None], axis=-1) for index in ends)
    return jnp.concatenate([root_start * first + root_end * last, both], axis=-1).transpose(0, 2, 3, 1)


def distance_features(size: int) -> Float[Array, "W W+1 8"]:
    """Where word i (columns 1 ...) is, seen from word j: how far ahead and how far behind as a share of the sentence, whether it is 0, 1 before, 1 after, 2 before
    or 2 after; and whether the column is the root, column 0.

    >>> distance_features(4)[1, 3]
    Array([0.25, 0.  , 0.  , 0.  , 1.  , 0.  , 0.  , 0.  ], dtype=float32)
    """
    ahead = jnp.arange(size) - jnp.arange(size)[:, None]
    features = [jnp.maximum(ahead, 0) / max(size, 1), jnp.maximum(-ahead, 0) / max(size, 1), *(ahead == k for k in (0, -1, 1, -2, 2))]
    columns = jnp.pad(jnp.stack([x.astype(jnp.float32) for x in features], -1), ((0, 0), (1, 0), (0, 1)))
    return columns.at[:, 0, -1].set(1.0)


def _logits(logits, words):
    """Only words are heads; the root always may be."""
    words = as_array("words", words, "booleans")
    if words.dtype != bool or words.shape != logits.shape[:2]:
        raise ValueError(f"words: expected booleans {list(logits.shape[:2])}, got {describe(words)}")
    allowed = jnp.concatenate([jnp.ones_like(words[:, :1]), words], axis=1)
    return jnp.where(allowed[:, None], logits, jnp.finfo(logits.dtype).min)


class AttentionProbe(nnx.Module):
    """A linear combination of attention maps and their transposes, one weight each.

    Args:
      maps: M, how many maps: layers times heads.
      rngs: taken for uniformity; everything starts at fixed values.

    >>> import jax.numpy as jnp
    >>> probe = AttentionProbe(2, rngs=nnx.Rngs(0))
    >>> words = jnp.array([[False, True, True, False]])
    >>> probe(jnp.ones((1, 2, 4, 4)) / 4, jnp.array([0]), jnp.array([3]), words).shape
    (1, 4, 5)
    """

    def __init__(self, maps: int, *, rngs: nnx.Rngs):
        del rngs
        self.weights = nnx.Param(jnp.zeros(2 * maps))
        self.root_start, self.root_end = nnx.Param(jnp.ones(())), nnx.Param(jnp.ones(()))

    def __call__(self, weights: Float[Array, "B M W W"], start: Int[Array, " B"], stop: Int[Array, " B"], words: Bool[Array, "B W"]) -> Float[Array, "B W W+1"]:
        """Logits of the heads of all words.

        Args:
          weights, start, stop: as in :func:`probe_maps`.
          words: booleans [B, W], which may be heads: no [CLS], [SEP] or padding.
        """
        maps = probe_maps(weights, start, stop, self.root_start[...], self.root_end[...])
        return _logits(maps @ self.weights[...], words)


class AttentionWordProbe(nnx.Module):
    """As :class:`AttentionProbe`, but the weights of the maps are a linear function of both words, ``A v_j + B v_i + c``, v_i = 0 for the root.

    Args:
      maps: M.
      features: D, size of the words' vectors, which are given and not trained.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> probe = AttentionWordProbe(2, 5, rngs=nnx.Rngs(0))
    >>> words = jnp.array([[False, True, True, False]])
    >>> probe(jnp.ones((1, 2, 4, 4)) / 4, jnp.array([0]), jnp.array([3]), words, jnp.ones((1, 4, 5))).shape
    (1, 4, 5)
    """

    def __init__(self, maps: int, features: int, *, rngs: nnx.Rngs):
        self.of_word, self.of_head = nnx.Linear(features, 2 * maps, rngs=rngs), nnx.Linear(features, 2 * maps, use_bias=False, rngs=rngs)
        self.root_start, self.root_end = nnx.Param(jnp.ones(())), nnx.Param(jnp.ones(()))

    def __call__(self, weights: Float[Array, "B M W W"], start: Int[Array, " B"], stop: Int[Array, " B"], words: Bool[Array, "B W"],
                 vectors: Float[Array, "B W D"]) -> Float[Array, "B W W+1"]:
        """Logits of the heads of all words; ``vectors`` are the words', the rest as for :class:`AttentionProbe`."""
        maps = probe_maps(weights, start, stop, self.root_start[...], self.root_end[...])
        heads = jnp.pad(self.of_head(vectors), ((0, 0), (1, 0), (0, 0)))
        return _logits(jnp.einsum("bjk,bjik->bji", self.of_word(vectors), maps) + jnp.einsum("bik,bjik->bji", heads, maps), words)


class WordDistanceProbe(nnx.Module):
    """What the attention probes are compared with: one hidden layer (tanh) over both words' vectors and :func:`distance_features`.

    Args:
      features: D.
      hidden: size of the hidden layer.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> words = jnp.array([[False, True, True, False]])
    >>> WordDistanceProbe(5, rngs=nnx.Rngs(0))(words, jnp.ones((1, 4, 5))).shape
    (1, 4, 5)
    """

    def __init__(self, features: int, hidden: int = 256, *, rngs: nnx.Rngs):
        dense = lambda inputs, outputs, bias=False: nnx.Linear(inputs, outputs, use_bias=bias, rngs=rngs)
        self.of_word, self.of_head, self.of_distance, self.out = dense(features, hidden, True), dense(features, hidden), dense(DISTANCES, hidden), dense(hidden, 1)

    def __call__(self, words: Bool[Array, "B W"], vectors: Float[Array, "B W D"]) -> Float[Array, "B W W+1"]:
        """Logits of the heads of all words."""
        heads = jnp.pad(self.of_head(vectors), ((0, 0), (1, 0), (0, 0)))
        hidden = self.of_word(vectors)[:, :, None] + heads[:, None] + self.of_distance(distance_features(vectors.shape[1]))
        return _logits(self.out(jax.nn.tanh(hidden))[..., 0], words)
