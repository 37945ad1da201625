"""The recurrent engine: every form against the definition, and the definition against a recurrence in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnx.core import linear
from attnx.core.linear import LinearState, linear_attention
from attnx.mechanism import recurrent

B, T, N, K, H, HV = 2, 37, 4, 2, 5, 3

# Name: shape of the decay, with the number of its heads, and options. Chunks of 4 make two slabs of five, the last of them padded.
CASES = {
    "no decay": (None, K, {}),
    "constant": ((N,), N, {"normalize": True, "normalizer_floor": 1.0}),
    "constant, shared state, documents": ((K,), K, {"segments": True}),
    "per head, documents, normalised": ((B, T, N), N, {"normalize": True, "segments": True}),
    "per channel, documents, normalised": ((B, T, N, H), N, {"normalize": True, "segments": True, "scale": 0.7}),
    "per channel, shared state": ((B, T, K, H), K, {}),
}
UNORDERED = {
    "all": (None, K, {"is_causal": False, "normalize": True}),
    "documents, normalised": (None, K, {"is_causal": False, "segments": True, "normalize": True}),
}


def case(name, dtype=np.float64, length=T):
    """The arrays of a case (query, key, value, log_decay, state), the cotangents of output and state, the segments, and options."""
    shape, heads, options = (CASES | UNORDERED)[name]
    options = dict(options)
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    query, key, value = normal(B, length, N, H), normal(B, length, K, H), normal(B, length, K, HV)
    log_decay = None
    if shape is not None:
        log_decay = -random.exponential(size=tuple(length if n == T else n for n in shape))
        log_decay[random.random(log_decay.shape) < 0.1] = 0
        if log_decay.ndim > 1:
            log_decay[random.random(log_decay.shape) < 0.1] = -np.inf
        log_decay = jnp.asarray(log_decay, dtype)
    state = LinearState(normal(B, heads, H, HV))
    if options.get("normalize"):
        query, key, state = abs(query), abs(key), LinearState(state.memory, abs(normal(B, heads, H)))
    segments = np.cumsum(random.random((B, length)) < 0.1, axis=1)
    segments[random.random((B, length)) < 0.2] = -1
    segments = jnp.asarray(segments) if options.pop("segments", False) else None
    cotangents = normal(B, length, N, HV), jax.tree.map(lambda x: normal(*x.shape), state)
    return (query, key, value, log_decay, state), cotangents, segments, options


def recurrence(query, key, value, log_decay, state, segments=None, is_causal=True, normalize=False, normalizer_floor=None, scale=1.0):
    """The recurrence token by token in NumPy; where not causal a token reads the last state of its run."""
    query, key, value, memory = (np.asarray(x, np.float64) for x in (query, key, value, state.memory))
    heads, out = memory.shape[1], np.zeros((*query.shape[:3], value.shape[3]))
    final = np.zeros((B, heads, H, HV + 1))
    for b, m in np.ndindex(B, heads):
        s = np.concatenate([memory[b, m], np.asarray(state.normalizer)[b, m][:, None] if normalize else np.zeros((H, 1))], axis=1)
        states, runs, last, run = [], [], None, 0
        for t in range(query.shape[1]):
            if segments is None or segments[b, t] >= 0:
                if segments is not None and last is not None and last != segments[b, t]:
                    s, run = np.zeros_like(s), run + 1
                last = None if segments is None else segments[b, t]
                if log_decay is not None:
                    s = np.exp(np.broadcast_to((log_decay if log_decay.ndim == 1 else log_decay[b, t])[m], H))[:, None] * s
                head = m * K // heads
                s = s + np.outer(key[b, t, head], np.append(value[b, t, head], 1))
            states.append(s)
            runs.append(run)
        final[b, m] = s
        for t in range(query.shape[1]):
            if segments is None or segments[b, t] >= 0:
                seen = states[t if is_causal else max(u for u, r in enumerate(runs) if r == runs[t])]
                for n in range(m * N // heads, (m + 1) * N // heads):
                    *o, den = scale * query[b, t, n] @ seen
                    if normalize:
                        o = np.array(o) / (den if normalizer_floor is None else max(abs(den), normalizer_floor))
                    out[b, t, n] = o
    return out, LinearState(final[..., :-1], final[..., -1] if normalize else None)


@partial(jax.jit, static_argnames=("options",))
def evaluate(arrays, cotangents, segments, options):
    """Output, final state, and the gradients of a loss of both by query, key, value, log_decay and initial state."""

    def loss(arrays):
        query, key, value, log_decay, state = arrays
        result = linear_attention(query, key, value, log_decay=log_decay, initial_state=state, return_state=True, segment_ids=segments,
                                  **dict(options))
        return sum(jnp.vdot(x, c) for x, c in zip(jax.tree.leaves(result), jax.tree.leaves(cotangents))), result

    gradients, result = jax.grad(loss, has_aux=True)(arrays)
    return result, gradients


def run(implementation, arrays, cotangents, segments, options, chunk_size=4):
    if implementation == "chunked":
        options = options | {"chunk_size": chunk_size}
    return evaluate(arrays, cotangents, segments, tuple((options | {"implementation": implementation}).items()))


def assert_close(got, expected, tolerance):
    """Every array agrees to ``tolerance`` of the larger of 1 and its largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all(), path
        worst = np.abs(a - b).max(initial=0) / max(1, np.abs(b).max(initial=0))
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: {worst:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize("name", CASES | UNORDERED)
def test_forms_are_the_definition(x64, name):
    arrays, cotangents, segments, options = case(name)
    expected = run("parallel", arrays, cotangents, segments, options)
    assert_close(expected[0], recurrence(*arrays, segments, **options), 1e-12)
    for implementation in ("chunked", "recurrent") if name in CASES else ("chunked",):
        assert_close(run(implementation, arrays, cotangents, segments, options), expected, 1e-12)


@pytest.mark.parametrize("channels", [1, H])
def test_every_strength_of_decay_to_rounding(x64, channels):
    # Where nearly everything is forgotten, exponents are so large that a difference of two of them would have no correct digit.
    arrays, cotangents, _, options = case("per channel, shared state", length=70)
    choices = np.array([0, -1e-6, np.log(0.9), np.log(1e-4), -80, -1e4, -1e30, -np.inf])
    decay = jnp.asarray(np.random.default_rng(1).choice(choices, (B, 70, K, channels)))
    decay = decay if channels > 1 else decay[..., 0]
    arrays = (*arrays[:3], decay, arrays[4])
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents))
    got = run("chunked", *single, None, options, chunk_size=32)
    assert_close(got, run("recurrent", *jax.tree.map(lambda x: x.astype(jnp.float64), single), None, options), 2e-6)


