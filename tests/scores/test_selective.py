"""Selective attention: the penalties, an oracle, caches that forget, what memory costs, and how budgets are shared out."""

import importlib.util
import sys

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import attnx
from attnx import masks, scores
from attnx.nn.attention import SelfState

T, N = 13, 4


def inputs(dtype=jnp.float64, seed=0, kv_heads=2):
    return agreement.arrays(dtype, batch=2, queries=T, keys=T, heads=N, kv_heads=kv_heads, size=8, value_size=6, seed=seed)[:3]


attend = jax.jit(scores.selective_attention, static_argnames=("head", "block_size", "return_selection", "tau"))


def penalties(s0, bos=0):
    """[B, T, T], written out."""
    s0, penalty = np.asarray(s0), np.zeros(s0.shape)
    for i in range(s0.shape[1]):
        for j in range(s0.shape[2]):
            penalty[:, i, j] = sum(np.maximum(s0[:, m, j], 0) for m in range(i) if j < m and j != bos)
    return penalty


def test_penalty(x64):
    """The triple loop; nothing is held against the first token, nor up to i = j + 1; opinions add up."""
    s0 = jax.random.normal(jax.random.key(0), (2, T, T))
    penalty = scores.selection_penalty(s0)
    np.testing.assert_allclose(penalty, penalties(s0), atol=1e-12)
    i, j = jnp.mgrid[:T, :T]
    assert (penalty[:, i <= j + 1] == 0).all() and (penalty[:, :, 0] == 0).all() and (jnp.diff(penalty, axis=1) >= 0).all() and penalty.max() > 1
    np.testing.assert_allclose(scores.selection_penalty(s0[:, 5:])[:, :, 1:5], jnp.cumsum(jax.nn.relu(s0[:, 5:, 1:5]), 1) - jax.nn.relu(s0[:, 5:, 1:5]), atol=1e-12)


def dense(query, key, value, head=0):
    """With penalties by a matrix product, sharing nothing with the library."""
    s = oracles.dot_products(query, key)
    i, j = jnp.mgrid[:T, :T]
    opinions = jnp.where((j < i) & (j > 0), jax.nn.relu(s[:, head]), 0)
    penalty = jnp.einsum("im,bmj->bij", (j < i).astype(s.dtype), opinions)
    return oracles.attend(oracles.softmax, query, key, value, j <= i, lambda s: s - penalty[:, None])


def test_oracle(x64):
    """Forward and backward, through the penalties; in blocks; another head."""
    args = inputs()
    for head in (0, 3):
        got, expected = (jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(*args) for f in (
            lambda *a: scores.selective_attention(*a, head=head, block_size=4), lambda *a: dense(*a, head=head)))
        agreement.assert_agree(got, expected)


def test_no_opinion(x64):
    """Where no opinion is positive it is softmax attention, exactly."""
    query, key, value = inputs()
    key = jnp.abs(key)
    query = query.at[:, :, 0].set(-jnp.abs(query[:, :, 0]))
    np.testing.assert_allclose(attend(query, key, value), attnx.attention(query, key, value, mask=masks.causal()), atol=1e-12)


def test_peer(monkeypatch):
    """The scores of x-transformers."""
    found = importlib.util.find_spec("x_transformers")
    torch = pytest.importorskip("torch")
    if found is None:
        pytest.skip("x_transformers is not installed")
    spec = importlib.util.spec_from_file_location("peer", found.submodule_search_locations[0] + "/attend.py")
    peer = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peer", peer)
    spec.loader.exec_module(peer)
    s = np.array(jax.random.normal(jax.random.key(0), (2, N, T, T)))
    visible = np.tril(np.ones((T, T), bool))
    theirs = peer.selective_attn(torch.tensor(np.where(visible, s, -1e9))).numpy()
    ours = s - scores.selection_penalty(jnp.asarray(s[:, 0]))[:, None]
    np.testing.assert_allclose(ours[..., visible], theirs[..., visible], atol=1e-5)


