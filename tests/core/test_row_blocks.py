"""Blocks of rows: any length, a carry, a halo, padding that stays outside; and scores that are handed out."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from agreement import arrays, assert_agree

import attnx
from attnx import masks, scores
from attnx.core.row_blocks import pad_rows, scan_rows


@pytest.mark.parametrize("length", [0, 1, 5, 8])
def test_scan_rows(length):
    """Blocks, the last of them filled up, find what one pass over all rows finds."""
    x, kinds = jnp.arange(1.0, 2 * length + 1).reshape(2, length), jnp.ones((2, length), int)

    def body(carry, rows):
        x, kinds = rows
        out = x[:, 2:] + 10 * x[:, 1:-1] + 100 * x[:, :-2] + carry[:, None]
        return carry + jnp.where(kinds[:, 2:] < 0, 0, x[:, 2:]).sum(1), (out, kinds[:, 2:])

    rows = pad_rows((x, kinds), 2)
    run = lambda x, kinds: scan_rows(body, jnp.zeros(2), (x, kinds), block_size=3, halo=2)
    carry, (out, _) = jax.jit(run)(*rows)
    np.testing.assert_array_equal(carry, x.sum(1))
    assert out.shape == x.shape
    for t in range(length):
        before = [rows[0][:, t + 2 - back] for back in range(3)]
        np.testing.assert_array_equal(out[:, t], before[0] + 10 * before[1] + 100 * before[2] + x[:, :t // 3 * 3].sum(1))


def test_pad_rows():
    """Zeros, and -1 in positions and ids."""
    padded = pad_rows((jnp.ones((1, 2, 1)), jnp.ones((1, 2), jnp.int32), None), 1, 1)
    assert padded[0][0, :, 0].tolist() == [0, 1, 1, 0] and padded[1][0].tolist() == [-1, 1, 1, -1] and padded[2] is None


def test_attention_scores(x64):
    """Scores and what is allowed, with parts, padding and shared heads; attention goes on from them."""
    query, key, value, _ = arrays()
    positions = jnp.arange(11).at[3].set(-1)
    parts = dict(scores=scores.alibi(4), mask=masks.causal(), scale=0.3, key_positions=positions)
    s, allowed = attnx.attention_scores(query, key, **parts)
    distance = jnp.arange(13)[:, None] - positions
    expected = oracles.dot_products(query, key, 0.3) - scores.alibi_slopes(4)[:, None, None] * jnp.abs(distance)
    assert_agree(jnp.where(allowed, s, 0), jnp.where((distance >= 0) & (positions >= 0), expected, 0), 1e-12)
    spread = jnp.repeat(jnp.moveaxis(value, 2, 1), 2, axis=1)
    assert_agree(jnp.moveaxis(attnx.attend_scores(s, spread, mask=allowed), 1, 2), attnx.attention(query, key, value, **parts), 1e-12)
