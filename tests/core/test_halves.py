"""row_statistics, apply, attend_scores, merge and attention_weights: identities, gradients, empty sides."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from agreement import arrays, assert_agree

import attnx
from attnx import masks, scores, weights

pytestmark = pytest.mark.usefixtures("x64")
T, S, N, K = 13, 11, 4, 2
ALLOWED = jnp.tril(jnp.ones((T, S), bool)).at[5].set(False)  # row 5 sees nothing
BLOCKS = {"reference": {}, "blockwise": dict(block_sizes=(4, 4))}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def grads(function, count):
    """Value and gradients of ``function(*arrays) -> (loss, results)``, compiled."""
    return jax.jit(jax.value_and_grad(function, argnums=tuple(range(count)), has_aux=True))


PARTS = {
    "softmax with a sink": lambda: dict(weights=weights.softmax(sink=normal(1, N)), scores=scores.alibi(4)),
    "softpick": lambda: dict(weights=weights.softpick()),
    "sigmoid": lambda: dict(weights=weights.sigmoid(-1.0)),
    "entmax-1.5": lambda: dict(weights=weights.entmax15()),
}


@pytest.mark.parametrize("name", PARTS)
def test_two_halves_make_a_whole(name):
    """apply(row_statistics) is attention, and its gradient through the statistics too."""
    query, key, value, cotangent = arrays()
    parts = dict(mask=masks.explicit(ALLOWED), **PARTS[name]())

    def halves(implementation, q, k, v):
        options = dict(implementation=implementation, **parts, **BLOCKS[implementation])
        return jnp.vdot(out := attnx.apply(q, k, v, attnx.row_statistics(q, k, **options), **options), cotangent), out

    def whole(q, k, v):
        return jnp.vdot(out := attnx.attention(q, k, v, implementation="reference", **parts), cotangent), out

    expected = grads(whole, 3)(query, key, value)
    for implementation in BLOCKS:
        assert_agree(grads(partial(halves, implementation), 3)(query, key, value), expected)


def test_row_statistics_of_softmax():
    """log sum exp and its gradient; -inf with zero gradients where nothing is allowed; the sink included."""
    query, key, _, cotangent = arrays()
    sink = normal(1, N)

    def ours(implementation, query, key, sink):
        run = partial(attnx.row_statistics, query, key, mask=masks.explicit(ALLOWED), implementation=implementation, **BLOCKS[implementation])
        bare, r = run(), run(weights=weights.softmax(sink=sink))
        return jnp.vdot(jnp.sin(r), cotangent[..., 0]) + jnp.vdot(jnp.sin(jnp.where(ALLOWED.any(1)[:, None], bare, 0)), cotangent[..., 1]), (bare, r)

    def formula(query, key, sink):
        s = oracles.dot_products(query, key)
        bare = jnp.where(ALLOWED.any(1), oracles.log_normaliser(s, ALLOWED | ~ALLOWED.any(1)[:, None]), -jnp.inf).transpose(0, 2, 1)
        r = jnp.log(jnp.exp(bare) + jnp.exp(sink))
        return jnp.vdot(jnp.sin(r), cotangent[..., 0]) + jnp.vdot(jnp.sin(jnp.where(ALLOWED.any(1)[:, None], bare, 0)), cotangent[..., 1]), (bare, r)

    expected = grads(formula, 3)(query, key, sink)
    for implementation in BLOCKS:
        assert_agree(grads(partial(ours, implementation), 3)(query, key, sink), expected, 1e-12)


@pytest.mark.parametrize("implementation", BLOCKS)
def test_statistics_from_elsewhere(implementation):
    """r of another mask: weights e^(s - r) that need not sum to 1, and the gradient of r itself."""
    query, key, value, cotangent = arrays()
    r = normal(2, 2, T, N).at[:, 3].set(-jnp.inf)  # a row that elsewhere saw nothing weighs nothing

    def ours(q, k, v, r):
        out = attnx.apply(q, k, v, r, mask=masks.causal(), implementation=implementation, **BLOCKS[implementation])
        return jnp.vdot(out, cotangent), out

    def formula(q, k, v, r):
        weigh = lambda s, ok: jnp.where(ok & jnp.isfinite(r).transpose(0, 2, 1)[..., None],
                                        jnp.exp(s - jnp.where(jnp.isfinite(r), r, 0).transpose(0, 2, 1)[..., None]), 0)
        return jnp.vdot(out := oracles.attend(weigh, q, k, v, jnp.tril(jnp.ones((T, S), bool))), cotangent), out

    assert_agree(grads(ours, 4)(query, key, value, r), grads(formula, 4)(query, key, value, r), 1e-12)


def test_column_sums():
    """The weight that each key receives is the gradient of the values' sum, and attention with one-hot values its share by group."""
    query, key, _, _ = arrays()
    ones = jnp.ones((2, S, K, 1))
    group = jnp.arange(S) // 4

    @jax.jit
    def run():
        attend = partial(attnx.attention, query, key, mask=masks.causal(), implementation="blockwise", block_sizes=(4, 4))
        received = jax.grad(lambda v: attend(v).sum())(ones)[..., 0]
        shares = attend(jnp.broadcast_to(jax.nn.one_hot(group, 3)[None, :, None], (2, S, K, 3)))
        return received, shares, attnx.attention_weights(query, key, mask=masks.causal())

    received, shares, w = run()
    assert_agree(received, w.reshape(2, K, N // K, T, S).sum((2, 3)).transpose(0, 2, 1), 1e-13)
    assert_agree(shares, jnp.einsum("bnts,sg->btng", w, jax.nn.one_hot(group, 3)), 1e-13)


@pytest.mark.parametrize("part", [weights.softmax(), weights.softpick()], ids=["softmax", "softpick"])
def test_merging_key_halves(part):
    """Branches over disjoint keys merge into one attention, residual and gradients included, in any order and grouping."""
    query, key, value, cotangent = arrays()
    cuts = (slice(0, 4), slice(4, 5), slice(5, S))

    def branch(q, k, v, cut):
        return attnx.attention(q, k[:, cut], v[:, cut], weights=part, mask=masks.causal(), key_positions=jnp.arange(S)[cut], return_residual=True,
                               implementation="reference")

    def loss(result):
        out, r = result
        return jnp.vdot(out, cotangent) + jnp.vdot(jnp.sin(r), cotangent[..., 0]), result

    def merged(q, k, v):
        a, b, c = (branch(q, k, v, cut) for cut in cuts)
        others = attnx.merge(a, attnx.merge(b, c)), attnx.merge(c, attnx.merge(b, a))
        value, result = loss(attnx.merge(attnx.merge(a, b), c))
        return value, (result, *others)

    whole = lambda q, k, v: loss(branch(q, k, v, slice(0, S)))
    (value_merged, results), gradients = grads(merged, 3)(query, key, value)
    (value_whole, result), expected = grads(whole, 3)(query, key, value)
    assert_agree([value_merged, *results, gradients], [value_whole, *[result] * 3, expected], 1e-12)


def test_merging_empty_sides():
    """An empty side changes nothing and gets no gradient; two of them stay empty."""
    out, r = normal(0, 2, 3), normal(1, 2)
    nothing = jnp.zeros((2, 3)), jnp.full(2, -jnp.inf)

    @jax.jit
    def run():
        merged = attnx.merge((out, r), nothing), attnx.merge(nothing, (out, r)), attnx.merge(nothing, nothing)
        loss = lambda a, b: sum(jnp.where(jnp.isfinite(x), x, 0).sum() for x in attnx.merge(a, b))
        return merged, jax.grad(loss, argnums=(0, 1))((out, r), nothing), jax.grad(loss, argnums=(0, 1))(nothing, nothing)

    (one, other, empty), (mine, theirs), gradients = run()
    assert_agree([one, other, empty], [(out, r), (out, r), nothing], 1e-15)
    assert_agree([mine, theirs], [(jnp.ones((2, 3)), jnp.ones(2)), (jnp.zeros((2, 3)), jnp.zeros(2))], 1e-15)
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))


