"""Weighted grouped heads: what the weights reduce to, variants, folding, gradients, conversion of layers and models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, memory, scores
from attnx.memory.weighted_groups import VARIANTS
from attnx.nn import Attention, Stack, TransformerBlock
from attnx.positions import Rotary

B, T, N, H = 2, 6, 8, 4
D = 16


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def layer(**options):
    return Attention(D, N, head_size=H, mechanism=attnx.pairs(mask=masks.causal()), position=Rotary(), rngs=nnx.Rngs(0), **options)


call = nnx.jit(lambda module, *args: module(*args))


def with_heads(key, value, groups):
    """A plain layer of these key and value kernels."""
    made = layer(num_kv_heads=groups)
    made.key.kernel[...], made.value.kernel[...] = key, value
    return made


def test_reductions(x64):
    """The mean is grouped attention of mean projections; as many groups as heads with weights of 1 change nothing; one group is multi-query attention."""
    x, plain = normal(B, T, D), layer()
    kernels = [project.kernel[...] for project in (plain.key, plain.value)]
    means = [kernel.reshape(D, 2, N // 2, H).mean(2) for kernel in kernels]
    np.testing.assert_allclose(call(memory.convert_mha_to_gqa(plain, 2), x), call(with_heads(*means, 2), x), atol=1e-6)
    np.testing.assert_allclose(call(memory.convert_mha_to_gqa(plain, N), x), call(plain, x), atol=1e-6)
    weights = [normal(N, 1, seed=seed) for seed in (1, 2)]
    one = memory.weighted_group_kv(*kernels, *weights, 1)
    expected = [sum(w[h, 0] * kernel[:, h] for h in range(N))[:, None] for kernel, w in zip(kernels, weights)]
    for got, wanted in zip(one, expected):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_variants(x64):
    """By head, by channel of the head, by channel of the model: sums written out; equal entries are the scalar variant."""
    key, value = normal(D, N, H, dtype=float), normal(D, N, 3, seed=1, dtype=float)
    scalar = [normal(N, 1, seed=seed, dtype=float) for seed in (2, 3)]
    expected = memory.weighted_group_kv(key, value, *scalar, 2)
    for variant, sizes in (("column", (H, 3)), ("row", (D, D))):
        weights = [normal(N, size, seed=4, dtype=float) for size in sizes]
        got = memory.weighted_group_kv(key, value, *weights, 2, variant=variant)
        for kernel, weight, combined in zip((key, value), weights, got):
            for group in range(2):
                heads = range(4 * group, 4 * group + 4)  # heads that follow each other
                wanted = sum((weight[h][None] if variant == "column" else weight[h][:, None]) * kernel[:, h] for h in heads)
                np.testing.assert_allclose(combined[:, group], wanted, atol=1e-12)
        equal = memory.weighted_group_kv(key, value, *(jnp.broadcast_to(w, (N, size)) for w, size in zip(scalar, sizes)), 2, variant=variant)
        for got, wanted in zip(equal, expected):
            np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_heads_that_follow_each_other_share():
    """Query head h reads group h // m."""
    x, plain = normal(B, T, D), layer()
    weighted = memory.convert_mha_to_gqa(plain, 2, variant="column", init="normal", rngs=nnx.Rngs(1))
    key, value = weighted.fold().key.kernel[...], weighted.fold().value.kernel[...]
    out = call(weighted, x)
    np.testing.assert_allclose(out, call(with_heads(jnp.repeat(key, 4, axis=1), jnp.repeat(value, 4, axis=1), N), x), atol=1e-5)
    assert jnp.abs(out - call(with_heads(jnp.tile(key, (1, 4, 1)), jnp.tile(value, (1, 4, 1)), N), x)).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding(variant):
    """A folded layer finds the same, whole and in steps, with a cache of G heads and no more weights than grouped attention; every parameter is trained before."""
    options = {} if variant == "row" else dict(use_bias=True, bias_init=nnx.initializers.normal(1.0))
    weighted = memory.convert_mha_to_gqa(layer(qk_norm="rms", **options), 2, variant=variant, init="normal", rngs=nnx.Rngs(1))
    graph, params = nnx.split(weighted)
    x = normal(B, T, D)

    @jax.jit
    def run(params):
        weighted = nnx.merge(graph, params)
        folded = weighted.fold()
        assert type(folded) is Attention and folded.key.kernel.shape == (D, 2, H)
        outs = [weighted(x), folded(x)]
        for module in (weighted, folded):
            state = module.init_state(B, T)
            assert state.mechanism.key.shape == (B, T, 2, H)
            state, first = module.step(state, x[:, :4])
            outs.append(jnp.concatenate([first, module.step(state, x[:, 4:])[1]], axis=1))
        return outs

    outs = run(params)
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(x) ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_start():
    """The released start of 0.5 is the mean for groups of two; for groups of four it doubles the projections."""
    plain = layer()
    mean, half = (memory.convert_mha_to_gqa(plain, 2, init=init).fold() for init in ("mean", "half"))
    np.testing.assert_allclose(half.key.kernel[...], 2 * mean.key.kernel[...], rtol=1e-6)
    mean, half = (memory.convert_mha_to_gqa(plain, 4, init=init).fold() for init in ("mean", "half"))
    np.testing.assert_allclose(half.value.kernel[...], mean.value.kernel[...], rtol=1e-6)