def test_long_sequences(x64):
    # Channels of one head that forget nothing, little, much and nearly everything.
    length = 65536
    random = np.random.default_rng(0)
    query, key, value, cotangent = (jnp.asarray(random.normal(size=(1, length, 1, 4)), jnp.float32) for _ in range(4))
    decay = jnp.broadcast_to(jnp.log(jnp.array([1, 0.99999, 0.9, 1e-4], jnp.float32)), query.shape)

    attend = lambda q, k, v, g, implementation: linear_attention(q, k, v, log_decay=g, implementation=implementation)

    @partial(jax.jit, static_argnames="implementation")
    def results(arrays, cotangent, implementation):
        out, transpose = jax.vjp(partial(attend, implementation=implementation), *arrays)
        return out, transpose(cotangent)

    arrays = query, key, value, decay
    expected = results(*jax.tree.map(lambda x: x.astype(jnp.float64), (arrays, cotangent)), implementation="recurrent")
    assert_close(results(arrays, cotangent, implementation="chunked"), expected, 2e-6)


@pytest.mark.parametrize("name", ["constant", "per channel, shared state"])
def test_streaming_is_parallel(x64, name):
    (query, key, value, log_decay, _), _, _, options = case(name)
    heads = CASES[name][1]
    whole, final = linear_attention(query, key, value, log_decay=log_decay, return_state=True, **options)
    state = linear.init(B, heads, H, HV, normalize=options.pop("normalize", False), dtype=jnp.float64)
    shapes = jax.tree.map(jnp.shape, state)
    step = jax.jit(partial(linear.step, **options))
    outs = []
    for start, stop in ((0, 20), *((t, t + 1) for t in range(20, T))):
        piece = slice(start, stop)
        decay = log_decay if log_decay.ndim == 1 else log_decay[:, piece]
        state, out = step(state, query[:, piece], key[:, piece], value[:, piece], log_decay=decay)
        assert jax.tree.map(jnp.shape, state) == shapes
        outs.append(out)
    assert_close((jnp.concatenate(outs, axis=1), state), (whole, final), 1e-12)


