"""Graph attention: another implementation, what distinguishes static from dynamic scores, padding, and the dense form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import graph
from attnx.core import edges

V, E, N, H, F = 6, 20, 2, 3, 4
attend = jax.jit(graph.graph_attention, static_argnames=("kind", "self_loops", "slope", "return_weights"))


def arrays(seed=0):
    """Query, key, vectors [3, N, H], edge features, senders, receivers; several loops and equal edges among these."""
    keys = jax.random.split(jax.random.key(seed), 6)
    normal = [jax.random.normal(key, shape, float) for key, shape in zip(keys, [(V, N, H), (V, N, H), (3, N, H), (E, N, H)])]
    return (*normal, *(jax.random.randint(key, (E,), 0, V) for key in keys[4:]))


@pytest.mark.parametrize(("kind", "edge_size", "shared"), [("gatv2", None, False), ("gatv2", 5, True), ("gat", None, True), ("gat", 5, True)])
def test_peer(kind, edge_size, shared):
    """PyTorch Geometric's layers find the same with the same weights, self loops and edge features included."""
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("torch_geometric.nn")
    options = dict(heads=N, edge_dim=edge_size, add_self_loops=True, fill_value="mean")
    torch.manual_seed(0)
    peer = peers.GATv2Conv(F, H, share_weights=shared, **options) if kind == "gatv2" else peers.GATConv(F, H, **options)
    layer = graph.GraphAttention(F, N, head_size=H, kind=kind, edge_size=edge_size, share_weights=shared, rngs=nnx.Rngs(0))
    give = lambda module, linear: (module.kernel.set_value(_numpy(linear.weight).T.reshape(-1, N, H)),
                                   None if linear.bias is None else module.bias.set_value(_numpy(linear.bias).reshape(N, H)))
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if kind == "gatv2":
        give(layer.key, peer.lin_l)
        if not shared:
            give(layer.query, peer.lin_r)
        layer.vector.set_value(_numpy(peer.att)[0])
    else:
        give(layer.key, peer.lin)
        layer.vector.set_value(np.concatenate([_numpy(a) for a in (peer.att_dst, peer.att_src, peer.att_edge) if a is not None]))
    if edge_size:
        give(layer.edge, peer.lin_edge)
    layer.bias.set_value(_numpy(peer.bias))
    *_, senders, receivers = arrays()
    x, features = np.random.default_rng(0).normal(size=(V, F)).astype(np.float32), np.random.default_rng(1).normal(size=(E, 5)).astype(np.float32)
    given = {} if edge_size is None else {"edge_features": jnp.asarray(features)}
    got = layer(jnp.asarray(x), senders, receivers, **given)
    index = torch.tensor(np.stack([senders, receivers]), dtype=torch.long)
    expected = peer(torch.tensor(x), index, *([torch.tensor(features)] if edge_size else []))
    np.testing.assert_allclose(got, _numpy(expected), atol=1e-5)


def _numpy(tensor):
    return tensor.detach().numpy()


def scores_of_all(score, query, key, vector):
    """[N, V, U]: the complete graph."""
    receivers, senders = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(V), jnp.arange(V), indexing="ij"))
    return score(query, key, senders, receivers, vector).reshape(V, V, N).transpose(2, 0, 1)


def test_static_and_dynamic(x64):
    """GAT ranks keys alike for all queries, GATv2 does not; on a sparse graph only shared neighbours count."""
    query, key, vectors, *_ = arrays()
    query = 3 * query
    static, dynamic = scores_of_all(graph.gat_scores, query, key, vectors[:2]), scores_of_all(graph.gatv2_scores, query, key, vectors[0])
    assert graph.ranking_is_static(static).all() and not graph.ranking_is_static(dynamic).any()
    assert graph.ranking_is_static(dynamic, jnp.eye(V, dtype=bool)).all()


def test_linear_scores(x64):
    """Without the non-linearity both have the same scores, and weights that do not depend on the receiver."""
    query, key, vectors, *_ = arrays()
    linear = partial(scores_of_all, query=query, key=key)
    dynamic = linear(partial(graph.gatv2_scores, slope=1.0), vector=vectors[0])
    np.testing.assert_allclose(dynamic, linear(partial(graph.gat_scores, slope=1.0), vector=vectors[jnp.array([0, 0])]), atol=1e-12)
    weights = jax.nn.softmax(dynamic, axis=-1)
    np.testing.assert_allclose(weights, jnp.broadcast_to(weights[:, :1], weights.shape), atol=1e-12)