def test_documents_and_padding(x64):
    """Packed documents are as if they were apart, and their first tokens are spared; padding before a sequence changes nothing."""
    args = inputs()
    ids = jnp.broadcast_to(jnp.arange(T) >= 6, (2, T)).astype(jnp.int32)
    positions = jnp.where(jnp.arange(T) < 6, -1, jnp.arange(T) - 6)
    second = attend(*(x[:, 6:] for x in args))
    for options in (dict(segment_ids=ids), dict(query_positions=positions, key_positions=positions)):
        np.testing.assert_allclose(attend(*args, block_size=4, **options)[:, 6:], second, atol=1e-12)


def test_continued(x64):
    """A sequence in two calls: what was held against keys is handed on."""
    query, key, value = inputs()
    whole, all_of_it = attend(query, key, value, return_selection=True)
    first, found = attend(query[:, :5], key[:, :5], value[:, :5], return_selection=True)
    known = jnp.pad(found.penalty, ((0, 0), (0, T - 5)))
    second, after = attend(query[:, 5:], key, value, penalty=known, return_selection=True)
    agreement.assert_agree([jnp.concatenate([first, second], 1), after.penalty, after.memory], [whole, all_of_it.penalty, all_of_it.memory[:, 5:]], 1e-12)


def pruned(query, key, value, budget):
    """Token by token with lists, forgetting one key whenever there are too many."""
    out = []
    for b in range(len(query)):
        kept, held, rows = [], {}, []
        for i in range(T):
            if len(kept) == budget:
                kept.remove(max(kept, key=lambda j: (held[j], -j)))
            kept.append(i)
            held[i] = 0.0
            s = oracles.dot_products(query[b:b + 1, i:i + 1], key[b:b + 1, np.array(kept)])[0, :, 0]
            w = jax.nn.softmax(s - np.array([held[j] for j in kept]), axis=-1)
            rows.append(np.einsum("ns,snv->nv", w, np.repeat(value[b, np.array(kept)], 2, axis=1)))
            for j, opinion in zip(kept, np.asarray(s[0])):
                held[j] += max(opinion, 0) * (j != i and j != 0)
        out.append(rows)
    return np.array(out)


def stream(mechanism, query, key, value, pieces):
    def run(query, key, value):
        state = mechanism.init(2, T, 2, 8, 6, query.dtype)
        outs, counts = [], []
        for piece in np.split(np.arange(T), np.cumsum(pieces)[:-1]):
            state, out = mechanism.step(state, *(x[:, piece] for x in (query, key, value)))
            outs.append(out)
            counts.append((state.positions >= 0).sum(1))
        return jnp.concatenate(outs, axis=1), jnp.stack(counts), state

    return jax.jit(run)(query, key, value)


def test_pruning(x64):
    """A cache of K keys is what lists make of it, in steps and prefills; one as long as the sequence forgets nothing."""
    args = inputs()
    np.testing.assert_allclose(stream(scores.SelectiveMechanism(budget=T), *args, [5, 1, 7])[0], attend(*args), atol=1e-12)
    out, counts, state = stream(scores.SelectiveMechanism(budget=4), *args, [6, 1, 6])
    np.testing.assert_allclose(out, pruned(*args, 4), atol=1e-12)
    assert (counts == 4).all() and state.key.shape[1] == 4


def test_eviction():
    """Those go that most is held against, the oldest among equals; a key with 1e4 against it is not missed."""
    mechanism = scores.SelectiveMechanism()
    step = jax.jit(mechanism.step)
    query, key, value = inputs(jnp.float32)
    state, _ = step(mechanism.init(2, T, 2, 8, 6, jnp.float32), query[:, :8], key[:, :8], value[:, :8])
    equal = state._replace(penalty=0 * state.penalty)
    assert scores.prune_cache(equal, 3).positions[0].tolist() == [-1] * 5 + [5, 6, 7] + [-1] * 5
    assert (scores.prune_cache(state, jnp.int32(8)).positions == state.positions).all()
    state = state._replace(penalty=state.penalty.at[:, 2].set(1e4))
    without = scores.prune_cache(state, 7)
    assert (without.positions[:, 2] == -1).all() and ((without.positions >= 0).sum(1) == 7).all()
    after = [step(s, query[:, 8:9], key[:, 8:9], value[:, 8:9])[1] for s in (state, without)]
    np.testing.assert_allclose(*after, atol=1e-6)


