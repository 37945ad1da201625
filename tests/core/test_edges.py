"""The edges engine against its definition: a dense softmax over all edges, of which a node sees those that it receives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx.weights
from attnx.core.edges import (
    add_self_loops,
    attend_edges,
    degree,
    dense_to_edges,
    edge_attention,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
    segment_weights,
)

# Seven receivers, five senders: duplicates, isolated nodes (2 and 6), every kind of padding.
NODES, OTHERS, HEADS, KV, SIZE = 7, 5, 4, 2, 3
SENDERS = np.array([0, 1, 1, 4, 2, 3, 3, -1, 2, 5, 0, 2, 1, 0])
RECEIVERS = np.array([0, 0, 0, 1, 3, 4, 4, 1, -1, 1, 7, 5, 5, 2])
MASK = np.arange(14) < 13
REAL = MASK & (SENDERS >= 0) & (SENDERS < OTHERS) & (RECEIVERS >= 0) & (RECEIVERS < NODES)


def inputs(dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = (NODES, HEADS, SIZE), (OTHERS, KV, SIZE), (OTHERS, KV, 2), (len(SENDERS), HEADS)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def softmax(s, seen):
    e = jnp.where(seen, jnp.exp(s), 0)
    total = e.sum(1, keepdims=True)
    return e / jnp.where(total > 0, total, 1)


def definition(query, key, value, edge_scores, weigh=softmax, senders=SENDERS, receivers=RECEIVERS, real=REAL):
    """[V, E, N] weights of every edge for every node, and what they gather."""
    senders, receivers = np.where(real, senders, 0), np.where(real, receivers, 0)
    groups = query.shape[1] // key.shape[1]
    k, v = (jnp.repeat(x[senders], groups, axis=1) for x in (key, value))
    s = jnp.einsum("enh,enh->en", query[receivers], k) / np.sqrt(query.shape[2]) + edge_scores
    seen = (receivers == np.arange(len(query))[:, None]) & real
    w = jnp.where(seen[..., None], weigh(jnp.where(real[:, None], s, 0)[None], seen[..., None]), 0)
    return jnp.einsum("ven,enh->vnh", w, v)


def ours(query, key, value, edge_scores, **kwargs):
    return edge_attention(query, key, value, SENDERS, RECEIVERS, edge_mask=jnp.asarray(MASK), edge_scores=edge_scores, **kwargs)


def with_gradients(function):
    def scalar(*arrays):
        y = function(*arrays)
        return jnp.sum(jnp.sin(3 * y) * jnp.arange(1, y.size + 1).reshape(y.shape)), y

    @jax.jit
    def both(*arrays):
        gradients, y = jax.grad(scalar, tuple(range(len(arrays))), has_aux=True)(*arrays)
        return y, *gradients

    return both


def assert_close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_equals_the_definition(x64):
    arrays = inputs(np.float64)
    result = with_gradients(ours)(*arrays)
    assert_close(result, with_gradients(definition)(*arrays), 1e-12)
    assert not np.asarray(result[0])[[2, 6]].any()  # isolated nodes
    assert not np.asarray(result[1])[[2, 6]].any()


WEIGHTS = {
    "sink": (lambda: attnx.weights.softmax(sink=jnp.arange(4.0)),
             lambda s, seen: (e := jnp.where(seen, jnp.exp(s), 0)) / (e.sum(1, keepdims=True) + jnp.exp(jnp.arange(4.0)))),
    "temperature": (lambda: attnx.weights.softmax(temperature=1 + jnp.arange(7.0)),
                    lambda s, seen: softmax(s / (1 + jnp.arange(7.0))[:, None, None], seen)),
    "softpick": (attnx.weights.softpick,
                 lambda s, seen: jax.nn.relu(jnp.exp(s) - 1) / (jnp.where(seen, abs(jnp.exp(s) - 1), 0).sum(1, keepdims=True) + 1e-300)),
    "relu": (attnx.weights.relu, lambda s, seen: jax.nn.relu(s)),
    "clipped": (lambda: attnx.weights.clipped_softmax(-0.2, 1.1), lambda s, seen: jnp.clip(1.3 * softmax(s, seen) - 0.2, 0, 1)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights(name, x64):
    make, weigh = WEIGHTS[name]
    arrays = inputs(np.float64)
    assert_close(with_gradients(lambda *a: ours(*a, weights=make()))(*arrays),
                 with_gradients(functools.partial(definition, weigh=weigh))(*arrays), 1e-11)


def test_parameters_of_weights_learn(x64):
    """The gradients of sink and temperature are those of finite differences; padding does not blur them."""
    arrays = inputs(np.float64)

    @jax.jit
    def loss(sink, temperature):
        return jnp.sum(ours(*arrays, weights=attnx.weights.softmax(sink=sink, temperature=temperature)) ** 2)

    at = (jnp.arange(4.0), 1 + jnp.arange(7.0) / 7)
    for i, gradient in enumerate(jax.jit(jax.grad(loss, (0, 1)))(*at)):
        for j in range(len(gradient)):
            nudge = jnp.zeros_like(at[i]).at[j].set(1e-6)
            ends = [loss(*(x + sign * nudge if i == k else x for k, x in enumerate(at))) for sign in (1, -1)]
            np.testing.assert_allclose(gradient[j], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_padding_is_out_of_reach():
    """NaN in padded scores, and in senders that no real edge names, reaches neither outputs nor gradients."""
    query, key, value, scores = inputs()
    poisoned = scores.at[~REAL].set(jnp.nan)
    (*clean, gradient), (*dirty, poisoned_gradient) = (with_gradients(ours)(query, key, value, s) for s in (scores, poisoned))
    assert_close(dirty, clean, 0)
    assert_close([poisoned_gradient], [gradient], 0)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~REAL].any()


def test_complete_graph_is_dense_attention():
    random = np.random.default_rng(1)
    q, k, v = (jnp.asarray(random.normal(size=(6, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    senders, receivers, mask, _ = dense_to_edges(jnp.ones((6, 6)))
    complete = jax.jit(functools.partial(edge_attention, dropout_rate=0.4))
    key = jax.random.key(3)
    expected = jax.nn.dot_product_attention(q[None], k[None], v[None])[0]
    np.testing.assert_allclose(jax.jit(edge_attention)(q, k, v, senders, receivers, edge_mask=mask), expected, rtol=1e-5, atol=1e-6)
    dropped = complete(q, k, v, senders, receivers, edge_mask=mask, dropout_key=key)
    expected = attnx.attention(q[None], k[None], v[None], dropout_rate=0.4, dropout_key=key)[0]
    np.testing.assert_allclose(dropped, expected, rtol=1e-5, atol=1e-6)
    assert abs(dropped - complete(q, k, v, senders, receivers, edge_mask=mask, dropout_key=jax.random.key(4))).max() > 0.1


def test_relabelling_nodes_and_edges():
    query, key, value, scores = inputs()
    random = np.random.default_rng(2)
    nodes, others, edges = (random.permutation(n) for n in (NODES, OTHERS, len(SENDERS)))
    place, other = np.append(np.argsort(nodes), [NODES, -1]), np.append(np.argsort(others), [OTHERS, -1])
    relabelled = jax.jit(functools.partial(edge_attention, dropout_rate=0.0))(
        query[nodes], key[others], value[others], other[SENDERS[edges]], place[RECEIVERS[edges]], edge_mask=jnp.asarray(MASK[edges]),
        edge_scores=scores[edges])
    np.testing.assert_allclose(relabelled, jax.jit(ours)(query, key, value, scores)[nodes], rtol=1e-5, atol=1e-6)


def test_self_loops():
    """Every node sees itself once, whether or not the list had loops; alone it returns its own value."""
    x = inputs()[0]
    senders, receivers = np.array([0, 3, 1, -1]), np.array([1, 3, 1, 2])
    looped = jax.jit(functools.partial(edge_attention, self_loops=True, return_weights=True))
    out, weights = looped(x, x, x, senders, receivers)
    by_hand = np.concatenate([[0], np.arange(NODES)]), np.concatenate([[1], np.arange(NODES)])
    np.testing.assert_allclose(out, jax.jit(edge_attention)(x, x, x, *by_hand), rtol=1e-6)
    np.testing.assert_array_equal(out[jnp.array([0, 2, 3])], x[jnp.array([0, 2, 3])])
    assert weights.shape == (4 + NODES, HEADS) and not np.asarray(weights[1:4]).any()
    np.testing.assert_allclose(weights.sum(0), NODES, rtol=1e-6)


def test_features_of_self_loops():
    features = jnp.array([[1.0], [3.0], [50.0], [jnp.nan]])
    edges = add_self_loops(np.array([0, 2, 1, -1]), np.array([1, 1, 1, 0]), 3, features=features, fill="mean")
    assert edges.mask.tolist() == [True, True, False, False, True, True, True]
    assert edges.features[4:, 0].tolist() == [0.0, 2.0, 0.0]  # the mean of what comes in, old loops aside
    assert add_self_loops(np.array([0]), np.array([1]), 2, features=features[:1], fill=7.0).features[1:, 0].tolist() == [7.0, 7.0]


def test_given_scores():
    """A GAT layer: scores of the layer's own making; weights returned; out of range as ever."""
    random = np.random.default_rng(3)
    z, a, b = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((5, 2, 3), (2, 3), (2, 3)))
    adjacency = random.random((5, 5)) < 0.4
    adjacency[2] = False
    senders, receivers, mask, _ = dense_to_edges(jnp.asarray(adjacency), size=25)

    @jax.jit
    def layer(z):
        left, right = jnp.einsum("vnh,nh->vn", z, a), jnp.einsum("vnh,nh->vn", z, b)
        scores = jax.nn.leaky_relu(left[senders] + right[receivers], 0.2)
        return attend_edges(scores, z, senders, receivers, 5, edge_mask=mask, return_weights=True)

    out, weights = layer(z)
    left, right = np.einsum("vnh,nh->vn", z, a), np.einsum("vnh,nh->vn", z, b)
    dense = np.asarray(jax.nn.leaky_relu(left[None] + right[:, None], 0.2))
    e = np.exp(dense) * adjacency[..., None]
    w = e / np.maximum(e.sum(1, keepdims=True), 1e-30)
    np.testing.assert_allclose(out, np.einsum("ijn,jnh->inh", w, z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights[: adjacency.sum()], w[adjacency], rtol=1e-5)
    assert not np.asarray(weights[adjacency.sum() :]).any()


def test_softmax_is_stable():
    scores = jnp.array([1e4, 1e4 - 1, -1e4, -jnp.inf, 3.0, -jnp.inf, 0.0])
    ids = jnp.array([0, 0, 0, 0, 1, 2, 9])

    @jax.jit
    def both(scores):
        w = segment_softmax(scores, ids, 3)
        return w, jax.grad(lambda s: jnp.sum(segment_softmax(s, ids, 3) * jnp.arange(7.0)))(scores)

    w, gradient = both(scores)
    np.testing.assert_allclose(w, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0, 0, 1, 0, 0], rtol=1e-6)
    p = 1 / (1 + np.exp(-1)) / (1 + np.exp(1))
    np.testing.assert_allclose(gradient, [-p, p, 0, 0, 0, 0, 0], rtol=1e-5)
    assert segment_softmax(scores.astype(jnp.bfloat16), ids, 3).dtype == jnp.bfloat16


