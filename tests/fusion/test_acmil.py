"""Attention-challenging pooling: gated attention of one branch, what masking does to weights, the diversity loss, padding, and both models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import fusion

B, S, L, A, M = 2, 20, 6, 5, 3
H = jax.random.normal(jax.random.key(0), (B, S, L))
V, U, W = (jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(1), 3), ((L, A), (L, A), (A, M))))
SCORES = fusion.gated_mil_scores(H, V, U, W)
HERE = jnp.arange(S) < jnp.array([[20], [7]])
mask_top = jax.jit(fusion.mask_top_instances, static_argnames=("top", "share"))


def test_gated_scores():
    """One branch is gated attention pooling written out."""
    one = fusion.gated_mil_scores(H, V, U, W[:, :1], value_bias=jnp.ones(A), gate_bias=-jnp.ones(A), bias=jnp.ones(1))
    expected = (np.tanh(H @ V + 1) / (1 + np.exp(-(H @ U - 1)))) @ W[:, 0] + 1
    np.testing.assert_allclose(one[:, 0], expected, atol=1e-5)
    pooled = fusion.branch_pool(H, one)
    e = np.exp(expected)
    np.testing.assert_allclose(pooled.bag, np.einsum("bs,bsl->bl", e / e.sum(1, keepdims=True), H), atol=1e-5)
    np.testing.assert_allclose(pooled.bag, pooled.branches[:, 0], atol=1e-6)


@pytest.mark.parametrize(("top", "share", "size"), [(10, 0.6, 20), (10, 0.7, 20), (10, 0.6, 7), (3, 1.0, 20), (0, 0.6, 20), (10, 0.0, 20)])
def test_masking(top, share, size):
    """Exactly int(min(K, N) p) instances of the top K are masked; their weights are zero and the others grow in proportion."""
    scores = SCORES[..., :size]
    masked = mask_top(scores, jax.random.key(2), top=top, share=share)
    hidden = np.asarray(masked < -1e8)
    assert (hidden.sum(-1) == int(min(top, size) * share)).all()
    rank = np.argsort(np.argsort(-np.asarray(scores), axis=-1), axis=-1)
    assert (rank[hidden] < top).all()
    before, after = (jax.nn.softmax(x) for x in (scores, masked))
    lost = jnp.sum(before, axis=-1, where=hidden, keepdims=True)
    np.testing.assert_allclose(after, jnp.where(hidden, 0, before / (1 - lost)), atol=1e-6)
    assert (np.asarray(after)[hidden] == 0).all()


def test_masking_is_random():
    """Over keys the mean weights are those of all choices alike."""
    scores = jnp.array([1.5, 0.5, 0.0, -0.5])
    masked = jax.jit(jax.vmap(lambda key: jax.nn.softmax(fusion.mask_top_instances(scores, key, top=3, share=0.34))))(jax.random.split(jax.random.key(3), 2000))
    choices = np.stack([np.asarray(jax.nn.softmax(scores.at[i].set(-jnp.inf))) for i in range(3)])
    error = 3 * choices.std(0) / np.sqrt(2000)
    assert (np.abs(masked.mean(0) - choices.mean(0)) <= error + 1e-6).all()
    assert len(np.unique(np.asarray(masked[:50]) == 0, axis=0)) == 3


def test_masking_ignores_padding():
    """Instances that are not there are not among the top, and do not count for how many are masked."""
    loud = jnp.where(HERE[:, None], SCORES, 100.0)
    masked = mask_top(loud, jax.random.key(2), top=10, share=0.6, mask=HERE[:, None])
    hidden = np.asarray(masked < -1e8)
    assert not hidden[1, :, 7:].any() and (hidden[0].sum(-1) == 6).all() and (hidden[1].sum(-1) == 4).all()


def test_all_masked():
    """Where all of a bag is masked the weights are even, and gradients finite."""
    def pool(scores):
        return fusion.branch_pool(H[:, :5], fusion.mask_top_instances(scores, jax.random.key(0), top=10, share=1.0))

    np.testing.assert_allclose(pool(SCORES[..., :5]).weights, 0.2, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda scores: pool(scores).bag.sum())(SCORES[..., :5])).all()


def test_diversity():
    """1 for equal branches, 0 for disjoint ones, the mean cosine of pairs otherwise, 0 for one; finite where a branch has no weights."""
    eye, w = jnp.eye(4)[:3], jax.nn.softmax(2 * SCORES)
    assert fusion.branch_diversity_loss(eye) == 0 and fusion.branch_diversity_loss(w[:, :1]) == 0
    np.testing.assert_allclose(fusion.branch_diversity_loss(jnp.broadcast_to(w[:, :1], w.shape)), 1, rtol=1e-6)
    cosine = lambda a, b: (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    pairs = [cosine(np.asarray(w[:, i]), np.asarray(w[:, j])) for i in range(M) for j in range(i)]
    np.testing.assert_allclose(fusion.branch_diversity_loss(w), np.mean(pairs), rtol=1e-5)
    assert np.isfinite(jax.grad(fusion.branch_diversity_loss)(w.at[0].set(0))).all()


@pytest.mark.parametrize("kind", [fusion.ACMIL, fusion.MultiHeadACMIL])
def test_models(kind):
    """The order of instances does not matter, padding neither; masking is for training alone, and trains every parameter."""
    options = dict(num_heads=2) if kind is fusion.MultiHeadACMIL else {}
    model = kind(L, 4, features=8, branches=M, top=5, rngs=nnx.Rngs(0), **options)
    if kind is fusion.MultiHeadACMIL:
        model.queries.set_value(jax.random.normal(jax.random.key(8), (M, 8)))
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, x, mask, key=None: nnx.merge(graph, params)(x, mask=mask, key=key))
    out = run(params, H, HERE)
    order = jax.random.permutation(jax.random.key(4), S)
    moved = run(params, H[:, order], HERE[:, order])
    np.testing.assert_allclose(moved.logits, out.logits, atol=1e-5)
    np.testing.assert_allclose(moved.weights, out.weights[..., order], atol=1e-6)
    short = model(H[1:, :7])
    for a, b in ((out.logits, short.logits), (out.branch_logits, short.branch_logits)):
        np.testing.assert_allclose(a[1:], b, atol=1e-5)
    assert (out.weights[1, ..., 7:] == 0).all()
    np.testing.assert_allclose(out.bag_weights.sum(-1), 1, rtol=1e-5)
    labels = jnp.array([0, 3])
    loss, slopes = jax.jit(jax.value_and_grad(lambda params: fusion.acmil_loss(nnx.merge(graph, params)(H, mask=HERE, key=jax.random.key(5)), labels)))(params)
    unseen = {"bias"} if kind is fusion.ACMIL else {"key_bias"}  # a shift of all scores of a branch
    for path, slope in jax.tree.leaves_with_path(slopes):
        named = path[0].key if kind is fusion.MultiHeadACMIL else path[-2].key if path[0].key == "attention" else ""
        assert np.isfinite(slope).all() and (jnp.any(jnp.abs(slope) > 1e-8) or named in unseen)
    train = [run(params, H, HERE, jax.random.key(seed)).weights for seed in (5, 6)]
    assert ((train[0] == 0) & HERE[:, None if train[0].ndim == 3 else np.newaxis][(...,) if train[0].ndim == 3 else (slice(None), None)]).any()
    assert jnp.any(train[0] != train[1])
    empty = run(params, H, HERE & False)
    assert np.isfinite(empty.logits).all() and not np.any(empty.weights)


def test_one_branch():
    """One branch without masking is gated attention: its loss is the bag's alone."""
    model = fusion.ACMIL(L, 4, features=8, branches=1, share=0.0, rngs=nnx.Rngs(0))
    out, labels = model(H, key=jax.random.key(0)), jnp.array([0, 3])
    np.testing.assert_allclose(out.logits, model(H).logits)
    np.testing.assert_allclose(fusion.acmil_loss(out, labels), -jnp.mean(jax.nn.log_softmax(out.logits)[jnp.arange(2), labels]), rtol=1e-6)


