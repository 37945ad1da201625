"""Partial states as a monoid, plans as partitions of tiles, decoding by plans against the definition, and the simulated time."""

import itertools
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx.core import lean_attention_decode, softmax_state_finish, softmax_state_identity, softmax_state_merge, softmax_state_of
from pallas_kernels.decode import fixed_split_plan, flash_decoding_splits, no_split_plan, simulate_makespan, stream_k_plan

B, S, N, K, H, TILE = 3, 17, 4, 2, 8, 8
LENGTHS = np.array([17, 1, 10])


def arrays(dtype=jnp.float64):
    shapes = (B, 1, N, H), (B, S, K, H), (B, S, K, H)
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def plans():
    total = int((-(-LENGTHS // TILE)).sum()) * K
    yield from (stream_k_plan(LENGTHS, K, TILE, workers) for workers in range(1, total + 4))
    yield from (fixed_split_plan(LENGTHS, K, TILE, splits) for splits in (2, 3, 9))
    yield no_split_plan(LENGTHS, K, TILE)


def test_merging_is_associative_and_commutative():
    scores, value = jax.random.normal(jax.random.key(0), (7, 5)) * 20, jax.random.normal(jax.random.key(1), (7, 5, 3))
    parts = [softmax_state_of(scores[i], value[i]) for i in range(7)]
    whole, lse = softmax_state_finish(softmax_state_of(scores.reshape(-1), value.reshape(-1, 3)))
    rng = np.random.default_rng(0)
    for _ in range(5):
        pool = [parts[i] for i in rng.permutation(7)]
        while len(pool) > 1:  # any bracketing
            at = rng.integers(len(pool) - 1)
            pool[at:at + 2] = [softmax_state_merge(*pool[at:at + 2])]
        out, r = softmax_state_finish(pool[0])
        np.testing.assert_allclose(out, whole, atol=1e-6)
        np.testing.assert_allclose(r, lse, rtol=1e-6)


def test_identity():
    """It changes nothing, not even itself, and finishes as nothing with finite gradients."""
    none, some = softmax_state_identity((), 3), softmax_state_of(jnp.ones(2), jnp.ones((2, 3)))
    for a, b in ((none, some), (some, none)):
        jax.tree.map(np.testing.assert_array_equal, softmax_state_merge(a, b), some)
    jax.tree.map(np.testing.assert_array_equal, softmax_state_merge(none, none), none)
    slope = jax.grad(lambda v: softmax_state_finish(softmax_state_merge(none, softmax_state_of(jnp.zeros(2) + v, jnp.ones((2, 3)) * v, False)))[0].sum())(1.0)
    assert slope == 0


def test_plans_are_partitions():
    """Each tile once, each output one host and one end; shares of stream-K are equal, and cross heads and sequences."""
    tiles = -(-LENGTHS // TILE)
    for plan in plans():
        read = [(b, h, i) for b, h, begin, end in zip(plan.batch, plan.head, plan.begin, plan.end) for i in range(begin, end)]
        assert read == [(b, h, i) for b, h in itertools.product(range(B), range(K)) for i in range(tiles[b])]
        for b, h in itertools.product(range(B), range(K)):
            mine = (plan.batch == b) & (plan.head == h)
            assert plan.is_host[mine].sum() == plan.is_last[mine].sum() == 1
            assert plan.count[b, h] == mine.sum() and plan.slot[mine][0] == plan.first[b, h]
        if plan.waits:
            shares = np.bincount(plan.worker, plan.end - plan.begin)
            assert shares.max() - shares.min() <= 1 and (np.diff(plan.worker) >= 0).all()
            assert len(plan.slot) <= B * K + len(shares) - 1
    across = stream_k_plan(LENGTHS, K, TILE, 3)
    assert any(len(set(zip(across.batch[across.worker == w], across.head[across.worker == w]))) > 1 for w in range(3))


@pytest.mark.usefixtures("x64")
def test_every_plan_is_exact():
    query, key, value = arrays()
    expected, r = attnx.decode(query, key, value, jnp.asarray(LENGTHS), implementation="reference", return_residual=True)
    for out, lse in jax.jit(lambda: [lean_attention_decode(query, key, value, jnp.asarray(LENGTHS), plan) for plan in plans()])():
        np.testing.assert_allclose(out, expected, atol=1e-12)
        np.testing.assert_allclose(lse, r[:, 0], atol=1e-12)
    repeat = lambda x: jnp.repeat(x, N // K, axis=2)
    peer = jax.nn.dot_product_attention(query, repeat(key), repeat(value), key_value_seq_lengths=jnp.asarray(LENGTHS, jnp.int32))
    np.testing.assert_allclose(out, peer, atol=1e-5)


def test_pages_and_bfloat16():
    query, key, value = arrays(jnp.float32)
    pages = jax.random.permutation(jax.random.key(3), 15).reshape(B, 5)
    store = lambda x: jnp.zeros((15, 4, K, H)).at[pages].set(jnp.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0))).reshape(B, 5, 4, K, H))
    plan, lengths = stream_k_plan(LENGTHS, K, TILE, 4), jnp.asarray(LENGTHS)  # a tile of two pages
    expected = lean_attention_decode(query, key, value, lengths, plan)[0]
    np.testing.assert_allclose(lean_attention_decode(query, store(key), store(value), lengths, plan, page_table=pages)[0], expected, atol=1e-6)
    short = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    out, lse = lean_attention_decode(*short, lengths, plan)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)


def test_empty_sequences():
    """Zeros, -inf, and gradients that are finite; planned for or not."""
    query, key, value = arrays(jnp.float32)
    lengths = jnp.array([5, 0, 17])
    for plan in (stream_k_plan([5, 0, 17], K, TILE, 4), no_split_plan([17, 17, 17], K, TILE)):
        (out, lse), pull = jax.vjp(lambda *args, plan=plan: lean_attention_decode(*args, lengths, plan), query, key, value)
        assert not out[1].any() and jnp.isneginf(lse[1]).all() and jnp.isfinite(lse[::2]).all()
        assert all(jnp.isfinite(x).all() for x in pull((jnp.ones_like(out), jnp.ones_like(lse))))
    out, _ = lean_attention_decode(query, key, value, jnp.zeros(B, int), stream_k_plan([0, 0, 0], K, TILE, 4))
    assert not out.any()


def test_simulation():
    """One long sequence: its tiles over all workers, and a merge; hosts wait for what they merge."""
    assert simulate_makespan(no_split_plan([64], 2, 1), 8) == (64.0, 0.25)
    assert simulate_makespan(stream_k_plan([64], 2, 1, 8), 8)[0] == 16 + 0.5 * 3
    assert simulate_makespan(fixed_split_plan([64], 2, 1, 4), 8)[0] == 16 + 0.5 * 4
    assert simulate_makespan(no_split_plan([4, 4, 4], 1, 1), 2)[0] == 8  # two waves
    assert flash_decoding_splits(1, 4, 8) == 4
    ideal = reduce(lambda a, b: a + b, [5, 9, 1]) * 2 / 3
    assert simulate_makespan(stream_k_plan([5, 9, 1], 2, 1, 3), 3)[0] <= ideal + 1 + 0.5 * 2


def test_errors():
    query, key, value = arrays(jnp.float32)
    with pytest.raises(ValueError, match="plan: expected one for 3 sequences of 2 heads"):
        lean_attention_decode(query, key, value, jnp.asarray(LENGTHS), no_split_plan(LENGTHS, 4, TILE))
    with pytest.raises(ValueError, match="lengths: expected integers"):
        stream_k_plan([-1], 1, 1, 1)
    with pytest.raises(ValueError, match="splits: expected at least 1"):
        fixed_split_plan([1], 1, 1, 0)
