"""Properties that hold for every input, on inputs that hypothesis draws. Shapes are fixed, so each function compiles once."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from agreement import arrays, assert_agree, blockwise, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import attnx
from attnx import masks, scores, weights
from pallas_kernels.parts import At, Range

B, T, S, N = 2, 13, 11, 4
quick = partial(settings, deadline=None, derandomize=True, database=None)


def integers(shape, low, high):
    return hnp.arrays(np.int32, shape, elements=st.integers(low, high))


def floats(shape, bound):
    return hnp.arrays(np.float64, shape, elements=st.floats(-bound, bound))


@quick(max_examples=40)
@given(query=integers((B, T), -1, 14), key=integers((B, S), -1, 14), ids=integers((B, T), 0, 2), key_ids=integers((B, S), 0, 2),
       allowed=hnp.arrays(np.bool_, (N, T, S)), columns=floats((1, S), 20))
def test_blockwise_is_reference(query, key, ids, key_ids, allowed, columns):
    """Any positions, documents, explicit mask and bias: outputs, residuals and gradients agree, none is NaN."""
    with jax.enable_x64(True):
        call = dict(query_positions=query, key_positions=key, mask=masks.causal() & ~masks.documents(ids, key_ids) | masks.explicit(allowed),
                    scores=scores.bias(columns))
        assert_agree(blockwise(*arrays(), **call), reference(*arrays(), **call), 1e-11)


# Tile claims ------------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 3, 4


def near(at, size):
    return abs(at.query - at.key) <= size


def near_cover(query, key, size):
    apart = np.maximum(key.low - query.high, query.low - key.high)
    return apart <= size.high, np.maximum(key.high - query.low, query.high - key.low) <= size.low


small = st.integers(0, 6)
leaves = st.one_of(
    st.just(masks.causal()),
    st.builds(masks.sliding_window, st.integers(1, 6)),
    st.builds(masks.local, st.none() | small, st.none() | small),
    st.builds(lambda n: masks.prefix(np.int32(n)), st.integers(0, 12)),
    st.builds(lambda a, b: masks.documents(a, b), integers((ROWS,), 0, 2), integers((COLUMNS,), 0, 2)),
    st.builds(lambda a, b: masks.lengths(np.int32(a), np.int32(b)), st.integers(0, 12), st.integers(0, 12)),
    st.builds(masks.explicit, hnp.arrays(np.bool_, (ROWS, COLUMNS))),
    st.builds(masks.dilated, st.integers(1, 4)),
    st.builds(lambda n, extra: masks.strided_columns(n + extra, n), st.integers(1, 3), small),
    st.builds(masks.within_blocks, st.integers(1, 6)),
    st.builds(lambda n: masks.predicate(near, np.int32(n), cover=near_cover), small),
)
trees = st.recursive(leaves, lambda inner: st.one_of(
    st.builds(lambda a, b: a & b, inner, inner), st.builds(lambda a, b: a | b, inner, inner), st.builds(lambda a: ~a, inner)), max_leaves=5)


def operand_block(operand):
    """An operand of one tile, with rows first and columns second."""
    array, axes = np.asarray(operand.array), operand.axes
    return array.reshape([array.shape[axes.index(name)] if name in axes else 1 for name in ("query", "key")])


@quick(max_examples=150)
@given(mask=trees, query=integers((ROWS,), 0, 12), key=integers((COLUMNS,), 0, 12))
def test_tile_claims_are_true(mask, query, key):
    """However masks are composed, a tile that may hold no pair holds none, and one said to be full is."""
    blocks = [operand_block(operand) for operand in mask.operands(None)]
    ok = np.broadcast_to(mask.tile(At(0, 0, query[:, None], key[None]), *blocks), (ROWS, COLUMNS))
    extent = lambda x: Range(x.min(), x.max())
    some, every = mask.block(extent(query), extent(key), *map(extent, blocks))
    assert some or not ok.any()
    assert ok.all() or not every


@quick(max_examples=50)
@given(mask=trees, query=integers((ROWS,), 0, 12), key=integers((COLUMNS,), 0, 12))
def test_spans_are_true(mask, query, key):
    """No query sees a key outside the span."""
    blocks = [operand_block(operand) for operand in mask.operands(None)]
    ok = np.broadcast_to(mask.tile(At(0, 0, query[:, None], key[None]), *blocks), (ROWS, COLUMNS))
    back, ahead = mask.span()
    offset = (key - query[:, None])[ok]
    assert back is None or (offset >= -back).all()
    assert ahead is None or (offset <= ahead).all()


# Weights ----------------------------------------------------------------------------------------------------------------

KINDS = {"softmax": (weights.softmax(), oracles.softmax), "softpick": (weights.softpick(), oracles.softpick), "sparsemax": (weights.sparsemax(), oracles.sparsemax),
         "entmax": (weights.entmax15(), oracles.entmax15), "sigmoid": (weights.sigmoid(), oracles.sigmoid)}


@jax.jit
def rows(s, ok):
    """The weights of rows of scores by the library and by formula."""
    return {name: (attnx.attend_scores(s, jnp.eye(S), mask=ok, weights=part), oracle(s, ok)) for name, (part, oracle) in KINDS.items()}


@quick(max_examples=60)
@given(s=floats((2, S), 30), ok=hnp.arrays(np.bool_, (2, S)))
def test_rows_of_weights(s, ok):
    """Formulas hold; forbidden keys weigh nothing; distributions sum to one; a larger score never weighs less."""
    with jax.enable_x64(True):
        results = rows(s, ok)
    for name, (got, expected) in results.items():
        np.testing.assert_allclose(got, expected, atol=1e-9, err_msg=name)
        assert (np.asarray(got)[~ok] == 0).all()
        for row, allowed, w in zip(s, ok, np.asarray(got)):
            if name in ("softmax", "sparsemax", "entmax") and allowed.any():
                np.testing.assert_allclose(w.sum(), 1, rtol=1e-9)
            assert (np.diff(w[allowed][np.argsort(row[allowed])]) >= -1e-12).all()


@jax.jit
def merged(results):
    return [reduce(attnx.merge, [results[i] for i in order]) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))], attnx.merge(
        results[0], attnx.merge(results[1], results[2]))


@quick(max_examples=60)
@given(out=floats((3, 4, 2), 10), r=hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4) | st.just(-np.inf)))
def test_merge_is_a_commutative_monoid(out, r):
    """Any order and grouping, with empty branches and residuals thousands apart."""
    out = np.where(np.isneginf(r)[..., None], 0, out)
    with jax.enable_x64(True):
        orders, grouped = merged(list(zip(out, r)))
    assert_agree(orders, [grouped] * 3, 1e-12)
    total = np.logaddexp.reduce(r, axis=0)
    assert_agree(grouped[1], total, 1e-12)


@quick(max_examples=30)
@given(count=st.integers(4, 64), beyond=st.integers(1, 200), bidirectional=st.booleans())
def test_t5_buckets_are_ordered(count, beyond, bidirectional):
    """Buckets are in range, grow with the distance, and end in the last."""
    furthest = count // (4 if bidirectional else 2) + beyond
    behind = np.asarray(scores.t5_bucket(-np.arange(300), count, furthest, bidirectional))
    last = (count // 2 if bidirectional else count) - 1
    assert behind[0] == 0 and (np.diff(behind) >= 0).all() and (behind <= last).all()
    assert (behind[furthest:] == last).all()


# Decoding -----------------------------------------------------------------------------------------------------------------

WINDOW = attnx.pairs(mask=masks.sliding_window(4), scores=scores.soft_cap(2.0), implementation="reference")
step = jax.jit(WINDOW.step)
whole = jax.jit(WINDOW)


@quick(max_examples=15)
@given(pieces=st.lists(st.integers(1, 3), min_size=11, max_size=11))
def test_any_pieces_decode_alike(pieces):
    """However a sequence is cut into pieces of 1 to 3 tokens, a rolling cache gives the parallel result."""
    query, key, value, _ = arrays(jnp.float32, queries=S)
    state, start, outputs = WINDOW.init(B, S, 2, 5, 3, jnp.float32), 0, []
    while start < S:
        size = min(pieces[len(outputs)], S - start)
        piece = slice(start, start + size)
        state, out = step(state, query[:, piece], key[:, piece], value[:, piece])
        outputs.append(out)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole(query, key, value), atol=2e-6)
