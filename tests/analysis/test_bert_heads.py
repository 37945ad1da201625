"""Analysis of heads: uniform and identity maps, words and pieces, distances against scipy, parsers and probes that are fed gold trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.spatial.distance import jensenshannon

import attnx
from attnx import analysis, nn

TOKENS = ["[CLS]", "the", "cat", ",", "asleep", ".", "[SEP]"]
SHARES = {"self": 1 / 7, "previous": 6 / 49, "next": 6 / 49, "start": 1 / 7, "separator": 1 / 7, "punctuation": 2 / 7, "separator_to_separator": 1 / 7,
          "rest_to_separator": 1 / 7}


def maps(*shape, seed=0):
    return jax.nn.softmax(2 * jax.random.normal(jax.random.key(seed), shape))


def test_surface(x64):
    """Uniform attention gives each kind its share; the identity gives all to itself; entropies are log T and 0."""
    both = jnp.stack([jnp.full((7, 7), 1 / 7), jnp.eye(7)])
    found = analysis.surface_statistics(both, TOKENS)
    assert found.keys() == SHARES.keys()
    for kind, share in SHARES.items():
        np.testing.assert_allclose(found[kind][0], share, err_msg=kind)
    assert found["self"][1] == 1 and found["separator_to_separator"][1] == 1 and found["rest_to_separator"][1] == 0 and found["next"][1] == 0
    entropies = analysis.head_entropy(both)
    np.testing.assert_allclose(entropies[0], np.log(7))
    assert entropies[1] < 2e-3
    shifted = analysis.surface_statistics(jnp.eye(7, k=1), TOKENS)
    np.testing.assert_allclose([shifted["next"], shifted["previous"]], [6 / 7, 0])
    np.testing.assert_allclose(analysis.head_entropy(maps(2, 7, 7)[..., :1, :]), analysis.head_entropy(maps(2, 7, 7)[..., :1, :], jnp.ones(7, bool)))
    with pytest.raises(ValueError, match="tokens: expected 7"):
        analysis.surface_statistics(both, TOKENS[1:])


def test_padding(x64):
    """Padding is as if it were not there."""
    a = maps(3, 2, 7, 7)
    seen = jnp.arange(7) < jnp.array([[7], [5]])
    a = jnp.where(seen[:, None], a, 0)
    a = a / a.sum(-1, keepdims=True)
    alone = [a[:, 0], a[:, 1, :5, :5]]
    np.testing.assert_allclose(analysis.head_entropy(a, seen), jnp.stack([analysis.head_entropy(x) for x in alone], 1))
    np.testing.assert_allclose(analysis.head_distances(a, seen), sum(analysis.head_distances(x) for x in alone), atol=1e-12)


def test_distances(x64):
    """Divergences are scipy's, squared, of the smoothed rows; symmetric, zero on the diagonal, at most log 2 a row."""
    a = maps(4, 6, 6).at[3].set(jnp.eye(6)).at[2].set(jnp.eye(6)[::-1])
    got = jax.jit(analysis.head_distances)(a)
    p = np.asarray(0.999 * a + 0.001 / 6)
    np.testing.assert_allclose(got, [[(jensenshannon(x, y, axis=-1)**2).sum() for y in p] for x in p], atol=1e-12)
    np.testing.assert_allclose(got, got.T, atol=1e-12)
    assert (np.diag(got) == 0).all() and got.max() <= 6 * np.log(2)
    assert jnp.isfinite(jax.grad(lambda a: analysis.head_distances(a).sum())(a)).all()


def test_embedding(x64):
    """Points are found again from their distances; more steps never fit worse."""
    points = jax.random.normal(jax.random.key(0), (12, 2))
    between = lambda x: jnp.linalg.norm(x[:, None] - x[None] + 1e-30, axis=-1)
    np.testing.assert_allclose(between(analysis.embed_heads(between(points))), between(points), atol=1e-8)
    rough = between(points) + jnp.abs(jax.random.normal(jax.random.key(1), (12, 12)))
    rough = (rough + rough.T) * (1 - jnp.eye(12))
    stress = [float(jnp.sum((between(analysis.embed_heads(rough, steps=steps)) - rough)**2)) for steps in (0, 1, 10, 100)]
    assert stress[0] > stress[1] > stress[2] > stress[3]


