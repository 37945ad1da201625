"""Operands with a number for each chosen block, and the table that says which blocks those are.

A tile of [bq, bk] pairs lies in one block of queries and keys, or holds several whole ones. The window of a query block has a row for each block
of queries in it; an entry is found by comparing the row's with the number of a key block, so nothing is as large as the product of the lengths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
    """The static description of a choice of blocks.

    Attributes:
      bq, bk: queries and keys of a block, powers of two.
      table: which operand, in tree order, is the table: int32, -1 or a block of keys, in a row each at most once; tiles see 0 at a chosen pair, else -1.
      scores: which is a number for each entry of the table, which tiles see at the entry's pairs, and 0 elsewhere; None where there is none.

    Both operands are [batch, kv_head, group, nq, rows, entries], rows = max(1, tile's bq // bq).
    """

    bq: int
    bk: int
    table: int
    scores: int | None


def _blocks(choice: Choice, j, bk: int):
    """The numbers of the key blocks of tile ``j``."""
    first = j * bk >> choice.bk.bit_length() - 1  # a power of two, and no signs
    return [first + n for n in range(max(1, bk // choice.bk))]


def names_any(choice: Choice, table, j, bk: int):
    """Whether the table's window has an entry in tile ``j``."""
    blocks = _blocks(choice, j, bk)
    return jnp.max(jnp.where((table[...] >= blocks[0]) & (table[...] <= blocks[-1]), 1.0, 0.0)) > 0


def read_table(choice: Choice, table, j, bq: int, bk: int, transposed: bool):
    """What a tile sees of the table's window: int32 [bq or 1, bk or 1], or its transpose."""
    found = _found(choice, table, jnp.ones(table.shape, jnp.float32), j, bk)
    return _spread([[x.astype(jnp.int32) - 1 for x in row] for row in found], choice, bq, bk, transposed)


def read_scores(choice: Choice, table, scores, j, bq: int, bk: int, transposed: bool):
    """What a tile sees of the scores' window."""
    scores = scores[...].astype(jnp.promote_types(scores.dtype, jnp.float32))
    return _spread(_found(choice, table, scores, j, bk), choice, bq, bk, transposed)


def _found(choice, table, numbers, j, bk):
    """A row of blocks of queries by a column of blocks of keys: [1, 1] the number at the entry of each, or 0."""
    columns = [jnp.sum(jnp.where(table[...] == block, numbers, 0), axis=1, keepdims=True) for block in _blocks(choice, j, bk)]
    return [[x[row: row + 1] for x in columns] for row in range(table.shape[0])]


def _spread(numbers, choice, bq, bk, transposed):
    sizes = min(choice.bq, bq), min(choice.bk, bk)
    if transposed:
        numbers, sizes = list(zip(*numbers)), sizes[::-1]
    height, width = (n * size for n, size in zip((len(numbers), len(numbers[0])), sizes))
    lines = []
    for first, *others in numbers:
        for n, x in enumerate(others, 1):
            first = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) >= n * sizes[1], x, first)
        lines.append(first)
    if len(lines) == 1:
        return lines[0]
    return jnp.concatenate([jnp.broadcast_to(x, (height // len(lines), width)) for x in lines], axis=0)


def add_scores(ref, gradient, choice: Choice, table, j, bk: int):
    """The transpose of :func:`read_scores`: adds the gradient of what a tile saw, not transposed, to that of the window."""
    blocks, rows = _blocks(choice, j, bk), table.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, gradient.shape[1]), 1)
    for row in range(rows):
        line = gradient if rows == 1 else jnp.sum(gradient[row * choice.bq: (row + 1) * choice.bq], axis=0, keepdims=True)
        for n, block in enumerate(blocks):
            mine = line if len(blocks) == 1 else jnp.where((lane >= n * choice.bk) & (lane < (n + 1) * choice.bk), line, 0)
            mine = jnp.sum(mine, axis=1, keepdims=True)
            ref[row: row + 1] += jnp.where(table[row: row + 1] == block, mine, 0)
