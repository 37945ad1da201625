"""Infini-attention: its limits, an unrolled loop, steps, the rules of the memory, documents, and the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, memory
from attnx.core import linear
from attnx.positions import Rotary

B, T, L, N, K, H, HV = 2, 18, 5, 4, 2, 8, 6
BETA = jnp.array([0.5, -1.0, 2.0, 0.0])
STATIC = ("segment_length", "rule", "position", "stop_gradient_every", "implementation", "block_sizes")
attend = jax.jit(memory.infini_attention, static_argnames=STATIC)


def inputs(length=T, dtype=jnp.float64, seed=0):
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, HV)
    return [jax.random.normal(jax.random.key(seed + i), shape, dtype) for i, shape in enumerate(shapes)]


def sigma(x):
    return jax.nn.elu(x) + 1


def unrolled(query, key, value, beta=BETA, rule="linear", length=L, position=Rotary()):
    """Segment by segment, head by head, by the paper's equations."""
    out = []
    key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
    m, z, g = jnp.zeros((B, N, H, HV)), jnp.zeros((B, N, H)), jax.nn.sigmoid(beta.astype(query.dtype))[:, None]
    places = jnp.arange(query.shape[1])
    for start in range(0, query.shape[1], length):
        q, k, v = (x[:, start:start + length] for x in (query, key, value))
        recall = lambda x: jnp.einsum("btnh,bnhv->btnv", sigma(x), m) / jnp.einsum("btnh,bnh->btn", sigma(x), z)[..., None] if start else 0.0
        at = places[start:start + length]
        turned = position(q, k, at, at) if position else (q, k)
        local = attnx.attention(*turned, v, mask=masks.causal(), implementation="reference")
        out.append(g * recall(q) + (1 - g) * local)
        m = m + jnp.einsum("btnh,btnv->bnhv", sigma(k), v - recall(k) if rule == "delta" else v)
        z = z + sigma(k).sum(1)
    return jnp.concatenate(out, 1)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_forms(x64, rule):
    """The scan is the unrolled loop, forward and backward, the last segment shorter; and so are steps, of one token or several, from anywhere in a segment."""
    args = (*inputs(), BETA)

    def graded(f):
        loss = lambda *args: (lambda out: (jnp.sum(jnp.sin(out)), out))(f(*args))
        slopes, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*args)
        return out, *slopes

    expected = graded(lambda *args: unrolled(*args, rule=rule))
    for a, b in zip(graded(lambda *args: memory.infini_attention(*args, segment_length=L, rule=rule, position=Rotary())), expected):
        np.testing.assert_allclose(a, b, atol=1e-11)
    step = jax.jit(lambda state, *tokens: memory.infini_step(state, *tokens, BETA, rule=rule, position=Rotary()))
    state, outs, at = memory.infini_init(B, K, H, HV, segment_length=L, dtype=jnp.float64), [], 0
    for count in (3, 1, 1, 1, 1, 3, 7, 1):
        state, out = step(state, *(x[:, at:at + count] for x in args[:3]))
        outs, at = [*outs, out], at + count
    assert at == T and int(state.next) == T
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected[0], atol=1e-11)


def test_one_segment(x64):
    """Without a past, the share of attention within the segment; and that alone where the memory has no share."""
    args = inputs()
    plain = attnx.attention(*args, mask=masks.causal())
    out, after = memory.infini_segment(*args, linear.init(B, K, H, HV, normalize=True, dtype=jnp.float64), BETA)
    np.testing.assert_allclose(out, (1 - jax.nn.sigmoid(BETA.astype(float)))[:, None] * plain, atol=1e-12)
    np.testing.assert_allclose(attend(*args, BETA, segment_length=100), out, atol=1e-12)
    np.testing.assert_allclose(after.normalizer, sigma(args[1]).sum(1), atol=1e-12)
    local = attend(*args, jnp.full(N, -40.0), segment_length=L)
    np.testing.assert_allclose(local, attnx.attention(*args, mask=masks.causal() & masks.within_blocks(L)), atol=1e-12)


def test_memory_alone(x64):
    """It is linear attention to all tokens of the segments before, and zero in the first; by the delta rule it is not."""
    query, key, value = inputs()
    weights = jnp.einsum("btnh,bsnh->bnts", sigma(query), jnp.repeat(sigma(key), 2, 2)) * (jnp.arange(T) < jnp.arange(T)[:, None] // L * L)
    total = weights.sum(-1, keepdims=True)
    expected = jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1), jnp.repeat(value, 2, 2))
    np.testing.assert_allclose(attend(query, key, value, jnp.full(N, 40.0), segment_length=L, position=Rotary()), expected, atol=1e-5)
    assert jnp.abs(attend(query, key, value, jnp.full(N, 40.0), segment_length=L, rule="delta") - expected).max() > 1e-3