def test_models():
    """Layers of a model are converted and folded where they are, also those that one scan evaluates."""
    make = lambda *, rngs: TransformerBlock(D, attention=Attention(D, 4, mechanism=attnx.pairs(), rngs=rngs), rngs=rngs)
    stack, x = Stack(make, 3, rngs=nnx.Rngs(0)), normal(B, T, D)
    expected = call(stack, x)
    assert memory.convert_mha_to_gqa(stack, 4) is stack
    assert isinstance(stack.blocks[0].attention, memory.WeightedGQA) and stack.blocks[0].attention.key_weight.shape == (3, 4, 1)
    np.testing.assert_allclose(call(stack, x), expected, atol=1e-5)
    assert type(memory.fold_gqa(stack).blocks[0].attention) is Attention
    np.testing.assert_allclose(call(stack, x), expected, atol=1e-5)


def test_t5_cross_attention():
    """As in T5: no scale, a bias of relative positions, keys and values of an encoder's output."""
    x, context = normal(B, T, D), normal(B, 5, 12, seed=1)
    mechanism = attnx.pairs(scale=1.0, scores=scores.t5_bias(normal(32, N, seed=2)))
    cross = Attention(D, N, head_size=H, mechanism=mechanism, context_features=12, rngs=nnx.Rngs(0))
    weighted = memory.convert_mha_to_gqa(cross, 2)
    expected = call(weighted.fold(), x, context)
    stepped = nnx.jit(lambda module: module.step(module.init_state(B, T, context=context), x)[1])(weighted)
    for out in (call(weighted, x, context), stepped):
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_errors():
    """Wrong arguments are named."""
    plain = layer()
    for match, options in (("groups: expected a divisor", dict(groups=3)), ("init: expected", dict(groups=2, init="other")),
                           ("variant: expected", dict(groups=2, variant="x")), ("rngs: expected", dict(groups=2, init="normal"))):
        with pytest.raises(ValueError, match=match):
            memory.convert_mha_to_gqa(plain, **options)
    with pytest.raises(ValueError, match="layer: expected as many"):
        memory.convert_mha_to_gqa(layer(num_kv_heads=2), 2)
    with pytest.raises(ValueError, match="'row' weighs"):
        memory.convert_mha_to_gqa(layer(use_bias=True), 2, variant="row")
    with pytest.raises(ValueError, match="key_weight: expected shape"):
        memory.weighted_group_kv(jnp.ones((D, N, H)), jnp.ones((D, N, H)), jnp.ones((N, 2)), jnp.ones((N, 1)), 2)
