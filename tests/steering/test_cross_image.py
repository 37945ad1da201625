"""Cross-image attention: what it leaves alone, what contrast does to rows, moments of pictures, and steps outside its schedule."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import steering
from attnx.core.moments import adain, moments
from attnx.nn import Attention, Stack, TransformerBlock
from attnx.steering import APPEARANCE, OUTPUT, STRUCTURE, CrossImageSchedule

EARLY = CrossImageSchedule(steps=20, skip=0, swap=((3, (4, 9)),), structure_until=6)


def inputs(dtype=jnp.float64):
    return jax.random.normal(jax.random.key(0), (3, 3, 9, 2, 4), dtype)


def test_qkv(x64):
    """Its own keys and values change nothing; the appearance's are the appearance's, in any order; queries and other pictures stay."""
    query, key, value = inputs()
    same = steering.cross_image_qkv(query, key, value, OUTPUT)
    assert all(jnp.array_equal(a, b) for a, b in zip(same, (query, key, value)))
    plain, swapped = (attnx.attention(*qkv) for qkv in ((query, key, value), steering.cross_image_qkv(query, key, value)))
    assert jnp.array_equal(swapped[1:], plain[1:])
    np.testing.assert_allclose(swapped[0], attnx.attention(query[:1], key[1:2], value[1:2])[0], atol=1e-12)
    order = jax.random.permutation(jax.random.key(1), 9)
    shuffled = steering.cross_image_qkv(query, *(x.at[APPEARANCE].set(x[APPEARANCE, order]) for x in (key, value)))
    np.testing.assert_allclose(attnx.attention(*shuffled)[0], swapped[0], atol=1e-12)
    for match, change in (("key: expected", dict(key=key[:2])), ("source: expected", dict(source=3)), ("output: expected", dict(output=3))):
        with pytest.raises(ValueError, match=match):
            steering.cross_image_qkv(**{**dict(query=query, key=key, value=value), **change})


@pytest.mark.parametrize("contrast", [0.5, 1.0, 1.67, 2.0])
def test_contrast(x64, contrast):
    """1 changes nothing. Rows sum to 1 before clipping and are not normalised after it; none gets lighter."""
    a = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (2, 5, 7)))
    got, mean = steering.contrast_weights(a, contrast), 1 / 7
    sharp = contrast * (a - mean) + mean
    np.testing.assert_allclose(sharp.sum(-1), 1)
    np.testing.assert_allclose(got, np.clip(sharp, 0, 1), atol=1e-15)
    if contrast == 1:
        np.testing.assert_allclose(got, a, atol=1e-15)
    single = (sharp > 1).sum(-1) == 0
    assert (got.sum(-1)[single] >= 1 - 1e-12).all()
    if contrast > 1:
        assert (got.sum(-1) > 1 + 1e-3).any()
        peaks = steering.contrast_weights(jnp.array([[0.9, 0.1, 0.0]]), contrast)  # one entry is clipped at 1, the negative ones are gone
        assert peaks.sum() >= 1


def test_contrast_as_weights(x64):
    """As weights of attention it is what it is of the maps, where keys are padding too; and so are slopes by the contrast itself."""
    query, key, value = inputs()
    seen = jnp.arange(9) < jnp.array([[9], [6], [0]])
    positions = jnp.where(seen, jnp.arange(9), -1).astype(jnp.int32)

    def of_maps(contrast, query, key, value):
        maps = attnx.attention_weights(query, key, key_positions=positions)
        return jnp.einsum("bnts,bsnh->btnh", steering.contrast_weights(maps, contrast, where=seen[:, None, None]), value)

    def as_weights(contrast, *qkv):
        return attnx.attention(*qkv, weights=steering.contrast_softmax(contrast), key_positions=positions, implementation="blockwise", block_sizes=(4, 4))

    for contrast in (0.5, 1.67):
        got, expected = (jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 3)))(jnp.asarray(contrast), query, key, value)
                         for f in (as_weights, of_maps))
        agreement.assert_agree(got, expected)


def test_adain(x64):
    """Inside the mask means and spreads are the reference's; outside nothing moves, bit for bit; empty masks change nothing."""
    x, reference = jax.random.normal(jax.random.key(0), (2, 2, 6, 5, 3)) * jnp.array([3.0, 1.0, 0.2])
    mask, counted = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 2, 6, 5))
    got = jax.jit(adain)(x, reference + 4, mask=mask, reference_mask=counted)
    assert jnp.array_equal(got[~mask], x[~mask])
    for a, b, pick in ((got, reference + 4, (mask, counted)), (adain(x, reference), reference, (None, None))):
        np.testing.assert_allclose(moments(a, pick[0])[0], moments(b, pick[1])[0], atol=1e-12)
        np.testing.assert_allclose(moments(a, pick[0])[1], moments(b, pick[1])[1], rtol=2e-4)  # 1e-5 is added to variances of 0.04 and more
    chosen = np.asarray(x[0])[np.asarray(mask[0])]
    np.testing.assert_allclose(moments(x, mask)[1][0, 0, 0], np.sqrt(chosen.var(0, ddof=1) + 1e-5))
    none = jnp.zeros_like(mask)
    assert jnp.array_equal(adain(x, reference, mask=none), x) and jnp.array_equal(adain(x, reference, reference_mask=none), x)
    for match, change in (("reference: expected", dict(reference=x[..., :2])), ("mask: expected shape", dict(mask=mask[:, 1:])), ("x: expected", dict(x=x[0, 0]))):
        with pytest.raises(ValueError, match=match):
            adain(**{**dict(x=x, reference=reference), **change})