def test_delta_rule(x64):
    """What the memory knows is not added again, though the normaliser is; the linear rule doubles it. Both read it as it was before the segment."""
    _, key, value = (x[:, :1] for x in inputs())
    empty = linear.init(B, K, H, HV, normalize=True, dtype=jnp.float64)
    for rule, factor in (("delta", 1), ("linear", 2)):
        once = memory.memory_update(key, value, empty, rule=rule)
        twice = memory.memory_update(key, value, once, rule=rule)
        np.testing.assert_allclose(twice.memory, factor * once.memory, atol=1e-6)
        np.testing.assert_allclose(twice.normalizer, 2 * once.normalizer, atol=1e-12)
        np.testing.assert_allclose(memory.memory_retrieve(key, once), value, atol=1e-12)


def test_the_memory_has_no_positions(x64):
    args = inputs()
    alone = jnp.full(N, 40.0)
    turned, plain = (attend(*args, alone, segment_length=L, position=position) for position in (Rotary(), None))
    np.testing.assert_allclose(turned, plain, atol=1e-12)


def test_documents(x64):
    """Documents that begin with a segment are as if they were apart; padding is skipped; none sees another, wherever it begins."""
    args = inputs()
    ids = jnp.broadcast_to(jnp.where(jnp.arange(T) == 3, -1, jnp.arange(T) >= 10), (B, T)).astype(jnp.int32)
    packed = attend(*args, BETA, segment_length=L, segment_ids=ids, rule="delta")
    np.testing.assert_allclose(packed[:, 10:], attend(*(x[:, 10:] for x in args), BETA, segment_length=L, rule="delta"), atol=1e-12)
    assert not packed[:, 3].any()
    ids = jnp.broadcast_to(jnp.arange(T) >= 7, (B, T)).astype(jnp.int32)
    out = attend(*args, BETA, segment_length=L, segment_ids=ids)
    others = [jnp.where((jnp.arange(T) < 7)[:, None, None], x, y) for x, y in zip(inputs(seed=5), args)]
    np.testing.assert_allclose(attend(*others, BETA, segment_length=L, segment_ids=ids)[:, 7:], out[:, 7:], atol=1e-12)


def test_stopped_gradients(x64):
    """Where gradients into the memory are stopped before every second segment, tokens of the first two have none from the last two but by values kept in between."""
    args = inputs()

    def slopes(every):
        late = lambda key: jnp.sum(memory.infini_attention(args[0], key, args[2], BETA, segment_length=L, stop_gradient_every=every)[:, 2 * L:] ** 2)
        return jax.jit(jax.grad(late))(args[1])

    free, stopped = slopes(None), slopes(2)
    assert (jnp.abs(free[:, :2 * L]).max((2, 3)) > 0).all() and not stopped[:, :2 * L].any() and stopped[:, 2 * L:].any()


def test_the_state_does_not_grow():
    layer = memory.InfiniAttention(32, 4, segment_length=16, rngs=nnx.Rngs(0))
    short, long = (jax.eval_shape(lambda length=length: layer.init_state(1, length)) for length in (1024, 65536))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), short) == jax.tree.map(lambda x: (x.shape, x.dtype), long)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_layer(rule):
    """Prefill and steps find what the call finds; gates start at one half; every parameter has a finite slope, though the first memory is empty."""
    layer = memory.InfiniAttention(16, 4, num_kv_heads=2, segment_length=4, rule=rule, position=Rotary(), rngs=nnx.Rngs(0))
    assert not layer.mechanism.beta[...].any()
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        state, first = layer.step(layer.init_state(batch=2, max_length=9), x[:, :8])
        return layer(x), jnp.concatenate([first, layer.step(state, x[:, 8:])[1]], 1)

    np.testing.assert_allclose(*both(params, x), atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert all(jnp.isfinite(g).all() and jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_errors():
    args = inputs(dtype=jnp.float32)
    for match, options in (("beta: expected shape", dict(beta=jnp.ones(3))), ("rule: expected one of", dict(rule="hebbian")), ("segment_ids: expected shape", dict(
            segment_ids=jnp.zeros((2, 3), jnp.int32))), ("segment_length: expected", dict(segment_length=0))):
        with pytest.raises(ValueError, match=match):
            memory.infini_attention(*args, **{"beta": BETA, **options})