def test_words(x64):
    """Rows of words keep summing to 1: sums to pieces, means from them; whole words change nothing."""
    a = maps(2, 6, 6)
    word_of = jnp.array([0, 1, 1, 2, 3, 3])
    got = analysis.token_to_word(a, word_of, 4)
    np.testing.assert_allclose(got.sum(-1), 1)
    np.testing.assert_allclose(got[:, 1, 3], (a[:, 1, 4:].sum(-1) + a[:, 2, 4:].sum(-1)) / 2)
    np.testing.assert_allclose(analysis.token_to_word(a, jnp.arange(6), 6), a, atol=1e-15)
    batch = analysis.token_to_word(maps(2, 3, 5, 6, 6), jnp.stack([word_of, jnp.arange(6), jnp.full(6, -1)])[:, None], 6)
    assert batch.shape == (2, 3, 5, 6, 6) and not batch[:, 2].any() and not batch[:, 0, :, 4:].any()
    with pytest.raises(ValueError, match="word_of: expected shape"):
        analysis.token_to_word(a, word_of[1:], 4)


GOLD = jnp.array([[-1, 2, 3, -1, 3, -1, -1], [-1, 2, 5, 2, 5, -1, -1]])  # of [CLS] and four or five words; two trees
WORDS = jnp.array([[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]], bool)
RELATIONS = jnp.array([[-1, 0, 1, -1, 1, -1, -1], [-1, 0, 1, 0, 1, -1, -1]])


def gold():
    """Attention equal to the trees, where a word has a head; more to itself and to [CLS]."""
    return jax.nn.one_hot(GOLD, 7) * 0.2 + 0.5 * jnp.eye(7) + 0.3 * jax.nn.one_hot(0, 7)