def test_guidance(x64):
    """Strength 1 is the swapped prediction, 0 the plain one; rescaled noise has the spread that it is given, or part of it."""
    plain, swapped = jax.random.normal(jax.random.key(0), (2, 4, 3, 3)) * jnp.array([1.0, 2.0])[:, None, None, None]
    assert jnp.array_equal(steering.swap_guidance(plain, swapped, 0.0), plain)
    np.testing.assert_allclose(steering.swap_guidance(plain, swapped, 1.0), swapped, atol=1e-12)
    noise = steering.swap_guidance(plain, swapped, 3.5)
    np.testing.assert_allclose(steering.rescale_noise(noise, plain).std((1, 2)), plain.std((1, 2)))
    assert jnp.array_equal(steering.rescale_noise(noise, plain, 0.0), noise)
    assert jnp.array_equal(steering.rescale_noise(0 * noise, plain), 0 * noise)
    schedule = CrossImageSchedule()
    np.testing.assert_allclose([schedule.guidance(0), schedule.guidance(67)], [3.5, 1.75])
    assert [int(schedule.source(i)) for i in (0, 1, 35, 40)] == [STRUCTURE, APPEARANCE, STRUCTURE, APPEARANCE]
    assert [bool(schedule.normalises(i)) for i in (19, 20, 67)] == [False, True, True]
    assert not schedule.swaps(50, side=16)


def test_hooks():
    """Within a scanned model only the output changes, only in the decoder's layers, and only in the schedule's steps."""
    make = lambda *, rngs: TransformerBlock(8, attention=Attention(8, 2, mechanism=attnx.pairs(), rngs=rngs), rngs=rngs)
    graph, params = nnx.split(Stack(make, 3, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (3, 9, 8))

    @jax.jit
    def run(params, x, step):
        return nnx.merge(graph, params)(x, hooks=steering.cross_image_hooks(step, (1, 2), schedule=EARLY))

    plain = nnx.merge(graph, params)(x)
    for step in (3, 9):
        np.testing.assert_allclose(run(params, x, step), plain, atol=1e-5)
    for step in (4, 5):
        np.testing.assert_allclose(run(params, x, step)[1:], plain[1:], atol=1e-5)
        assert jnp.abs(run(params, x, step)[0] - plain[0]).max() > 1e-2

    def definition(source):  # once more, of arrays alone
        chosen = lambda layer, at: (layer > 0) & (at.batch == 0)
        swap = lambda qkv, layer, at: (qkv[0], *(jnp.where(chosen(layer, at), jnp.roll(x, -source, axis=0), x) for x in qkv[1:]))
        return {"qkv": swap, "weights": lambda a, layer, at: jnp.where(chosen(layer, at), jnp.clip(1.67 * a - 0.67 / 9, 0, 1), a)}

    for step, source in ((4, APPEARANCE), (5, STRUCTURE)):
        np.testing.assert_allclose(run(params, x, step), nnx.merge(graph, params)(x, hooks=definition(source)), atol=1e-5)
    same = jnp.stack([x[0]] * 3)
    hooks = steering.cross_image_hooks(4, (0, 1, 2), schedule=EARLY, contrast=1.0)
    assert list(hooks) == ["qkv"]
    np.testing.assert_allclose(nnx.merge(graph, params)(same, hooks=hooks), nnx.merge(graph, params)(same), atol=1e-6)
