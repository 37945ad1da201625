"""Attention by blocks of query rows, for scores that depend on scores of other rows.

A convolution over queries wants the rows just before (a halo), a penalty that accumulates over queries the sum of all rows before (a carry). Neither folds over key
blocks, so whole rows of scores are made, for a block of queries at a time, and made again in the backward pass: memory O(block S), where all rows at once would take
O(T S).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128  # rows: enough to feed the cores, few enough to be little next to the sequence
IMPLEMENTATIONS = ("reference", "blockwise")


def pad_rows(rows: Any, before: int, after: int = 0) -> Any:
    """A pytree of [B, T, ...] with more rows: zeros in real arrays, -1 (padding, no document) in those of integers."""
    def pad(x):
        widths = [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)

    return jax.tree.map(pad, rows) if before or after else rows


def scan_rows(body: Callable, carry: Any, rows: Any, *, block_size: int, halo: int = 0) -> tuple[Any, Any]:
    """Evaluates ``carry, out = body(carry, rows)`` over blocks of rows, in order.

    Args:
      body: ``body(carry, rows) -> (carry, out)``, of rows [B, halo + t, ...] to outputs [B, t, ...]: what is found for all but the first ``halo`` rows.
      carry: a pytree that goes from block to block, whose shapes and dtypes stay.
      rows: a pytree of [B, halo + T, ...] (see :func:`pad_rows` for rows before the first).
      block_size: rows of a block at the most; T or more evaluates ``body`` on all rows at once, without rematerialisation.
      halo: how many rows before a block are handed over with it.

    Returns:
      ``(carry, out)`` with outputs [B, T, ...].

    Cost: what ``body`` costs for one block, in memory; for the backward pass also one carry a block. The last block is filled up with rows of padding, which the body
    has to bear and must not let into the carry.

    >>> total = lambda carry, x: (carry + x.sum(1), carry[:, None] + jnp.cumsum(x, 1))
    >>> scan_rows(total, jnp.zeros(1), jnp.ones((1, 5)), block_size=2)
    (Array([5.], dtype=float32), Array([[1., 2., 3., 4., 5.]], dtype=float32))
    """
    length = jax.tree.leaves(rows)[0].shape[1] - halo
    if length <= block_size:
        return body(carry, rows)
    count = -(-length // block_size)
    index = jnp.arange(count)[:, None] * block_size + jnp.arange(halo + block_size)
    blocks = jax.tree.map(lambda x: jnp.moveaxis(x[:, index], 1, 0), pad_rows(rows, 0, count * block_size - length))
    carry, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, blocks)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * block_size, *x.shape[3:])[:, :length]
    return carry, jax.tree.map(join, out)


def rows_at_once(implementation: str | None, block_size: int | None, length: int) -> int:
    """The block size of an implementation: all rows in the 'reference', ``block_size`` or what is chosen for it in 'blockwise' and by default."""
    return max(length, 1) if implementation == "reference" else BLOCK if block_size is None else block_size