def test_merging_keeps_the_precision_of_16_bits():
    """Outputs of 16 bits are weighed in float32 and rounded once."""
    out = [normal(i, 64, 8).astype(jnp.bfloat16) for i in range(2)]
    r = [normal(i + 2, 64).astype(jnp.float32) for i in range(2)]
    got, _ = attnx.merge(*zip(out, r))
    share = jax.nn.sigmoid((r[0] - r[1]).astype(jnp.float64))[:, None]
    truth = out[0].astype(jnp.float64) * share + out[1].astype(jnp.float64) * (1 - share)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_less(jnp.abs(got.astype(jnp.float64) - truth), 2.0**-8 * jnp.abs(truth) + 1e-6)


def test_attend_scores():
    """From scores computed outside: the attention itself, with leading axes, masks and every kind of weights; and in forward mode."""
    query, key, value, _ = arrays(heads=2, kv_heads=2)
    kinds = [weights.softmax(0.2), weights.softpick(), weights.sigmoid(), weights.clipped_softmax(), weights.entmax15()]

    @jax.jit
    def run(query):
        s, v = oracles.dot_products(query, key), value.transpose(0, 2, 1, 3)
        outside = [attnx.attend_scores(s, v, mask=ALLOWED, weights=w) for w in kinds]
        inside = [attnx.attention(query, key, value, mask=masks.explicit(ALLOWED), weights=w, implementation="reference").transpose(0, 2, 1, 3) for w in kinds]
        return outside, inside

    (outside, inside), (d_outside, d_inside) = jax.jvp(run, (query,), (jnp.ones_like(query),))
    assert_agree([outside, d_outside], [inside, d_inside], 1e-12)


