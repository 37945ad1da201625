"""N-gram language models of bytes: the baselines that a trained model has to beat.

    p_n(b | c_1 .. c_n) = (N(c_1 .. c_n b) + D(c_1 .. c_n) p_{n-1}(b | c_2 .. c_n)) / (N(c_1 .. c_n) + D(c_1 .. c_n))

with N the number of times that a string occurs in the training text and D of how many different bytes follow it: the more novel the
continuations of a context were, the more the shorter context has to say. p_{-1} is uniform.

Source: Ian Witten and Timothy Bell, "The Zero-Frequency Problem: Estimating the Probabilities of Novel Events in Adaptive Text Compression",
1991, doi:10.1109/18.87000 (method C), interpolated.
"""

import numpy as np

from attnx.training import Corpus


def ngram_bits(train: Corpus, held_out: Corpus, order: int, most: int = 2**26) -> np.ndarray:
    """How many bits n-gram models need for each byte of a text.

    Args:
      train: the text that is counted, of bytes.
      held_out: the text that is predicted.
      order: bytes of the longest context, 0 to 3.
      most: how many bytes of ``train`` to count, from its start.

    Returns:
      [order + 1, len(held_out.tokens)]: row n has the cost of each byte given the n before it. A context ends where its file begins (there are
      separators before that). The separators' own cost is without meaning.

    Raises:
      ValueError: for another order.

    Cost: sorts the training text ``order + 1`` times.
    """
    if not 0 <= order <= 3:
        raise ValueError(f"order: expected 0 to 3, got {order}")
    counted, predicted = _Contexts(train, most), _Contexts(held_out, len(held_out.tokens))
    probability = np.full(len(held_out.tokens), 1 / 256)
    bits = []
    for n in range(order + 1):
        strings, counts = np.unique(counted.strings(n)[counted.inside], return_counts=True)
        contexts, first = np.unique(strings >> 8, return_index=True)
        total, distinct = np.add.reduceat(counts, first), np.diff(np.append(first, len(strings)))
        wanted = predicted.strings(n)
        count = _look_up(strings, counts, wanted)
        total, distinct = _look_up(contexts, total, wanted >> 8), _look_up(contexts, distinct, wanted >> 8)
        seen = total > 0
        probability = np.where(seen, (count + distinct * probability) / np.where(seen, total + distinct, 1), probability)
        bits.append(-np.log2(probability))
    return np.stack(bits)


class _Contexts:
    """The bytes of a corpus with those before them."""

    def __init__(self, corpus, most):
        self.tokens = corpus.tokens[:most].astype(np.uint32)
        lengths = np.diff(corpus.starts)
        self.offset = (np.arange(len(corpus.tokens)) - np.repeat(corpus.starts[:-1], lengths))[:most]  # within the file; 0 is the separator
        self.inside = self.offset > 0

    def strings(self, n):
        """For each byte, it and the n before it as one integer."""
        string = self.tokens.copy()
        for back in range(1, n + 1):
            before = np.concatenate([np.zeros(back, np.uint32), self.tokens[:-back]])
            string += np.where(self.offset >= back, before, 0) << np.uint32(8 * back)
        return string


def _look_up(keys, values, wanted):
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
