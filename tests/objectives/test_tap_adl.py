"""Token-aware pooling and the attention diversification loss: known values, torch's operations, and what the loss does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import objectives
from attnx.nn import record

X = jax.random.normal(jax.random.key(0), (2, 6, 7, 5))
T = 8


def loss(maps, **options):
    return float(objectives.attention_diversification_loss(jnp.broadcast_to(maps, (2, 3, T, T)), **options))


def test_known_values():
    """Even attention 0, own token 0, one token 1, rows split between two tokens 1 / sqrt(2); the threshold is on both sides."""
    column = lambda index: jnp.zeros((T, T)).at[:, index].set(1.0)
    split = jnp.where(jnp.arange(T)[:, None] % 2 == 0, column(1), column(4))
    assert loss(jnp.full((T, T), 1 / T)) == 0 and loss(jnp.eye(T)) == 0
    np.testing.assert_allclose([loss(column(3)), loss(split)], [1, 0.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(loss(split, pairwise=True), 2 * (4 * 3 / 2) / (8 * 7 / 2), rtol=1e-6)
    faint = 0.9 * jnp.eye(T) + 0.1 / T  # the mean row is even, so nothing of it passes
    assert loss(faint) == 0 and loss(faint, threshold=0.5) > 0


def written_out(maps, threshold=2.0):
    """Layer by layer, in NumPy."""
    total = 0
    for layer in maps:
        a = np.asarray(layer, np.float64).mean(1)
        keep = lambda x: x * (x > threshold / a.shape[-1])
        mean, rows = keep(a.mean(1, keepdims=True)), keep(a)
        norm = lambda x: np.maximum(np.linalg.norm(x, axis=-1), 1e-8)
        total = total + ((mean * rows).sum(-1) / (norm(mean) * norm(rows))).mean()
    return total / len(maps)


def test_written_out(x64):
    """Random maps of several layers, as a sequence and as one array; a batch of one; the exact form by all pairs."""
    maps = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (4, 2, 3, T, T), float))
    evaluate = jax.jit(objectives.attention_diversification_loss, static_argnames="pairwise")
    for given in (maps, list(maps), maps[:, :1]):
        np.testing.assert_allclose(evaluate(given), written_out(given), rtol=1e-12)
    a = np.asarray(maps[0].mean(1))
    a = np.where(a > 2 / T, a, 0)
    norms = np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-8)
    cosines = np.einsum("bis,bjs->bij", a / norms, a / norms)[:, *np.triu_indices(T, 1)]
    np.testing.assert_allclose(evaluate(maps[0], pairwise=True), cosines.mean(), rtol=1e-12)


def test_padding():
    """Tokens that are not there change nothing."""
    maps = jax.nn.softmax(3 * jax.random.normal(jax.random.key(2), (2, 3, 6, 6)))
    padded = jnp.pad(maps, ((0, 0), (0, 0), (0, 2), (0, 2)), constant_values=0.5)
    mask = jnp.broadcast_to(jnp.arange(8) < 6, (2, 8))
    got = objectives.attention_diversification_loss(padded, mask=mask)
    np.testing.assert_allclose(got, objectives.attention_diversification_loss(maps), rtol=1e-6)


def test_gradient():
    """Finite where no entry passes, zero for entries that do not, and its descent tells rows apart."""
    slope = jax.jit(jax.grad(objectives.attention_diversification_loss))
    assert not np.any(slope(jnp.full((1, 1, T, T), 1 / T)))
    maps = jax.nn.softmax(2 * jax.random.normal(jax.random.key(3), (1, 1, T, T)))
    out = maps[0, 0] <= 2 / T
    both = out & (maps.mean(2)[0, 0] <= 2 / T)
    assert not np.any(np.where(both, slope(maps)[0, 0], 0)) and np.isfinite(slope(maps)).all()
    scores = jax.nn.one_hot(2, T) + 2 * jax.random.normal(jax.random.key(4), (1, 1, T, T))
    descend = jax.jit(jax.value_and_grad(lambda scores: objectives.attention_diversification_loss(jax.nn.softmax(scores))))
    before, _ = descend(scores)
    for _ in range(20):
        after, down = descend(scores)
        scores = scores - 5 * down
    assert after < before - 0.01


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_dilated_pool(dilation):
    """Torch's convolution with ninths and zero padding: borders shrink."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.asarray(X)).permute(0, 3, 1, 2)
    peer = torch.nn.functional.conv2d(x, torch.full((5, 1, 3, 3), 1 / 9), padding=dilation, dilation=dilation, groups=5).permute(0, 2, 3, 1)
    np.testing.assert_allclose(objectives.dilated_average_pool(X, dilation), peer.numpy(), atol=1e-6)


