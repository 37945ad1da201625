"""Perceiver: another implementation with the same weights, what it is blind to, tiles of a very long input, and which weights are shared."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import fusion

B, GRID, C, CLASSES = 2, (6, 5), 3, 4
X = jax.random.normal(jax.random.key(0), (B, *GRID, C))
FLAT, POSITIONS = X.reshape(B, -1, C), fusion.grid_positions(GRID)
SMALL = dict(num_bands=3, max_frequency=6.0, num_latents=4, features=8, num_layers=1, num_heads=2, implementation="reference")


def make(num_blocks=3, **options):
    return fusion.Perceiver(C, CLASSES, num_blocks=num_blocks, rngs=nnx.Rngs(0), **SMALL | options)


@nnx.jit
def call(model, x, positions, mask=None):
    return model(x, positions=positions, mask=mask)


def count(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def test_fourier_features(x64):
    """For each axis sines, then cosines, of evenly spaced frequencies up to mu / 2, then the position; 258 features for ImageNet's 64 bands."""
    got = fusion.fourier_features(fusion.grid_positions(GRID), 3, (6.0, 10.0))
    assert got.shape == (30, 14) and got.dtype == jnp.float64
    for m, (i, j) in enumerate(np.ndindex(GRID)):
        expected = []
        for p, mu in ((-1 + 2 * i / 5, 6), (-1 + 2 * j / 4, 10)):
            f = np.array([1, (1 + mu / 2) / 2, mu / 2])
            expected += [*np.sin(np.pi * f * p), *np.cos(np.pi * f * p), p]
        np.testing.assert_allclose(got[m], expected, atol=1e-12)
    assert fusion.fourier_features(POSITIONS, 3, 6, concat_positions=False).shape == (30, 12)
    with pytest.raises(ValueError, match="max_frequency: expected"):
        fusion.fourier_features(POSITIONS, 3, (6.0,))


def test_permutations():
    """Inputs that move with their positions change nothing; inputs that move alone do."""
    model, order = make(), jax.random.permutation(jax.random.key(1), 30)
    logits = call(model, FLAT, POSITIONS)
    np.testing.assert_allclose(model(X), logits, atol=1e-5)
    np.testing.assert_allclose(call(model, FLAT[:, order], POSITIONS[order]), logits, atol=1e-5)
    assert jnp.abs(call(model, FLAT[:, order], POSITIONS) - logits).max() > 1e-4


def test_mask():
    """Inputs that are not there change nothing; where none are the output is that of the latents alone, and finite."""
    model, more = make(), jnp.ones((B, 7, C))
    mask = jnp.broadcast_to(jnp.arange(37) < 30, (B, 37))
    padded = jnp.concatenate([FLAT, more], axis=1)
    places = jnp.concatenate([POSITIONS, POSITIONS[:7]])
    np.testing.assert_allclose(call(model, padded, places, mask), call(model, FLAT, POSITIONS), atol=1e-5)
    nothing = [call(model, x, places, ~mask & ~mask[::-1] & False) for x in (padded, 2 * padded)]
    assert np.isfinite(nothing[0]).all()
    np.testing.assert_array_equal(*nothing)
    with pytest.raises(ValueError, match="mask: expected booleans"):
        model(FLAT, positions=POSITIONS, mask=mask)


def test_sharing():
    """With shared weights the count does not depend on the number of blocks; the first block's weights are its own."""
    assert count(make(2)) == count(make(5)) > count(make(1))
    assert count(make(5, share_weights=False)) > count(make(4, share_weights=False)) > count(make(3, share_weights=False))
    model = make(3)
    first, second = model.blocks
    assert jnp.any(first.cross.attention.query.kernel[...] != second.cross.attention.query.kernel[...])
    assert jnp.any(first.tower.blocks[0].mlp.up.kernel[...] != second.tower.blocks[0].mlp.up.kernel[...])
    apart = make(3, share_weights=False)
    apart.latents, apart.norm, apart.head = model.latents, model.norm, model.head
    apart.blocks = nnx.List([first, second, second])
    np.testing.assert_allclose(call(apart, FLAT, POSITIONS), call(model, FLAT, POSITIONS), atol=1e-6)
    assert float(jnp.abs(model.latents[...]).max()) <= 0.04