SHARDED = {
    "no decay": (0, True),
    "per head, documents, normalised": (2, True),
    "per channel, shared state": (0, False),
    "documents, normalised": (3, True),
    "all": (0, True),
}


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_sequences(x64, name):
    # Five tokens a device, so documents begin and end anywhere, and in the second batch entry padding covers whole devices.
    offset, check_vma = SHARDED[name]
    arrays, cotangents, segments, options = case(name, length=40)
    if segments is not None:
        segments = segments.at[1, offset : offset + 17].set(-1)
    options |= {"chunk_size": 2}
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    tokens, whole = PartitionSpec(None, "sequence"), PartitionSpec()

    @partial(jax.jit, static_argnames="sharded")
    def evaluate(arrays, sharded):
        def attend(query, key, value, log_decay, state, segments, **extra):
            return linear_attention(query, key, value, log_decay=log_decay, initial_state=state, segment_ids=segments, return_state=True,
                                    **options, **extra)

        if sharded:
            specs = tokens, tokens, tokens, tokens, whole, tokens
            attend = partial(attend, axis_name="sequence")
            attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(tokens, whole), check_vma=check_vma)

        def loss(arrays):
            result = attend(*arrays, segments)
            return sum(jnp.vdot(x, c) for x, c in zip(jax.tree.leaves(result), jax.tree.leaves(cotangents))), result

        return jax.grad(loss, has_aux=True)(arrays)

    assert_close(evaluate(arrays, sharded=True), evaluate(arrays, sharded=False), 1e-12)


def test_sharded_batch_and_heads_need_no_communication():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    tokens = jax.ShapeDtypeStruct((4, 32, 4, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
    gradient = jax.grad(lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, chunk_size=8).sum(), argnums=(0, 1, 2, 3))
    text = jax.jit(gradient).lower(*[tokens] * 4).compile().as_text()
    assert "f32[2,32,1,8]" in text  # a device's part
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_transformations(x64):
    (query, key, value, log_decay, _), _, _, _ = case("per channel, shared state", length=6)
    arrays = query[:, :, :2, :2], key[:, :, :1, :2], value[:, :, :1, :2], log_decay[:, :, :1, :2]
    attend = lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, chunk_size=2)
    one = jax.jit(attend)(*arrays)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), arrays)
    assert_close(jax.jit(jax.vmap(jax.checkpoint(attend)))(*stacked)[0], one, 1e-14)
    assert_close(jax.jit(partial(jax.lax.map, lambda x: attend(*x)))(stacked)[0], one, 1e-14)


def test_second_derivatives_and_forward_mode(x64):
    (query, key, value, log_decay, _), _, _, _ = case("per channel, shared state", length=6)
    arrays = query, key, value, jnp.maximum(log_decay, -3)
    tangents = jax.tree.map(jnp.cos, arrays)

    @partial(jax.jit, static_argnames="implementation")
    def derivatives(implementation):
        attend = lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, chunk_size=2, implementation=implementation)
        loss = lambda *arrays: jnp.sum(jnp.sin(attend(*arrays)))
        forward = jax.jvp(attend, arrays, tangents)
        along = lambda *arrays: sum(map(jnp.vdot, jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays), tangents))
        return forward, jax.grad(along, argnums=(0, 1, 2, 3))(*arrays)

    assert_close(derivatives("chunked"), derivatives("parallel"), 1e-12)