def test_heads_written_out():
    """Multi-head branches with keys and values made for each, as the paper writes them."""
    model = fusion.MultiHeadACMIL(L, 4, features=8, num_heads=2, branches=M, rngs=nnx.Rngs(0))
    for name in ("queries", "query_bias", "key_bias", "value_bias", "out_bias"):
        param = getattr(model, name)
        param.set_value(jax.random.normal(jax.random.key(len(name)), param.shape))
    out, h = model(H), jax.nn.relu(model.reduce(H))
    project = lambda x, name, m: jnp.einsum("...l,lnh->...nh", x, getattr(model, f"{name}_kernel")[m]) + getattr(model, f"{name}_bias")[m]

    def norm(heads, m):
        y = jnp.einsum("bnh,nhl->bl", heads, model.out_kernel[m]) + model.out_bias[m]
        return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)

    maps = []
    for m in range(M):
        scores = jnp.einsum("nh,bsnh->bns", project(model.queries[m], "query", m), project(h, "key", m)) / 2
        maps.append(jax.nn.softmax(scores))
        np.testing.assert_allclose(out.weights[:, :, m], maps[-1], atol=1e-5)
        found = norm(jnp.einsum("bns,bsnh->bnh", maps[-1], project(h, "value", m)), m)
        np.testing.assert_allclose(out.branch_logits[:, m], found @ model.branch_heads.kernel[m] + model.branch_heads.bias[m], atol=1e-4)
    bag = norm(jnp.einsum("bns,bsnh->bnh", sum(maps) / M, project(h, "value", M)), M)
    np.testing.assert_allclose(out.logits, model.head(bag), atol=1e-4)


def test_errors():
    """Wrong arguments are named."""
    for match, call in (("share: expected", lambda: fusion.mask_top_instances(SCORES, jax.random.key(0), share=2.0)),
                        ("num_heads: expected", lambda: fusion.MultiHeadACMIL(4, 2, features=9, num_heads=2, rngs=nnx.Rngs(0))),
                        ("x: expected shape", lambda: fusion.ACMIL(4, 2, rngs=nnx.Rngs(0))(H))):
        with pytest.raises(ValueError, match=match):
            call()