def test_tiles(optimised):
    """Reading 50176 inputs in tiles finds what reading them at once finds, in memory that does not grow with their number."""
    def run(implementation, length):
        query, key, value = (jnp.sin(jnp.arange(n * 8.0)).reshape(1, n, 1, 8) for n in (4, length, length))
        compiled = jax.jit(partial(attnx.attention, implementation=implementation)).lower(query, key, value).compile()
        return compiled(query, key, value), compiled.memory_analysis().temp_size_in_bytes

    (tiled, memory), (direct, _) = run("blockwise", 224**2), run("reference", 224**2)
    np.testing.assert_allclose(tiled, direct, atol=1e-4)
    assert memory < 1.5 * run("blockwise", 112**2)[1] + 1e5


def test_port():
    """perceiver-pytorch with the same weights."""
    torch, port = pytest.importorskip("torch"), pytest.importorskip("perceiver_pytorch")
    peer = port.Perceiver(num_freq_bands=3, depth=3, max_freq=6.0, input_channels=C, input_axis=2, num_latents=4, latent_dim=8, cross_heads=1, latent_heads=2,
                          cross_dim_head=6, latent_dim_head=4, num_classes=CLASSES, weight_tie_layers=True, self_per_cross_attn=2).eval()
    model = make(3, num_layers=2, cross_head_size=6, head_size=4, mlp_ratio=4.0, gated=True, norm=partial(nnx.LayerNorm, epsilon=1e-5))
    put = lambda param, tensor, at: param.set_value(param[...].at[at].set(jnp.asarray(tensor.detach().numpy()).reshape(param[...][at].shape)))
    whole = slice(None)

    def linear(ours, theirs, at, bias=True):
        put(ours.kernel, theirs.weight.T, at)
        if bias:
            put(ours.bias, theirs.bias, at)

    def norm(ours, theirs, at=whole):
        put(ours.scale, theirs.weight, at)
        put(ours.bias, theirs.bias, at)

    def attention(ours, theirs, at=whole):
        linear(ours.query, theirs.to_q, at, bias=False)
        key, value = theirs.to_kv.weight.T.chunk(2, dim=-1)
        put(ours.key.kernel, key, at)
        put(ours.value.kernel, value, at)
        linear(ours.out, theirs.to_out, at)

    def mlp(ours, theirs, at=whole):
        for name, part in zip(("up", "gate"), (0, 1)):
            put(getattr(ours, name).kernel, theirs.net[0].weight.T.chunk(2, dim=-1)[part], at)
            put(getattr(ours, name).bias, theirs.net[0].bias.chunk(2)[part], at)
        linear(ours.down, theirs.net[2], at)

    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    for block, (cross, feed, tower) in zip(model.blocks, ((layer.cross_attn, layer.cross_ff, layer.self_attns) for layer in peer.layers)):
        attention(block.cross.attention, cross.fn)
        mlp(block.cross.mlp, feed.fn)
        for ours, theirs in ((block.cross.norm, cross.norm), (block.cross.input_norm, cross.norm_context), (block.cross.mlp_norm, feed.norm)):
            norm(ours, theirs)
        layer = block.tower.blocks[0]
        for at, (attend, feed) in enumerate(tower):
            attention(layer.attention, attend.fn, at)
            mlp(layer.mlp, feed.fn, at)
            norm(layer.attention_norm, attend.norm, at)
            norm(layer.mlp_norm, feed.norm, at)
    put(model.latents, peer.latents, whole)
    norm(model.norm, peer.to_logits[1])
    linear(model.head, peer.to_logits[2], whole)
    with torch.no_grad():
        expected = peer(torch.tensor(np.asarray(X))).numpy()
    np.testing.assert_allclose(call(model, FLAT, POSITIONS), expected, atol=1e-4)


def test_errors():
    """Wrong arguments are named."""
    model = make()
    for match, x, positions in (("x: expected a batch of grids", X[..., :2], None), ("x: expected shape", FLAT[..., :2], POSITIONS),
                                ("positions: expected shape", FLAT, POSITIONS[:5])):
        with pytest.raises(ValueError, match=match):
            model(x, positions=positions)
