"""Optimised, efficient and super attention: when merging is exact, what slices are, maps of values, numbers of weights, and the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import attnx
from attnx import masks, scores
from attnx.nn import Attention
from attnx.positions import Rotary

B, T, S, D, N = 2, 7, 5, 8, 2
H = D // N


def normal(*shape, seed=0, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def kernels(heads=N, size=H):
    return [normal(*shape, seed=seed) / 2 for seed, shape in enumerate([(D, heads, size)] * 3 + [(heads, size, D)])]


def standard(x, y, query_kernel, key_kernel, value_kernel, out_kernel, **options):
    q, k, v = (jnp.einsum("btd,dnh->btnh", z, w) for z, w in ((x, query_kernel), (y, key_kernel), (y, value_kernel)))
    return jnp.einsum("btnh,nhe->bte", attnx.attention(q, k, v, **options), out_kernel)


@pytest.mark.parametrize("size", [D, 3])
def test_merging_is_exact_for_one_head(x64, size):
    """Standard attention with any four kernels, whatever the size of the head, is the optimised and the efficient form with merged ones."""
    x, y = normal(B, T, D), normal(B, S, D, seed=9)
    given = kernels(1, size)
    expected = standard(x, y, *given)
    merged = scores.optimised_from_mha(*given)
    np.testing.assert_allclose(scores.optimised_attention(x, y, y, *merged), expected, atol=1e-12)
    merged = scores.efficient_from_mha(*given)
    np.testing.assert_allclose(scores.efficient_attention(x, y, y, merged.query_kernel, merged.out_kernel), expected, atol=1e-12)
    with pytest.raises(ValueError, match="query_kernel: expected one head"):
        scores.efficient_from_mha(*kernels())


def test_slices(x64):
    """Each head reads its own channels: written out, with keys and values of different inputs."""
    x, y, z = normal(B, T, D), normal(B, S, D, seed=8), normal(B, S, D, seed=9)
    query, key, _, out = kernels()
    for got, keys in ((scores.optimised_attention(x, y, z, query, key, out), jnp.einsum("bsd,dnh->bsnh", y, key)),
                      (scores.efficient_attention(x, y, z, query, out), jnp.stack([y[..., :H], y[..., H:]], axis=2))):
        s = oracles.dot_products(jnp.einsum("btd,dnh->btnh", x, query), keys)
        heads = [jax.nn.softmax(s[:, h]) @ z[..., h * H:(h + 1) * H] for h in range(N)]
        np.testing.assert_allclose(got, jnp.concatenate(heads, -1) @ out.reshape(D, D), atol=1e-12)


def test_weights_sum_over_keys(x64):
    """Constant values come out as they are."""
    query, key, _, out = kernels()
    x, ones = normal(B, T, D), jnp.ones((B, T, D))
    for got in (scores.optimised_attention(x, x, ones, query, key, out), scores.efficient_attention(x, x, ones, query, out, is_causal=True)):
        np.testing.assert_allclose(got, jnp.broadcast_to(out.sum((0, 1)), got.shape), atol=1e-12)


def test_super(x64):
    """The identity is efficient attention; a permutation, that of permuted values with the keys as they were; a map a head is each head's; a shorter sequence reads the
    leading part; bias."""
    x = normal(B, T, D)
    query, _, _, out = kernels()
    attend = lambda values, **options: scores.efficient_attention(x, x, values, query, out, **options)
    aligned = lambda *alignment, **options: scores.super_attention(x, x, x, query, out, *alignment, **options)
    np.testing.assert_allclose(aligned(jnp.eye(T)), attend(x), atol=1e-12)
    order = jnp.array([3, 0, 6, 1, 2, 5, 4])
    np.testing.assert_allclose(aligned(jnp.eye(T)[order]), attend(x[:, order]), atol=1e-12)
    both = jnp.stack([jnp.eye(T), jnp.eye(T)[order]])
    np.testing.assert_allclose(aligned(both), attend(jnp.concatenate([x[..., :H], x[:, order, H:]], -1)), atol=1e-12)
    dense = normal(T + 3, T + 3, seed=5)
    bias = normal(T + 3, seed=6)
    np.testing.assert_allclose(aligned(dense, alignment_bias=bias), attend(jnp.einsum("ij,bjd->bid", dense[:T, :T], x) + bias[:T, None]), atol=1e-12)


def test_causal_super(x64):
    """A triangular map tells nothing of the future, a dense one does."""
    x, dense = normal(B, T, D), normal(T, T, seed=5)
    query, _, _, out = kernels()
    other = x.at[:, -1].add(1.0)

    def leak(**options):
        first, second = (scores.super_attention(y, y, y, query, out, dense, **options) for y in (x, other))
        return jnp.abs(first - second)[:, :-1].max()

    assert leak(is_causal=True) == 0 and leak(mask=masks.causal()) > 1e-3


def test_alignment_by_position(x64):
    """Documents packed in a row, each at its positions, are mapped as if they were apart; padding counts 0."""
    value, dense, bias = normal(B, T, N, H), normal(N, T, T, seed=5), normal(T, seed=6)
    ids = jnp.broadcast_to(jnp.arange(T) >= 3, (B, T)).astype(jnp.int32)
    positions = jnp.array([0, 1, 2, 0, 1, 2, 3])
    packed = scores.align_values(value, dense, bias, positions=positions, segment_ids=ids)
    apart = [scores.align_values(part, dense, bias) for part in (value[:, :3], value[:, 3:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-12)
    padded = scores.align_values(value, dense, positions=jnp.where(jnp.arange(T) < 5, jnp.arange(T), -1))
    np.testing.assert_allclose(padded[:, :5], scores.align_values(value[:, :5], dense), atol=1e-12)


def test_costs():
    """Three quarters and half of the weights of standard attention, in the layers as in the count."""
    count = lambda layer: sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    layers = dict(standard=Attention(D, N, mechanism=attnx.pairs(), rngs=nnx.Rngs(0)), optimised=scores.OptimisedAttention(D, N, rngs=nnx.Rngs(0)),
                  efficient=scores.EfficientAttention(D, N, rngs=nnx.Rngs(0)), super=scores.SuperAttention(D, N, length=T, rngs=nnx.Rngs(0)))
    numbers = {kind: count(layer) for kind, layer in layers.items()}
    assert numbers == {"standard": 4 * D * D, "optimised": 3 * D * D, "efficient": 2 * D * D, "super": 2 * D * D + T * T}
    assert all(scores.attention_cost(kind, D, T).parameters == number for kind, number in numbers.items())
    operations = [scores.attention_cost(kind, D, T).operations for kind in ("standard", "optimised", "efficient", "super")]
    assert operations[0] - operations[2] == 2 * (operations[0] - operations[1]) == 2 * 2 * T * D * D and operations[3] - operations[2] == 2 * T * T * D


def layers(**options):
    return (scores.OptimisedAttention(D, N, rngs=nnx.Rngs(0), **options), scores.EfficientAttention(D, N, rngs=nnx.Rngs(0), **options),
            scores.SuperAttention(D, N, length=T + 1, per_head=True, alignment_bias=True, rngs=nnx.Rngs(0), **options))


def test_layers():
    """A layer is the function of its kernels, and reads a causal sequence in pieces, with rotary positions."""
    x = normal(B, T, D, dtype=jnp.float32)
    for layer in layers(is_causal=True):
        arrays = [layer.query.kernel[...], *([] if layer.key is None else [layer.key.kernel[...]]), layer.out.kernel[...]]
        options = dict(is_causal=True)
        if isinstance(layer, scores.SuperAttention):
            layer.alignment[...] += normal(N, T + 1, T + 1, seed=5, dtype=jnp.float32)
            layer.alignment_bias[...] = normal(T + 1, seed=6, dtype=jnp.float32)
            arrays, options["alignment_bias"] = [*arrays, layer.alignment[...]], layer.alignment_bias[...]
        function = {1: scores.optimised_attention, 0: scores.efficient_attention}[layer.key is not None]
        function = scores.super_attention if isinstance(layer, scores.SuperAttention) else function

        @nnx.jit
        def run(layer):
            outs = [layer(x), function(x, x, x, *arrays, **options)]
            layer.position = Rotary()
            state, pieces = layer.init_state(B, T), []
            for piece in jnp.split(x, [1, 5], axis=1):
                state, out = layer.step(state, piece)
                pieces.append(out)
            return *outs, layer(x), jnp.concatenate(pieces, axis=1)

        outs = run(layer)
        np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)
        np.testing.assert_allclose(outs[2], outs[3], atol=1e-5)


def test_cross_attention():
    """To a context of other tokens, whole and in steps; padding of the context does not matter."""
    x, context = normal(B, T, D, dtype=jnp.float32), normal(B, S, D, seed=9, dtype=jnp.float32)
    positions = jnp.array([0, 1, 2, -1, -1], jnp.int32)
    for layer in layers():
        @nnx.jit
        def run(layer):
            state = layer.init_state(B, T, context=context, context_positions=positions)
            return layer(x, context, context_positions=positions), layer(x, context[:, :3]), layer.step(state, x)[1]

        whole, *others = run(layer)
        for other in others:
            np.testing.assert_allclose(other, whole, atol=1e-6)
    with pytest.raises(ValueError, match="is_causal: expected True"):
        layer.init_state(B, T)


def test_errors():
    """Wrong arguments are named."""
    x = jnp.ones((B, T, D))
    with pytest.raises(ValueError, match="alignment: expected shape"):
        scores.align_values(jnp.ones((B, T, N, H)), jnp.eye(T - 1))
    with pytest.raises(ValueError, match="bias: expected shape"):
        scores.align_values(jnp.ones((B, T, N, H)), jnp.eye(T), jnp.ones(T - 1))
    with pytest.raises(ValueError, match="x: expected shape"):
        scores.efficient_attention(x, x, x, jnp.ones((D, 3, H)), jnp.ones((3, H, D)))
    with pytest.raises(ValueError, match="kind: expected"):
        scores.attention_cost("other", D, T)
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        scores.OptimisedAttention(D, 3, rngs=nnx.Rngs(0))