def test_feature_maps(x64):
    # A map that the caller learns, singular at 0 and wider than the head; odd lengths and skipped tokens must not meet the singularity.
    (query, key, value, log_decay, _), _, segments, options = case("per head, documents, normalised")
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(H, 7)))
    key = jnp.where((segments < 0)[..., None, None], 0, key)

    @partial(jax.jit, static_argnames="inside")
    def evaluate(weights, query, key, inside):
        def loss(weights, query, key):
            phi = lambda x: jnp.exp(x / jnp.linalg.norm(x, axis=-1, keepdims=True) @ weights)
            options_ = options | {"log_decay": log_decay, "segment_ids": segments, "chunk_size": 2}
            if inside:
                out = linear_attention(query, key, value, feature_map=phi, **options_)
            else:
                some = jnp.where((segments < 0)[..., None, None], 1, key)
                out = linear_attention(phi(query), phi(some), value, **options_)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(weights, query, key)

    assert_close(evaluate(weights, query, key, True), evaluate(weights, query, key, False), 1e-12)


def test_padding_reaches_nothing(x64):
    arrays, cotangents, segments, options = case("per channel, documents, normalised")
    skipped = (segments < 0)[..., None, None]
    spoil = lambda x: jnp.where(skipped if x.ndim == 4 else skipped[..., 0], jnp.nan, x)
    spoiled = (*map(spoil, arrays[:4]), arrays[4])
    got, expected = (run("chunked", a, cotangents, segments, options) for a in (spoiled, arrays))
    assert_close(got, expected, 0)
    for x in (got[0][0], *got[1][:4]):
        assert not jnp.where(skipped, x, 0).any()