def test_segment_reductions():
    random = np.random.default_rng(4)
    data, ids = jnp.asarray(random.normal(size=(9, 2)), jnp.float32), np.array([0, 3, 3, -1, 4, 0, 3, 5, 1])
    mask = np.arange(9) < 8
    rows = [np.flatnonzero((ids == i) & mask) for i in range(5)]
    for function, numpy in ((segment_sum, np.sum), (segment_mean, np.mean), (segment_max, np.max)):
        reduce = functools.partial(function, segment_ids=ids, num_segments=5, mask=jnp.asarray(mask))
        y, pull = jax.vjp(jax.jit(reduce), data.at[3].set(jnp.nan))
        gradient, = pull(2 * jnp.ones((5, 2)))
        expected = np.stack([numpy(np.asarray(data)[r], axis=0) if len(r) else np.zeros(2) for r in rows])
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[[3, 7, 8]].any()
        np.testing.assert_allclose(gradient.sum(), 2 * 2 * {np.sum: 6}.get(numpy, 3), rtol=1e-6)
    assert degree(ids, 5, mask=jnp.asarray(mask)).tolist() == [2, 0, 0, 3, 1]
    assert segment_sum(jnp.full(300, 1, jnp.bfloat16), np.zeros(300, int), 1)[0] == 300  # a bfloat16 sum would stop at 256
    assert segment_sum(np.array([2, 3]), np.array([1, 1]), 2).tolist() == [0, 5]