@pytest.mark.parametrize("mode", ["dependent_to_head", "head_to_dependent"])
def test_parser(mode):
    """A head that holds the tree parses without a fault: itself and [CLS] do not count. An offset is right where heads are that far."""
    a = gold() if mode == "dependent_to_head" else jnp.swapaxes(gold(), -1, -2)
    predicted = analysis.head_as_parser(a, WORDS, mode)
    assert (predicted[~WORDS] == -1).all()
    np.testing.assert_array_equal(analysis.uas_by_relation(predicted, GOLD, RELATIONS, 2), [1, 1])
    after = analysis.uas_by_relation(analysis.offset_baseline(WORDS, 1), GOLD, RELATIONS, 3)
    np.testing.assert_allclose(after, [2 / 3, 0.5, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(analysis.offset_baseline(WORDS, -2), [[-1, -1, -1, 1, 2, -1, -1], [-1, -1, -1, 1, 2, 3, -1]])
    with pytest.raises(ValueError, match="mode: expected"):
        analysis.head_as_parser(a, WORDS, "other")


def test_coreference():
    """Each mention finds the earlier one that it looks at most; later ones, and itself, do not count."""
    a = jnp.array([[0.1, 0.1, 0.1, 0.7], [0.2, 0.6, 0.1, 0.1], [0.3, 0.2, 0.4, 0.1], [0.1, 0.3, 0.2, 0.4]])
    np.testing.assert_array_equal(analysis.coreference_antecedent(jnp.stack([a, a.T]), jnp.array([0, 2, 3])), [[-1, 0, 1], [-1, 0, 0]])


def test_separator_gradient():
    """Slopes by the weights of a model, through a hook; a loss that does not see [SEP]'s values has none there."""
    layer = nn.Attention(8, 2, mechanism=attnx.pairs(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    _, found = nn.record(layer, x)
    loss = lambda a: jnp.sum(layer(x, hooks={"weights": lambda value, index, at: a[index]})**2)
    separators = jnp.arange(4) == 3
    got = analysis.separator_gradient(loss, found, separators)
    slopes = jax.grad(loss)(found)
    np.testing.assert_allclose(got, [jnp.abs(slopes[0, ..., 3]).sum()], rtol=1e-6)
    silent = analysis.separator_gradient(lambda a: jnp.sum(a[..., :3]**2), found, separators)
    assert silent.shape == (1,) and silent[0] == 0


def probe_accuracy(logits):
    counted = RELATIONS >= 0
    return ((jnp.argmax(logits, -1) - 1 == GOLD) & counted).sum() / counted.sum()


def test_probes():
    """Probes that are fed the gold tree as one map among others find it; without the map the other word probe knows distances and words alone."""
    noise = maps(2, 3, 7, 7)
    inputs = jnp.concatenate([noise, gold()[:, None]], axis=1), jnp.zeros(2, int), jnp.array([5, 6]), WORDS
    vectors = jax.random.normal(jax.random.key(1), (2, 7, 5))
    target = jnp.where(GOLD >= 0, GOLD + 1, 0)

    def trained(probe, *args):
        graph, params = nnx.split(probe)
        optimizer = optax.adam(0.3)

        def loss(params):
            found = optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(*args), target)
            return jnp.mean(found, where=RELATIONS >= 0)

        @jax.jit
        def run(params):
            def step(state, _):
                changes, inner = optimizer.update(jax.grad(loss)(state[0]), state[1])
                return (optax.apply_updates(state[0], changes), inner), None
            return jax.lax.scan(step, (params, optimizer.init(params)), length=60)[0][0]

        return nnx.merge(graph, run(params))(*args)

    logits = trained(analysis.AttentionProbe(4, rngs=nnx.Rngs(0)), *inputs)
    assert logits.shape == (2, 7, 8) and probe_accuracy(logits) > 0.99
    assert (logits[:, :, 1:][jnp.broadcast_to(~WORDS[:, None], (2, 7, 7))] < -1e30).all()
    assert probe_accuracy(trained(analysis.AttentionWordProbe(4, 5, rngs=nnx.Rngs(0)), *inputs, vectors)) > 0.99
    assert probe_accuracy(trained(analysis.WordDistanceProbe(5, 16, rngs=nnx.Rngs(0)), WORDS, vectors)) > 0.99  # two sentences are learned by heart


def test_probe_definition(x64):
    """The weighted sum of maps and their transposes, entry by entry; the root's column is what is given to, and comes from, both ends."""
    a, w = maps(1, 2, 4, 4), jax.random.normal(jax.random.key(1), (4,))
    logits = analysis.probe_maps(a, jnp.array([0]), jnp.array([3]), 0.5, 2.0) @ w
    for j in range(4):
        for i in range(4):
            expected = sum(w[k] * a[0, k, j, i] + w[2 + k] * a[0, k, i, j] for k in range(2))
            np.testing.assert_allclose(logits[0, j, 1 + i], expected)
        root = sum(w[k] * (0.5 * a[0, k, j, 0] + 2 * a[0, k, j, 3]) + w[2 + k] * (0.5 * a[0, k, 0, j] + 2 * a[0, k, 3, j]) for k in range(2))
        np.testing.assert_allclose(logits[0, j, 0], root)
    word = analysis.AttentionWordProbe(2, 3, rngs=nnx.Rngs(0))
    vectors = jax.random.normal(jax.random.key(2), (1, 4, 3))
    got = word(a, jnp.array([0]), jnp.array([3]), jnp.ones((1, 4), bool), vectors)
    mixed = analysis.probe_maps(a, jnp.array([0]), jnp.array([3]), 1.0, 1.0)
    one = (vectors[0, 1] @ word.of_word.kernel[...] + word.of_word.bias[...] + vectors[0, 2] @ word.of_head.kernel[...]) @ mixed[0, 1, 3]
    np.testing.assert_allclose(got[0, 1, 3], one, rtol=1e-6)
    root = (vectors[0, 1] @ word.of_word.kernel[...] + word.of_word.bias[...]) @ mixed[0, 1, 0]
    np.testing.assert_allclose(got[0, 1, 0], root, rtol=1e-6)