def test_state_is_bounded():
    """With a budget the state is as large for any length."""
    layer = scores.SelectiveAttention(16, 4, budget=8, rngs=nnx.Rngs(0))
    sizes = [sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: layer.init_state(1, length)))) for length in (100, 1000)]
    assert sizes[0] == sizes[1]


def test_memory():
    """Nothing forgotten costs all keys, everything forgotten none; a call tells the same and a layer can be trained by it."""
    assert scores.memory_loss(jnp.zeros((2, T, T))).tolist() == [T, T]
    assert scores.memory_loss(jnp.full((T, T), 3.0), tau=2.0) == 0
    query, key, value = inputs(jnp.float32)
    penalty = scores.selection_penalty(oracles.dot_products(query, key)[:, 0])
    found = attend(query, key, value, tau=0.7, block_size=4, return_selection=True)[1]
    np.testing.assert_allclose(found.memory.max(-1), scores.memory_loss(penalty, tau=0.7), rtol=1e-5)
    layer = scores.SelectiveAttention(16, 4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (2, T, 16))
    slopes = jax.jit(jax.grad(lambda params: nnx.merge(graph, params).selection(x).memory.max(-1).sum()))(params)
    assert jnp.any(slopes["query"]["kernel"][...] != 0) and jnp.all(slopes["value"]["kernel"][...] == 0)


def test_budgets():
    """Greedy: the layer that can do best without, again and again; the other once that one has no more to give."""
    asked = []
    loss = lambda budgets: asked.append(budgets) or 10 * (16 - budgets[0]) + (16 - budgets[1])
    path = scores.allocate_budgets(loss, 2, 16, step=6, least=4)
    assert path == [((16, 16), 0), ((16, 10), 6), ((16, 4), 12), ((10, 4), 72), ((4, 4), 132)] and len(asked) == 7
    assert scores.allocate_budgets(loss, 2, 16, step=6, until=lambda budgets, loss: loss > 5)[-1] == ((16, 10), 6)


def test_layer():
    """Prefill and steps find what the call finds, with and without a budget that is enough; no parameters are added."""
    for options in ({}, dict(budget=9)):
        layer = scores.SelectiveAttention(16, 4, num_kv_heads=2, rngs=nnx.Rngs(0), **options)

        @nnx.jit
        def both(layer, x):
            state = layer.init_state(2, 9)
            assert isinstance(state, SelfState)
            state, first = layer.step(state, x[:, :6])
            return jnp.concatenate([first, layer.step(state, x[:, 6:])[1]], axis=1), layer(x)

        np.testing.assert_allclose(*both(layer, 2 * jax.random.normal(jax.random.key(0), (2, 9, 16))), atol=2e-6)
    plain = attnx.nn.Attention(16, 4, num_kv_heads=2, mechanism=attnx.pairs(), rngs=nnx.Rngs(0))
    assert jax.tree.map(jnp.shape, nnx.state(plain)) == jax.tree.map(jnp.shape, nnx.state(layer))


@pytest.mark.usefixtures("optimised")
def test_linear_memory():
    """Temporary bytes of blocks of queries, gradients included, are those of a block of rows and little besides."""
    def temporary(length, implementation):
        x = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        loss = lambda q, k, v: scores.selective_attention(q, k, v, implementation=implementation).sum()
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporary(length, "blockwise") for length in (1024, 2048, 4096)]
    growth = np.diff(sizes)
    assert growth[1] < 2.3 * growth[0] and 6 * sizes[-1] < temporary(4096, "reference"), sizes


def test_errors():
    """Wrong arguments are named."""
    query, key, value = inputs(jnp.float32)
    for match, change in (("head: expected", dict(head=4)), ("query: expected at most", dict(key=key[:, 1:], value=value[:, 1:])), ("tau: expected", dict(tau=0.0)),
                          ("segment_ids: expected shape", dict(segment_ids=jnp.zeros((2, 3), int))), ("penalty: expected shape", dict(penalty=jnp.zeros(3))),
                          ("implementation: expected", dict(implementation="pallas"))):
        with pytest.raises(ValueError, match=match):
            scores.selective_attention(**{**dict(query=query, key=key, value=value), **change})
    with pytest.raises(ValueError, match="key: expected the query's"):
        scores.SelectiveMechanism()(query[:, 1:], key, value)