@pytest.mark.parametrize("kind", ["gatv2", "gat", "dpgat"])
def test_dense(x64, kind):
    """The edges of a random adjacency and the pairs that it allows, forward and backward; a node without neighbours gets zeros."""
    query, key, vectors, *_ = arrays()
    vector = {"gatv2": vectors[0], "gat": vectors[:2], "dpgat": None}[kind]
    adjacency = jax.random.bernoulli(jax.random.key(4), 0.4, (V, V)).at[2].set(False)
    senders, receivers, mask, _ = edges.dense_to_edges(adjacency)
    sparse = lambda query, key, vector: attend(query, key, senders, receivers, vector, kind=kind, edge_mask=mask)
    dense = lambda query, key, vector: graph.dense_graph_attention(query[None], key[None], adjacency, vector, kind=kind)[0]
    results = [jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1)))(query, key, vector) for f in (sparse, dense)]
    for got, expected in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(got, expected, atol=1e-12)
    assert not sparse(query, key, vector)[2].any()


def test_edges(x64):
    """Padding has weight zero whatever it holds, equal edges count each, weights of a receiver sum to one, and loops are there once."""
    query, key, vectors, features, senders, receivers = arrays()
    vector = vectors[0]
    out, weights = attend(query, key, senders, receivers, vector, edge_features=features, return_weights=True)
    assert np.allclose(jax.ops.segment_sum(weights, receivers, V)[jnp.unique(receivers)], 1)
    real = jnp.arange(E + 2) < E
    pad = lambda x, value: jnp.concatenate([x, jnp.full((2, *x.shape[1:]), value, x.dtype)])
    padded = attend(query, key, pad(senders, V - 1), pad(receivers, V - 1), vector, edge_features=pad(features, jnp.nan), edge_mask=real,
                    return_weights=True)
    np.testing.assert_allclose(padded[0], out, atol=1e-12)
    assert not padded[1][E:].any()
    slope = jax.grad(lambda vector, padding: attend(query, key, pad(senders, V - 1), pad(receivers, V - 1), vector, edge_features=pad(features, padding),
                                                    edge_mask=real).sum())
    np.testing.assert_allclose(slope(vector, jnp.nan), slope(vector, 0.0), atol=1e-12)
    twice = lambda x: jnp.concatenate([x, x[:1]])
    _, doubled = attend(query, key, twice(senders), twice(receivers), vector, edge_features=twice(features), return_weights=True)
    np.testing.assert_allclose(doubled[0], doubled[E])
    assert (doubled[0] < weights[0]).all() and (doubled[0] > weights[0] / 2 - 1e-12).all()
    looped = lambda s, r, f: attend(query, key, s, r, vector, edge_features=f, self_loops=True)
    nodes, other = jnp.arange(V), senders != receivers
    assert other.sum() < E, "the graph must have a loop"
    apart = edges.segment_mean(features, receivers, V, mask=other)
    by_hand = attend(query, key, jnp.concatenate([senders, nodes]), jnp.concatenate([receivers, nodes]), vector,
                     edge_features=jnp.concatenate([features, apart]), edge_mask=jnp.concatenate([other, jnp.ones(V, bool)]))
    np.testing.assert_allclose(looped(senders, receivers, features), by_hand, atol=1e-12)


def test_layer_options():
    """Averaged heads, another side of a bipartite graph, and dropout that has the right mean."""
    x, context = jnp.ones((V, F)), jax.random.normal(jax.random.key(0), (9, 5))
    senders, receivers = jnp.arange(9), jnp.arange(9) % V
    layer = graph.GraphAttention(F, N, head_size=H, kind="dpgat", concat=False, self_loops=False, context_features=5, dropout_rate=0.5, rngs=nnx.Rngs(0))
    out = layer(x, senders, receivers, context=context)
    assert out.shape == (V, H)
    dropped = jax.vmap(lambda key: layer(x, senders, receivers, context=context, dropout_key=key))(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(dropped.mean(0), out, atol=0.15)
    assert dropped.std(0).max() > 0.1


def test_refusals():
    """Shapes and options that do not fit, named."""
    x, ids = jnp.ones((V, N, H)), jnp.arange(3)
    with pytest.raises(ValueError, match="vector: expected shape"):
        graph.graph_attention(x, x, ids, ids, jnp.ones((N, H + 1)))
    with pytest.raises(ValueError, match="edge_features: expected shape"):
        graph.graph_attention(x, x, ids, ids, x[0], edge_features=jnp.ones((2, N, H)))
    with pytest.raises(ValueError, match="takes neither"):
        graph.graph_attention(x, x, ids, ids, x[0], kind="dpgat")
    with pytest.raises(ValueError, match="self_loops: expected as many keys"):
        graph.graph_attention(x, x[:2], ids, ids, x[0], self_loops=True)
    with pytest.raises(ValueError, match="edge_features: expected None"):
        graph.GraphAttention(F, rngs=nnx.Rngs(0))(jnp.ones((V, F)), ids, ids, edge_features=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="vector: expected"):
        graph.dense_graph_attention(x[None], x[None], None, kind="gat")
