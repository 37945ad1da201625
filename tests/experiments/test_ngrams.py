"""The baselines against their definition."""

import math
from collections import Counter

import numpy as np
import pytest

from attnx.training import Corpus
from experiments.ngrams import ngram_bits

TRAIN = Corpus.of([(str(i), np.frombuffer(text, np.uint8)) for i, text in enumerate([b"abracadabra", b"abba", b"a", b"cab\xff\x00\xff"])])
HELD = Corpus.of([(str(i), np.frombuffer(text, np.uint8)) for i, text in enumerate([b"abracab", b"zebra\xff\x00"])])


def texts(corpus):
    return [corpus.file(i)[1:].tobytes() for i in range(len(corpus.names))]


def definition(order):
    """Probabilities by counting strings, byte after byte; contexts are padded with zeros at the start of a file."""
    counts = [Counter((padded[i - n:i], padded[i]) for text in texts(TRAIN) for padded in [bytes(order) + text]
                      for i in range(order, len(padded))) for n in range(order + 1)]

    def probability(context, byte):
        p = 1 / 256
        for n in range(order + 1):
            after = {b: count for (c, b), count in counts[n].items() if c == context[len(context) - n:]}
            if after:
                p = (after.get(byte, 0) + len(after) * p) / (sum(after.values()) + len(after))
        return p

    return [[probability((bytes(order) + text)[i:i + order], text[i]) for i in range(len(text))] for text in texts(HELD)], probability


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_against_the_definition(order):
    bits = ngram_bits(TRAIN, HELD, order)[-1]
    want, probability = definition(order)
    for i, row in enumerate(want):
        got = bits[HELD.starts[i] + 1:HELD.starts[i + 1]]
        np.testing.assert_allclose(got, [-math.log2(p) for p in row], rtol=1e-12)
    context = b"abr"[:order]
    assert sum(probability(context, byte) for byte in range(256)) == pytest.approx(1, abs=1e-12)


def test_lower_orders_are_the_first_rows():
    np.testing.assert_array_equal(ngram_bits(TRAIN, HELD, 3)[:2], ngram_bits(TRAIN, HELD, 1))


def test_only_the_start_of_a_long_text_is_counted():
    first = Corpus.of([("0", TRAIN.file(0)[1:])])
    np.testing.assert_array_equal(ngram_bits(TRAIN, HELD, 2, most=len(first.tokens)), ngram_bits(first, HELD, 2))


def test_orders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="order: expected 0 to 3, got 4"):
        ngram_bits(TRAIN, HELD, 4)