def test_attend_scores_pooling():
    """One query row; value axes broadcast; the weights on request; nothing to attend to gives zeros, no keys too."""
    @jax.jit
    def run(s, value):
        return (attnx.attend_scores(s, value, return_weights=True), (jax.nn.softmax(s) @ value, jax.nn.softmax(s)),
                attnx.attend_scores(s, value, mask=jnp.zeros(S, bool)), attnx.attend_scores(s[..., :0], value[:0]),
                attnx.attend_scores(s.astype(jnp.bfloat16), value.astype(jnp.bfloat16)))

    got, expected, forbidden, absent, narrow = run(normal(0, 3, 1, S), normal(1, S, 2))
    assert_agree(got, expected, 1e-12)
    assert (forbidden == 0).all() and (absent == jnp.zeros((3, 1, 2))).all()
    assert narrow.dtype == jnp.bfloat16


def test_attention_weights():
    """The weights that attention uses: products with the values give its output, dropout included."""
    query, key, value, _ = arrays()
    parts = dict(mask=masks.explicit(ALLOWED), scores=scores.alibi(4), dropout_rate=0.3, dropout_key=jax.random.key(0))

    @jax.jit
    def run():
        bare = attnx.attention_weights(query, key, mask=masks.explicit(ALLOWED))
        w = attnx.attention_weights(query, key, **parts)
        return bare, jnp.einsum("bnts,bsnv->btnv", w, jnp.repeat(value, N // K, axis=2)), attnx.attention(query, key, value, implementation="reference", **parts)

    bare, product, out = run()
    assert bare.shape == (2, N, T, S)
    np.testing.assert_allclose(bare.sum(-1), np.broadcast_to(ALLOWED.any(1), (2, N, T)), rtol=1e-12)
    assert_agree(product, out, 1e-13)