def test_dtypes_and_vmap():
    arrays = inputs()
    half = jax.jit(ours)(*(a.astype(jnp.bfloat16) for a in arrays))
    exact = jax.jit(ours)(*arrays)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.05)
    mapped = jax.jit(jax.vmap(ours))(*(jnp.stack([a, 2 * a]) for a in arrays))
    np.testing.assert_allclose(mapped[0], exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mapped[1], jax.jit(ours)(*(2 * a for a in arrays)), rtol=1e-5, atol=1e-6)


def test_adjacency_matrices():
    matrix = np.array([[0, 2, 0], [0, 0, 0], [3, 0, 4]])
    edges = jax.jit(functools.partial(dense_to_edges, size=5))(matrix)
    back = np.zeros((3, 3), int)
    back[edges.receivers[edges.mask], edges.senders[edges.mask]] = edges.features[edges.mask]
    assert (back == matrix).all() and edges.senders.tolist() == [1, 0, 2, -1, -1]
    with pytest.raises(ValueError, match="size: expected at least the number of edges, 3, got 2"):
        dense_to_edges(jnp.asarray(matrix), size=2)


def test_nothing_to_do():
    query, key, value, _ = inputs()
    none = np.zeros(0, int)
    assert not np.asarray(edge_attention(query, key, value, none, none)).any()
    assert edge_attention(query[:0], key, value, np.array([0]), np.array([-1])).shape == (0, HEADS, 2)
    assert not np.asarray(edge_attention(query, key[:0], value[:0], np.array([-1]), np.array([0]))).any()
    assert segment_softmax(jnp.ones(2), np.array([-1, -1]), 0).tolist() == [0, 0]


