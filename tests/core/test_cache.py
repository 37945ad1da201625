"""Key/value caches: decoding is the parallel form, token by token or in pieces, in constant shapes and without recompilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import arrays, assert_agree

import attnx
from attnx import masks, scores, weights
from attnx.core import cache

T = 11


def sequence():
    return sequence_of(jnp.float64)


def sequence_of(dtype):
    return arrays(dtype, queries=T, keys=T)[:3]


def mechanism(name):
    bias = scores.t5_bias(jax.random.normal(jax.random.key(7), (8, 4), jnp.float32), max_distance=9)
    return {
        "contiguous": attnx.pairs(mask=masks.causal(), scores=bias, weights=weights.softmax(sink=0.1), implementation="reference"),
        "rolling": attnx.pairs(mask=masks.sliding_window(4), scores=bias, implementation="blockwise"),
        "rolling, other weights": attnx.pairs(mask=masks.sliding_window(3) & masks.dilated(2), weights=weights.sigmoid(), scale=0.7,
                                              implementation="reference"),
        "contiguous, read where it lies": attnx.pairs(mask=masks.causal(), scores=bias, weights=weights.softmax(sink=0.1)),
    }[name]


SLOTS = {"contiguous": T, "rolling": 4, "rolling, other weights": 3, "contiguous, read where it lies": T}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SLOTS)
def test_decoding_is_the_parallel_form(name):
    """Single tokens, a prefill longer than a rolling cache, and pieces of several tokens in between."""
    query, key, value = sequence()
    mixer = mechanism(name)
    expected = jax.jit(mixer)(query, key, value)
    traces = []

    @jax.jit
    def step(state, query, key, value):
        traces.append(query.shape[1])
        return mixer.step(state, query, key, value)

    for pieces in ([1] * T, [6, 1, 1, 1, 1, 1], [1, 5, 5]):
        state = mixer.init(2, T, 2, 5, 3, jnp.float64)
        shapes, outputs, start = jax.tree.map(jnp.shape, state), [], 0
        assert state.key.shape == (2, SLOTS[name], 2, 5) and state.value.shape == (2, SLOTS[name], 2, 3)
        for size in pieces:
            piece = slice(start, start + size)
            state, out = step(state, query[:, piece], key[:, piece], value[:, piece])
            assert jax.tree.map(jnp.shape, state) == shapes
            outputs.append(out)
            start += size
        assert_agree(jnp.concatenate(outputs, axis=1), expected, 1e-13)
    assert sorted(traces) == [1, 5, 6]


def test_contents():
    """Slots are positions modulo their number, the oldest overwritten; empty ones are at -1."""
    key, value = jnp.arange(1.0, 8).reshape(1, 7, 1, 1), -jnp.arange(1.0, 8).reshape(1, 7, 1, 1)
    state = cache.init(1, 4, 1, 1)
    assert state.positions.tolist() == [-1] * 4 and state.next == 0
    state = cache.append(state, key[:, :3], value[:, :3])
    assert state.positions.tolist() == [0, 1, 2, -1] and state.next == 3
    state = cache.append(state, key[:, 3:4], value[:, 3:4])
    state = cache.append(state, key[:, 4:7], value[:, 4:7])
    assert state.positions.tolist() == [4, 5, 6, 3] and state.next == 7
    np.testing.assert_array_equal(state.key.ravel(), [5, 6, 7, 4])
    np.testing.assert_array_equal(state.value.ravel(), [-5, -6, -7, -4])


def test_one_layer_among_stacked_caches():
    """A layer's cache behaves like one that stands alone, one token or several, contiguous or rolling, and leaves the other layers as they were."""
    key, value = jnp.arange(1.0, 15).reshape(2, 7, 1, 1), -jnp.arange(1.0, 15).reshape(2, 7, 1, 1)

    def fill(state):
        for start, stop in ((0, 3), (3, 4), (4, 5), (5, 7)):
            state = cache.append(state, key[:, start:stop], value[:, start:stop])
        return state

    caches = jax.tree.map(lambda x: jnp.stack([x] * 3), cache.init(2, 4, 1, 1))
    mine = jax.jit(lambda caches, layer: cache.stacked(caches, fill(cache.layer_of(caches, layer))))(caches, 1)
    alone = fill(cache.init(2, 4, 1, 1))
    for stacked, empty, own in zip(mine, caches, alone):
        np.testing.assert_array_equal(stacked[1], own)
        np.testing.assert_array_equal(stacked[::2], empty[::2])
    part = cache.layer_of(mine, 1)
    np.testing.assert_array_equal(part.key, alone.key)
    np.testing.assert_array_equal(part.value, alone.value)
    with pytest.raises(ValueError, match="key: expected at most as many new tokens"):
        cache.append(part, key, value)


def test_prefill_longer_than_a_rolling_cache():
    """Only the last tokens stay."""
    query, key, value = sequence_of(jnp.float32)
    state, _ = jax.jit(mechanism("rolling").step)(mechanism("rolling").init(2, T, 2, 5, 3, jnp.float32), query, key, value)
    assert sorted(state.positions.tolist()) == [7, 8, 9, 10] and state.next == T
    np.testing.assert_array_equal(state.key, key[:, state.positions])
    np.testing.assert_array_equal(state.value, value[:, state.positions])