def test_pool():
    """Equal logits give the plain mean of the scales, a dominant one that scale."""
    pools = [X, *(objectives.dilated_average_pool(X, d) for d in (1, 2, 3))]
    even, weights = objectives.token_aware_pool(X, jnp.zeros((2, 6, 7, 4)), return_weights=True)
    np.testing.assert_allclose(even, sum(pools) / 4, atol=1e-6)
    np.testing.assert_allclose(weights, 0.25)
    for scale, pool in enumerate(pools):
        np.testing.assert_allclose(objectives.token_aware_pool(X, 1e4 * jnp.ones((2, 6, 7, 1)) * jnp.eye(4)[scale]), pool, atol=1e-6)
    logits = jax.random.normal(jax.random.key(5), (2, 6, 7, 4))
    np.testing.assert_allclose(objectives.token_aware_pool(X, logits, temperature=2.0), objectives.token_aware_pool(X, logits / 2), atol=1e-6)


def test_module():
    """A predictor of zeros mixes evenly; the norm has the batch's statistics in training and remembered ones after."""
    module = objectives.TokenAwarePooling(5, rngs=nnx.Rngs(0))
    plain, weights = module(X, return_weights=True)
    np.testing.assert_allclose(plain, objectives.token_aware_pool(X, module.second(module.norm(module.first(X)))), atol=1e-6)
    assert weights.std() > 0.01
    mean = module.norm.mean[...].copy()
    trained = module(X, train=True)
    assert jnp.abs(trained - plain).max() > 1e-4 and jnp.abs(module.norm.mean[...] - mean).max() > 1e-5
    module.second.kernel.set_value(jnp.zeros_like(module.second.kernel[...]))
    np.testing.assert_allclose(module(X), objectives.token_aware_pool(X, jnp.zeros((2, 6, 7, 4))), atol=1e-6)


def test_block():
    """The residual stream keeps the tokens themselves, and maps come out for the loss, in a batch of one too."""
    block = objectives.TAPBlock(4, 2, layer_scale=0.0, rngs=nnx.Rngs(0))
    x = X[:1, ..., :4]
    np.testing.assert_array_equal(block(x), x)
    block = objectives.TAPBlock(4, 2, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(block, nnx.Param, ...)

    def diversity(params):
        out, maps = record(nnx.merge(graph, params, rest), 5 * x)
        return objectives.attention_diversification_loss(maps, threshold=1.0) + 0 * out.sum()

    value, slopes = jax.jit(jax.value_and_grad(diversity))(params)
    assert 0 < value < 1 and jnp.any(slopes["pooling"]["first"]["kernel"][...] != 0)


def test_errors():
    """Wrong arguments are named."""
    for match, call in (("dilation: expected", lambda: objectives.dilated_average_pool(X, 0)), ("x: expected shape", lambda: objectives.dilated_average_pool(X[0], 1)),
                        ("logits: expected shape", lambda: objectives.token_aware_pool(X, X[:, 1:])), ("maps: expected at least", lambda: loss_of([])),
                        (r"maps\[0\]: expected", lambda: loss_of([X])), ("mask: expected", lambda: loss_of(X[..., :1] * jnp.ones((2, 6, 7, 7)), mask=X))):
        with pytest.raises(ValueError, match=match):
            call()


def loss_of(maps, **options):
    maps = maps[:, :, :7] if getattr(maps, "ndim", 0) == 4 else maps
    return objectives.attention_diversification_loss(maps, **options)