Q, E = jnp.ones((3, 2, 4)), jnp.array([0, 1])


@pytest.mark.parametrize("call, error, words", [
    (lambda: edge_attention(Q[0], Q, Q, E, E), ValueError, r"query: expected float32 .* of shape \[nodes, heads, size\]"),
    (lambda: edge_attention(Q, Q[:, :, :3], Q, E, E), ValueError, r"key: expected shape \[U, K, H\] with H = 4"),
    (lambda: edge_attention(Q, Q, Q[:2], E, E), ValueError, r"value: expected shape \[3, 2, Hv\] as key"),
    (lambda: edge_attention(Q, Q, Q, E, E[:1]), ValueError, r"receivers: expected shape \[2\]"),
    (lambda: edge_attention(Q, Q, Q, E * 1.0, E), TypeError, r"senders: expected integers"),
    (lambda: edge_attention(Q, Q, Q, E, E, edge_mask=E), ValueError, r"edge_mask: expected bool\[2\]"),
    (lambda: edge_attention(Q, Q, Q, E, E, edge_scores=jnp.ones(2)), ValueError, r"edge_scores: expected shape \[2, 2\] or \[2, 1\]"),
    (lambda: edge_attention(Q, Q[:2], Q[:2], E, E, self_loops=True), ValueError, r"self_loops: expected as many keys as queries, 3"),
    (lambda: edge_attention(Q, Q, Q, E, E, dropout_rate=0.1), ValueError, r"dropout_key"),
    (lambda: edge_attention(Q, Q, Q, E, E, weights="softmax"), TypeError, r"weights: expected weights"),
    (lambda: edge_attention(Q, Q, Q, E, E, weights=attnx.weights.entmax15()), NotImplementedError, r"weights: Entmax solves an equation"),
    (lambda: attend_edges(jnp.ones((2, 3)), Q, E, E, 3), ValueError, r"scores: expected shape \[E, N\] with N a multiple of the 2 heads"),
    (lambda: segment_weights(jnp.ones(2), E, 3, attnx.weights.relu()), ValueError, r"scores: expected real numbers of shape \[E, N\]"),
    (lambda: dense_to_edges(jnp.ones(3)), ValueError, r"adjacency: expected shape \[V, U\]"),
])
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