@pytest.mark.parametrize("is_causal", [True, False])
def test_keys_that_do_not_count(x64, is_causal):
    """A key mask leaves keys out of sums and normaliser, whatever they hold; where causal time passes for them."""
    (query, key, value, log_decay, _), _, _, _ = case("constant")
    query, key, seen = abs(query), abs(key), jnp.arange(T) % 3 != 1
    mask, decay = jnp.broadcast_to(seen, (B, T)), log_decay if is_causal else None
    spoiled = [jnp.where(seen[:, None, None], x, jnp.nan) for x in (key, value)]
    scores = jnp.einsum("btnh,bsnh->btns", query, jnp.repeat(key, N // K, axis=2)) * seen
    if is_causal:
        between = jnp.arange(T)[:, None] - jnp.arange(T)
        scores *= jnp.where(between >= 0, jnp.exp(log_decay[:, None, None] * between), 0).transpose(1, 0, 2)
    expected = jnp.einsum("btns,bsnv->btnv", scores / scores.sum(-1, keepdims=True), jnp.repeat(value, N // K, axis=2))
    for implementation in ("parallel", "chunked", *(["recurrent"] if is_causal else [])):
        out = linear_attention(query, *spoiled, log_decay=decay, key_mask=mask, normalize=True, is_causal=is_causal, implementation=implementation)
        np.testing.assert_allclose(out[:, 1:], expected[:, 1:], atol=1e-12)


def test_mechanism_of_an_encoder(x64):
    """Not causal, padding of the context is left out, on a mesh too; there is no streaming form."""
    (query, key, value, _, _), _, _, _ = case("constant", length=16)
    query, key, places = abs(query)[:, :8], abs(key), jnp.where(jnp.arange(16) < 11, jnp.arange(16), -1)
    mechanism = recurrent(normalize=True, is_causal=False)
    expected = linear_attention(query, key[:, :11], value[:, :11], normalize=True, is_causal=False)
    attend = jax.jit(lambda *args: mechanism(*args, key_positions=places))
    np.testing.assert_allclose(attend(query, key, value), expected, atol=1e-12)
    with jax.set_mesh(jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,))):
        np.testing.assert_allclose(jax.jit(lambda *args: mechanism(*args, key_positions=places))(query, key, value), expected, atol=1e-12)
    with pytest.raises(NotImplementedError, match="is_causal=False"):
        mechanism.init(1, 4, K, H, HV, jnp.float32)
    with pytest.raises(ValueError, match="log_decay: expected None"):
        recurrent(log_decay=jnp.zeros(2), is_causal=False)


def test_nothing_to_attend_to(x64):
    # Opposite signs make denominators of exactly 0, padding leaves the others without a key.
    query = key = jnp.array([1.0, -1.0, 1.0, 1.0]).reshape(1, 4, 1, 1)
    segments = jnp.array([[0, 0, -1, 1]])

    def loss(query, key, value):
        out = linear_attention(query, key, value, normalize=True, segment_ids=segments, chunk_size=2)
        return jnp.sum(out), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, 3 + key)
    np.testing.assert_array_equal(out[0, :, 0, 0], [4, 0, 0, 4])
    assert all(jnp.isfinite(g).all() for g in gradients)


def test_the_future_is_not_read(x64):
    arrays, cotangents, segments, options = case("per head, documents, normalised")
    cut = 18  # inside a chunk and inside a slab
    changed = (*(x.at[:, cut:].add(1) for x in arrays[:3]), *arrays[3:])
    got, expected = (run("chunked", a, cotangents, segments, options)[0][0] for a in (changed, arrays))
    np.testing.assert_array_equal(got[:, :cut], expected[:, :cut])
    assert (got[:, cut:] != expected[:, cut:]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    arrays, cotangents, segments, options = case("constant", dtype)
    options["chunk_size"] = 2
    attend = jax.jit(lambda q, k, v, g, state: linear_attention(q, k, v, log_decay=g, initial_state=state, return_state=True, **options))
    out, state = attend(*arrays)
    assert out.dtype == dtype and all(x.dtype == jnp.float32 for x in state)
    assert_close((out, state), attend(*jax.tree.map(lambda x: x.astype(jnp.float32), arrays)), float(jnp.finfo(dtype).eps))
    _, gradients = jax.eval_shape(lambda *args: run("chunked", *args, segments, options), arrays, cotangents)
    assert [x.dtype for x in jax.tree.leaves(gradients)] == [x.dtype for x in jax.tree.leaves(arrays)]


@pytest.mark.parametrize("batch, queries, keys, heads, size, is_causal", [
    (0, 5, 5, 2, 4, True), (1, 0, 0, 2, 4, True), (1, 1, 1, 1, 1, True), (2, 3, 3, 2, 1, True),
    (1, 0, 4, 2, 4, False), (2, 3, 0, 2, 4, False), (2, 7, 3, 2, 4, False),
])
def test_small_and_empty(batch, queries, keys, heads, size, is_causal):
    query, key = jnp.ones((batch, queries, heads, size)), jnp.ones((batch, keys, 1, size))
    results = [linear_attention(query, key, key, is_causal=is_causal, return_state=True, implementation=name, chunk_size=2)
               for name in ("chunked", "parallel")]
    assert_close(*results, 1e-6)
    counts = np.arange(1, keys + 1) if is_causal else np.full(queries, keys)
    expected = np.broadcast_to(size * counts[None, :, None, None], query.shape)
    assert_close(results[0], (expected, LinearState(np.full((batch, 1, size, size), float(keys)))), 1e-6)


def test_gradient_memory_is_linear_and_without_states(optimised):
    size = 32

    def temporary(length):
        x, decay = jax.ShapeDtypeStruct((1, length, 2, size), jnp.float32), jax.ShapeDtypeStruct((1, length, 2), jnp.float32)
        attend = lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, chunk_size=4)
        gradient = jax.jit(lambda *args: jax.vjp(attend, *args[:4])[1](args[4]))
        return gradient.lower(x, x, x, decay, x).compile().memory_analysis().temp_size_in_bytes

    lengths = 256, 1024, 4096
    slopes = np.diff([temporary(length) for length in lengths]) / np.diff(lengths)
    assert slopes.max() <= 1.1 * slopes.min()
    assert slopes.max() <= 4 * 2 * size * 4  # query, key, value and cotangent of a token; a state for each would take 8 times as many bytes


def flops(jaxpr):
    """Multiplications of all matrix products that a jaxpr runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += int(np.prod([lhs[axis] for axis in contracted]) * np.prod(equation.outvars[0].aval.shape))
        repeat = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeat * sum(map(flops, jaxprs_in_params(equation.params)))
    return total


def test_work_per_token_is_constant():
    def work(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        return flops(jax.make_jaxpr(lambda q, g: linear_attention(q, q, q, log_decay=g))(x, x).jaxpr)

    assert work(65536) == 8 * work(8192) == 32 * work(2048) > 0


QUERY, KEY = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 6, 2, 8))


@pytest.mark.parametrize("changes, error, words", [
    ({"key": KEY[..., :3]}, ValueError, "key: expected head size 8"),
    ({"key": KEY[:, :5], "value": KEY[:, :5]}, ValueError, "key: expected the query's length 6 with is_causal=True"),
    ({"log_decay": jnp.zeros(3)}, ValueError, "log_decay: expected shape"),
    ({"log_decay": jnp.zeros((2, 6))}, ValueError, "log_decay: expected shape"),
    ({"log_decay": jnp.zeros((2, 6, 4, 7))}, ValueError, "log_decay: expected shape"),
    ({"log_decay": jnp.zeros(4, int)}, TypeError, "log_decay: expected real numbers"),
    ({"log_decay": "slow"}, TypeError, "log_decay"),
    ({"log_decay": jnp.zeros(4), "is_causal": False}, ValueError, "log_decay: expected None with is_causal=False"),
    ({"segment_ids": jnp.zeros((2, 5), int)}, ValueError, "segment_ids: expected shape"),
    ({"key_mask": jnp.ones((2, 5), bool)}, ValueError, "key_mask: expected booleans [2, 6]"),
    ({"segment_ids": jnp.zeros((2, 6))}, TypeError, "segment_ids: expected integers"),
    ({"segment_ids": jnp.zeros((2, 6), int), "key": KEY[:, :5], "value": KEY[:, :5], "is_causal": False}, ValueError, "segment_ids"),
    ({"initial_state": jnp.zeros((2, 2, 8, 8))}, TypeError, "initial_state: expected a LinearState"),
    ({"initial_state": linear.init(2, 4, 8, 8)}, ValueError, "initial_state.memory: expected shape"),
    ({"initial_state": linear.init(2, 2, 8, 8), "normalize": True}, ValueError, "initial_state.normalizer: expected an array"),
    ({"normalizer_floor": 1.0}, ValueError, "normalizer_floor"),
    ({"normalizer_floor": "small", "normalize": True}, ValueError, "normalizer_floor"),
    ({"feature_map": 3}, TypeError, "feature_map: expected a function"),
    ({"feature_map": jnp.sum}, ValueError, "feature_map: expected to map"),
    ({"scale": "big"}, TypeError, "scale"),
    ({"chunk_size": 48}, ValueError, "chunk_size: expected a power of two"),
    ({"chunk_size": 0}, ValueError, "chunk_size"),
    ({"implementation": "flash"}, ValueError, "implementation: expected"),
    ({"implementation": "pallas"}, NotImplementedError, "the backend is 'cpu'; use 'chunked'"),
    ({"implementation": "recurrent", "is_causal": False}, NotImplementedError, "needs is_causal=True"),
    ({"axis_name": "sequence"}, ValueError, "axis_name: expected a mesh axis"),
])
def test_wrong_arguments_are_named(changes, error, words):
    with pytest.raises(error) as caught:
        linear_attention(**({"query": QUERY, "key": KEY, "value": KEY} | changes))
    assert words in str(caught.value)
