"""What single attention heads look at: surface statistics, distances between heads, heads as parsers and as resolvers of coreference.

Clark, Khandelwal, Levy, Manning: "What Does BERT Look At? An Analysis of BERT's Attention" (BlackboxNLP 2019, arXiv 1906.04341). All functions are of
attention maps whose rows sum to 1, such as ``attnx.nn.record`` returns them; leading axes are layers, heads and sentences. The paper's probes are in
:mod:`attnx.analysis.bert_probes`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnx.core.checks import as_array, check_choice, check_integer, check_integers, check_real, describe

MODES = ("dependent_to_head", "head_to_dependent")


def surface_statistics(weights: Float[Array, "*H T T"], tokens: Sequence[str], *, start: str = "[CLS]", separator: str = "[SEP]",
                       punctuation: Sequence[str] = (".", ",")) -> dict[str, Float[Array, "*H"]]:
    """How much of its attention a head gives to tokens of a kind, in the mean over all tokens that attend.

    Args:
      weights: [..., T, T], of one sentence.
      tokens: its T tokens.
      start, separator, punctuation: what the tokens of these kinds are.

    Returns:
      ``{kind: [...]}`` with 'self', 'previous', 'next', 'start', 'separator', 'punctuation', and of the separators alone 'separator_to_separator' and of
      all other tokens 'rest_to_separator' (0 where there is no such token).

    Raises:
      ValueError: for another number of tokens than the maps have.

    Cost: O(T^2) a head.

    >>> import jax.numpy as jnp
    >>> found = surface_statistics(jnp.full((4, 4), 0.25), ["[CLS]", "so", ".", "[SEP]"])
    >>> {kind: round(share.item(), 4) for kind, share in found.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'self': 0.25, 'previous': 0.1875, 'next': 0.1875, 'start': 0.25, 'separator': 0.25, 'punctuation': 0.25, 'separator_to_separator': 0.25,
     'rest_to_separator': 0.25}
    """
    weights = _maps(weights)
    size = weights.shape[-1]
    if len(tokens) != size:
        raise ValueError(f"tokens: expected {size} of them as in weights, got {len(tokens)}")
    is_start, is_separator = (np.array([token == kind for token in tokens], float) for kind in (start, separator))
    is_punctuation = np.array([token in tuple(punctuation) for token in tokens], float)
    every = np.ones(size)
    columns = lambda chosen, rows=every: (np.outer(rows, chosen), rows.sum())
    kinds = {"self": (np.eye(size), size), "previous": (np.eye(size, k=-1), size), "next": (np.eye(size, k=1), size), "start": columns(is_start),
             "separator": columns(is_separator), "punctuation": columns(is_punctuation), "separator_to_separator": columns(is_separator, is_separator),
             "rest_to_separator": columns(is_separator, every - is_separator)}
    return {kind: jnp.einsum("...ts,ts->...", weights, chosen.astype(weights.dtype)) / max(rows, 1) for kind, (chosen, rows) in kinds.items()}


def head_entropy(weights: Float[Array, "*H T S"], seen: Bool[Array, "*H S"] | None = None) -> Float[Array, "*H"]:
    """The mean entropy of a head's rows, in nats: broad attention has much.

    ::

        mean_i  - sum_j p_ij log p_ij,          p = 0.9999 a + 0.0001 / S

    Args:
      weights: [..., T, S]; ``weights[..., :1, :]`` is the entropy of the first token, [CLS], alone.
      seen: booleans [..., S] that broadcast: which tokens there are (padding neither attends, where T = S, nor counts); all by default.

    Returns:
      [...], in float32 (float64 for float64); log S at most.

    >>> import jax.numpy as jnp
    >>> head_entropy(jnp.stack([jnp.full((4, 4), 0.25), jnp.eye(4)])).round(2)
    Array([1.39, 0.  ], dtype=float32)
    """
    weights, seen, rows = _seen(weights, seen)
    p = _smooth(weights, seen, 1e-4)
    entropy = -jnp.sum(jnp.where(seen[..., None, :], p * jnp.log(p), 0), axis=-1)
    return jnp.sum(jnp.where(rows, entropy, 0), axis=-1) / jnp.maximum(jnp.sum(rows, axis=-1), 1)


def head_distances(weights: Float[Array, "M *B T S"], seen: Bool[Array, "*B S"] | None = None) -> Float[Array, "M M"]:
    """Jensen-Shannon divergences between heads, summed over rows and sentences, in nats.

    ::

        d_ab = sum over rows of  H((p_a + p_b) / 2) - (H(p_a) + H(p_b)) / 2,          p = 0.999 a + 0.001 / S,  H the entropy

    Args:
      weights: [M, ..., T, S], of M heads.
      seen: booleans [..., S], of the sentences: as in :func:`head_entropy`.

    Returns:
      [M, M], symmetric, zero on the diagonal; each row adds at most log 2.

    Cost: O(M^2 T S) time a sentence, O(M T S) memory.

    >>> import jax.numpy as jnp
    >>> head_distances(jnp.stack([jnp.eye(2), jnp.eye(2), jnp.eye(2)[::-1]])).round(2)
    Array([[0.  , 0.  , 1.38],
           [0.  , 0.  , 1.38],
           [1.38, 1.38, 0.  ]], dtype=float32)
    """
    weights, seen, rows = _seen(weights, seen)
    p = jnp.where(seen[..., None, :], _smooth(weights, seen, 1e-3), 1)

    def distances(own):
        def one(other):
            mean = (own + other) / 2
            terms = own * jnp.log(own) + other * jnp.log(other) - 2 * mean * jnp.log(mean)  # padding holds ones, which add nothing
            return jnp.sum(jnp.where(rows[..., None], terms, 0)) / 2

        return jax.vmap(one)(p)

    return jax.lax.map(distances, p)


def embed_heads(distances: Float[Array, "M M"], dimensions: int = 2, *, steps: int = 300) -> Float[Array, "M dimensions"]:
    """Points whose Euclidean distances are as near as can be to given ones: metric multidimensional scaling.

    ::

        minimises  sum_ab (d_ab - |x_a - x_b|)^2  by  x <- B(x) x / M,     B_ab = - d_ab / |x_a - x_b|,  rows summing to 0

    from the classical solution; every step lowers the sum. Source of the iteration: Jan de Leeuw, "Applications of Convex Analysis to Multidimensional
    Scaling", 1977.

    Args:
      distances: [M, M], symmetric.
      dimensions: of the points.
      steps: number of iterations.

    Returns:
      [M, dimensions], centred.

    Cost: O(M^3 + steps M^2).

    >>> import jax.numpy as jnp
    >>> points = embed_heads(jnp.array([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]))
    >>> f"{jnp.linalg.norm(points[1] - points[2]):.3f}"
    '5.000'
    """
    distances = check_real("distances", distances, ranks=(2,))
    size = distances.shape[0]
    if distances.shape[1] != size:
        raise ValueError(f"distances: expected a square array, got {describe(distances)}")
    dimensions = check_integer("dimensions", dimensions, least=1, most=size)
    distances = distances.astype(jnp.promote_types(distances.dtype, jnp.float32))
    centre = jnp.eye(size, dtype=distances.dtype) - 1 / size
    values, vectors = jnp.linalg.eigh(-centre @ jnp.square(distances) @ centre / 2)
    points = vectors[:, -dimensions:] * jnp.sqrt(jnp.maximum(values[-dimensions:], 0))

    def step(points, _):
        apart = points[:, None] - points[None]
        length = jnp.sqrt(jnp.sum(jnp.square(apart), -1))
        ratio = jnp.where(length > 0, distances / jnp.where(length > 0, length, 1), 0)
        return jnp.einsum("ab,abd->ad", ratio, apart) / size, None

    return jax.lax.scan(step, points, length=steps)[0]


def token_to_word(weights: Float[Array, "*H T T"], word_of: Int[Array, "*H T"], words: int) -> Float[Array, "*H W W"]:
    """Attention between words from attention between their pieces.

    ::

        b_vw = mean over pieces i of v of  sum over pieces j of w of  a_ij

    to a split word the sum, from it the mean: rows keep summing to 1.

    Args:
      weights: [..., T, T].
      word_of: int32 [..., T] that broadcasts: the word of each token, -1 for tokens of none (what is given to them is lost).
      words: W, how many words there are.

    Returns:
      [..., W, W] in the dtype of the weights; zero rows and columns for words without pieces.

    Cost: O(W T (T + W)).

    >>> import jax.numpy as jnp
    >>> token_to_word(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), jnp.array([0, 1, 1]), 2)
    Array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)
    """
    weights, word_of = _maps(weights, widen=False), check_integers("word_of", word_of)
    if word_of.ndim == 0 or word_of.shape[-1] != weights.shape[-1]:
        raise ValueError(f"word_of: expected shape [..., {weights.shape[-1]}], a word a token, got {describe(word_of)}")
    words = check_integer("words", words, least=0)
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    pieces = jax.nn.one_hot(word_of, words, axis=-2, dtype=wide)
    share = pieces / jnp.maximum(jnp.sum(pieces, axis=-1, keepdims=True), 1)
    return (share @ weights.astype(wide) @ jnp.swapaxes(pieces, -1, -2)).astype(weights.dtype)


def head_as_parser(weights: Float[Array, "*H W W"], words: Bool[Array, "*H W"] | None = None, mode: str = MODES[0]) -> Int[Array, "*H W"]:
    """The syntactic head that an attention head finds for each word: the other word that it gives most to, or that gives most to it.

    ::

        argmax over words j != i of  a_ij  ('dependent_to_head')   or   a_ji  ('head_to_dependent')

    Args:
      weights: [..., W, W], between words; see :func:`token_to_word`.
      words: booleans [..., W] that broadcast: which of them are words, not [CLS], [SEP] or padding; all by default.
      mode: whether dependents look at their heads or heads at their dependents.

    Returns:
      int32 [..., W]: the index of the head, the first of equals; -1 for what is no word, or for a word alone.

    >>> import jax.numpy as jnp
    >>> head_as_parser(jnp.array([[0.1, 0.9, 0.0], [0.5, 0.1, 0.4], [0.3, 0.6, 0.1]]), jnp.array([True, True, False]))
    Array([ 1,  0, -1], dtype=int32)
    """
    weights = _maps(weights)
    check_choice("mode", mode, MODES)
    size = weights.shape[-1]
    words = jnp.ones(size, bool) if words is None else as_array("words", words, "booleans")
    weights = jnp.swapaxes(weights, -1, -2) if mode == MODES[1] else weights
    allowed = jnp.broadcast_to(words[..., None] & words[..., None, :] & ~jnp.eye(size, dtype=bool), weights.shape)
    if size == 0:
        return jnp.zeros(weights.shape[:-1], jnp.int32)
    best = jnp.argmax(jnp.where(allowed, weights, -1), axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(allowed, axis=-1), best, -1)


def offset_baseline(words: Bool[Array, "*B W"], offset: int) -> Int[Array, "*B W"]:
    """Always the word that many places to the right (to the left if negative), the last word beyond the end and none, -1, before the beginning.

    Args:
      words: booleans [..., W]: which are words, in one run.
      offset: number of words.

    >>> import jax.numpy as jnp
    >>> offset_baseline(jnp.array([False, True, True, True, False]), -1)
    Array([-1, -1,  1,  2, -1], dtype=int32)
    """
    words = as_array("words", words, "booleans")
    index = jnp.arange(words.shape[-1])
    first = jnp.argmax(words, axis=-1, keepdims=True)
    last = first + jnp.sum(words, axis=-1, keepdims=True) - 1
    head = jnp.minimum(index + offset, last)
    return jnp.where(words & (head >= first), head, -1).astype(jnp.int32)


def uas_by_relation(predicted: Int[Array, "*H B W"], heads: Int[Array, "B W"], relations: Int[Array, "B W"], number: int) -> Float[Array, "*H number"]:
    """The share of words whose head is found (unlabelled attachment score), for each relation of a word to its head.

    Args:
      predicted: int32 [..., B, W], see :func:`head_as_parser`.
      heads: int32 [B, W], the true ones.
      relations: int32 [B, W], 0 to number - 1; -1 for what does not count, such as padding, punctuation and roots.
      number: of relations.

    Returns:
      [..., number]; NaN for a relation that does not occur.

    >>> import jax.numpy as jnp
    >>> uas_by_relation(jnp.array([[1, 2, 0]]), jnp.array([[1, 2, 1]]), jnp.array([[0, 1, 1]]), 2)
    Array([1. , 0.5], dtype=float32)
    """
    predicted, heads, relations = (check_integers(name, x) for name, x in (("predicted", predicted), ("heads", heads), ("relations", relations)))
    if heads.shape != predicted.shape[-2:] or relations.shape != heads.shape:
        raise ValueError(f"heads, relations: expected shape {list(predicted.shape[-2:])} as in predicted, got {describe(heads)} and {describe(relations)}")
    of = jax.nn.one_hot(relations, number, dtype=jnp.float32)
    return jnp.einsum("...bw,bwr->...r", (predicted == heads).astype(jnp.float32), of) / jnp.sum(of, axis=(0, 1))


def coreference_antecedent(weights: Float[Array, "*H W W"], mentions: Int[Array, " M"]) -> Int[Array, "*H M"]:
    """The earlier mention that each mention looks at most.

    Args:
      weights: [..., W, W], between words.
      mentions: int32 [M], the head words of the mentions, in the order of the text; -1 for none.

    Returns:
      int32 [..., M], indices among the mentions; -1 for the first, which has nothing before it.

    >>> import jax.numpy as jnp
    >>> coreference_antecedent(jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.2, 0.5]]), jnp.array([0, 1, 2]))
    Array([-1,  0,  0], dtype=int32)
    """
    weights, mentions = _maps(weights), check_integers("mentions", mentions, ranks=(1,))
    between = weights[..., mentions[:, None], mentions]
    order = jnp.arange(mentions.size)
    allowed = (order < order[:, None]) & (mentions >= 0) & (mentions >= 0)[:, None]
    best = jnp.argmax(jnp.where(allowed, between, -1), axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(allowed, axis=-1), best, -1)


def separator_gradient(loss: Callable, weights: Float[Array, "L *N T S"], separators: Bool[Array, " S"]) -> Float[Array, " L"]:
    """How much the loss would change with a layer's attention to separators: the sum of ``|d loss / d a|`` over their columns, heads and rows.

    Args:
      loss: ``loss(weights) -> scalar``: of a model whose hook on ``weights`` returns ``weights[layer]``.
      weights: [L, ..., T, S], of all layers.
      separators: booleans [S].

    Returns:
      [L].

    Cost: one gradient of the loss.

    >>> import jax.numpy as jnp
    >>> separator_gradient(lambda a: jnp.sum(a[1] * jnp.array([3.0, 1.0])), jnp.ones((2, 1, 2, 2)) / 2, jnp.array([True, False]))
    Array([0., 6.], dtype=float32)
    """
    weights = check_real("weights", weights)
    slopes = jnp.abs(jax.grad(loss)(weights))
    return jnp.sum(jnp.where(as_array("separators", separators, "booleans"), slopes, 0), axis=tuple(range(1, weights.ndim)))


def _maps(weights, widen=True):
    """Square attention maps, in float32 or wider."""
    weights = check_real("weights", weights)
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights: expected shape [..., T, T], got {describe(weights)}")
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32)) if widen else weights


def _seen(weights, seen):
    """Maps in float32 or wider, the keys that there are [..., S], and the rows [..., T]."""
    weights = check_real("weights", weights)
    if weights.ndim < 2:
        raise ValueError(f"weights: expected shape [..., T, S], got {describe(weights)}")
    rows, keys = weights.shape[-2:]
    seen = jnp.ones(keys, bool) if seen is None else as_array("seen", seen, "booleans")
    if seen.dtype != bool or seen.ndim == 0 or seen.shape[-1] != keys:
        raise ValueError(f"seen: expected booleans [..., {keys}], got {describe(seen)}")
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32)), seen, seen if rows == keys else jnp.ones(rows, bool)


def _smooth(weights, seen, share):
    return (1 - share) * weights + share / jnp.maximum(jnp.sum(seen, axis=-1), 1)[..., None, None]
