"""Small ListOps: nested lists of digits under MAX, MIN, MED (the median, rounded down) and SM (the sum modulo 10); asked for is the value, 0..9.

    [MAX 2 9 [MIN 4 7 ] 0 ]        ->        9

After Nangia, Bowman: "ListOps: A Diagnostic Dataset for Latent Tree Learning" (2018, arXiv 1804.06028), shorter and shallower.
"""

import numpy as np

OPERATORS = {"MAX": max, "MIN": min, "MED": lambda values: int(np.median(values)), "SM": lambda values: sum(values) % 10}
CLOSE, PAD = 10 + len(OPERATORS), 11 + len(OPERATORS)
VOCABULARY = PAD + 1
CLASSES = 10


def _tree(rng, depth, room):
    """Tokens, at most ``room`` of them, and the value."""
    if depth == 0 or room < 5 or rng.random() < 0.25:
        digit = int(rng.integers(10))
        return [digit], digit
    operator = int(rng.integers(len(OPERATORS)))
    tokens, values = [10 + operator], []
    for _ in range(int(rng.integers(2, 6))):
        if len(tokens) + 2 > room:
            break
        inner, value = _tree(rng, depth - 1, (room - len(tokens) - 1) // 2)
        tokens, values = tokens + inner, [*values, value]
    return [*tokens, CLOSE], tuple(OPERATORS.values())[operator](values)


def examples(count: int, seed: int, depth: int = 3, length: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [count, length], PAD at the end, and answers int32 [count]; none is a bare digit."""
    rng = np.random.default_rng(seed)
    tokens, answers = np.full((count, length), PAD, np.int32), np.zeros(count, np.int32)
    for row in range(count):
        found = [0]
        while len(found) < 8:
            found, answers[row] = _tree(rng, depth, length)
        tokens[row, :len(found)] = found
    return tokens, answers