def test_cache_keeps_its_dtype():
    """Tokens are stored in the cache's dtype, and the output has the query's."""
    query, key, value = (x.astype(jnp.bfloat16) for x in arrays(jnp.float32, queries=2, keys=2)[:3])
    mixer = attnx.pairs(mask=masks.causal(), implementation="reference")
    state, out = mixer.step(mixer.init(2, 8, 2, 5, 3, jnp.bfloat16), query, key, value)
    assert state.key.dtype == state.value.dtype == out.dtype == jnp.bfloat16
    assert cache.append(state, key.astype(jnp.float32), value.astype(jnp.float32)).key.dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation, tokens", [(None, 1), ("reference", 1), ("blockwise", 2), (None, 9)])
def test_cache_narrower_or_wider_than_the_query(implementation, tokens):
    """Computed in the wider dtype, returned in the query's: one token, a few, a prefill."""
    mixer = attnx.pairs(mask=masks.causal(), implementation=implementation)
    arguments = [x[:, :tokens] for x in sequence_of(jnp.float32)]
    for dtype, cache_dtype, tolerance in ((jnp.float32, jnp.bfloat16, 1e-5), (jnp.bfloat16, jnp.float32, 2e-2)):
        query, key, value = (x.astype(dtype) for x in arguments)
        _, out = jax.jit(mixer.step)(mixer.init(2, T, 2, 5, 3, cache_dtype), query, key, value)
        stored = [x.astype(cache_dtype).astype(jnp.float32) for x in (key, value)]
        assert out.dtype == dtype
        assert_agree(out, attnx.attention(query.astype(jnp.float32), *stored, mask=masks.causal(), implementation="reference"), tolerance)


@pytest.mark.parametrize("implementation, tokens", [("blockwise", 1), ("pallas", 2), ("blockwise", 9)])
def test_hooks_choose_the_definition(implementation, tokens):
    """Hooks act on materialised scores whatever implementation was named, in steps as in the parallel form."""
    query, key, value = (x[:, :tokens] for x in sequence_of(jnp.float32))
    mixer = attnx.pairs(mask=masks.causal(), implementation=implementation)
    hooks = {"weights": lambda w, at: jnp.where(at.key == 0, 0, w)}
    state = mixer.init(2, T, 2, 5, 3, jnp.float32)
    step, parallel = jax.jit(lambda: (mixer.step(state, query, key, value, hooks=hooks)[1], mixer(query, key, value, hooks=hooks)))()
    assert_agree(step, parallel, 1e-6)


@pytest.mark.usefixtures("x64")
def test_steps_are_differentiable(tokens=3):
    """Gradients reach queries, tokens, earlier tokens in the cache, and the parts."""
    query, key, value = sequence()
    mixer = mechanism("contiguous, read where it lies")

    @jax.jit
    def gradients(mixer, query, key, value):
        def stepped(mixer, query, key, value):
            state, _ = mixer.step(mixer.init(2, T, 2, 5, 3, jnp.float64), query[:, :-tokens], key[:, :-tokens], value[:, :-tokens])
            return jnp.sin(mixer.step(state, query[:, -tokens:], key[:, -tokens:], value[:, -tokens:])[1]).sum()

        parallel = lambda mixer, *args: jnp.sin(mixer(*args)[:, -tokens:]).sum()
        return [jax.grad(loss, (0, 1, 2, 3))(mixer, query, key, value) for loss in (stepped, parallel)]

    assert_agree(*gradients(mixer, query, key, value), 1e-11)


@pytest.mark.usefixtures("x64")
def test_decoding_under_scan():
    """The state is a carry: a whole decode in one compiled loop."""
    query, key, value = sequence()
    mixer = mechanism("rolling")
    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], (query, key, value))

    @jax.jit
    def decode(tokens):
        return jax.lax.scan(lambda state, token: mixer.step(state, *token), mixer.init(2, T, 2, 5, 3, jnp.float64), tokens)[1]

    assert_agree(decode(tokens)[:, :, 0].swapaxes(0, 1), jax.jit(mixer)(query, key, value), 1e-13)


@pytest.mark.usefixtures("x64")
def test_segments():
    """segment_ids keep packed documents apart, with or without another mask."""
    query, key, value = sequence()
    ids = jnp.array([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2])
    got, expected = jax.jit(lambda: (
        [attnx.pairs(mask=mask, implementation="reference")(query, key, value, segment_ids=ids) for mask in (masks.causal(), None)],
        [attnx.attention(query, key, value, mask=mask, implementation="reference") for mask in (masks.causal() & masks.documents(ids), masks.documents(ids))]))()
    assert_agree(got, expected, 1e-13)


@pytest.mark.usefixtures("x64")
def test_mechanism_is_a_pytree():
    """Its arrays are those of its parts: gradients reach them, and dropout acts only where a key is given."""
    query, key, value = sequence()
    mixer = attnx.pairs(mask=masks.causal(), scores=scores.alibi(jnp.ones(4)), dropout_rate=0.5, implementation="reference")

    @jax.jit
    def run(mixer):
        gradient = jax.grad(lambda mixer: jnp.sin(mixer(query, key, value)).sum())(mixer)
        return gradient, mixer(query, key, value), mixer(query, key, value, dropout_key=jax.random.key(0))

    gradient, plain, dropped = run(mixer)
    assert gradient.scores[0].slopes.shape == (4,) and (gradient.scores[0].slopes != 0).all()
    assert not np.allclose(plain, dropped)
