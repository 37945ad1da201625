import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import masks, pairs
from attnx.nn import Attention, Constant
from attnx.positions import Rotary, rotary

# The quickest to compile.
CAUSAL, FULL = pairs(mask=masks.causal(), implementation="reference"), pairs(implementation="reference")
B, T, S, D, N, K, H = 2, 6, 5, 16, 4, 2, 4
EVERYTHING = dict(num_kv_heads=K, head_size=H, position=Rotary(), qk_norm="rms", output_gate="head", use_bias=True)


def inputs(seed=0, dtype=jnp.float32):
    x, context = jax.random.normal(jax.random.key(seed), (2, B, max(T, S), D), dtype)
    return x[:, :T], context[:, :S]


def build(mechanism, **options):
    """A layer with every option, its parameters drawn anew so that no bias is zero and no scale one."""
    @nnx.jit
    def make():
        module = Attention(D, N, mechanism=mechanism, rngs=nnx.Rngs(0), **EVERYTHING, **options)
        leaves, tree = jax.tree.flatten(nnx.state(module, nnx.Param))
        keys = jax.random.split(jax.random.key(7), len(leaves))
        nnx.update(module, jax.tree.unflatten(tree, [jax.random.normal(k, p.shape, p.dtype) / 2 for k, p in zip(keys, leaves)]))
        return module

    return make()


def definition(params, x, context, positions, key_positions, causal):
    """The layer written out with every weight materialised, for the options of EVERYTHING."""
    def project(name, y):
        p = params[name]
        return jnp.einsum("bte,enh->btnh", y, p["kernel"]) + p["bias"]

    def norm(name, y):
        return y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]

    query = rotary(norm("query_norm", project("query", x)), positions)
    key = rotary(norm("key_norm", project("key", context)), key_positions)
    key, value = (jnp.repeat(y, N // K, axis=2) for y in (key, project("value", context)))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H)
    allowed = (key_positions >= 0)[:, None, None, :]
    if causal:
        allowed = allowed & (positions[:, None, :, None] >= key_positions[:, None, None, :])
    weights = jax.nn.softmax(scores, axis=-1, where=allowed)
    out = jnp.einsum("bnts,bsnh->btnh", weights, value) * jax.nn.sigmoid(project("gate", x))
    return jnp.einsum("btnh,nhe->bte", out, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.parametrize("cross", [False, True])
def test_equals_its_definition_with_gradients(cross):
    with jax.enable_x64(True):
        module = build(FULL if cross else CAUSAL, param_dtype=jnp.float64)
        x, context = inputs(dtype=jnp.float64)
        positions = jnp.array([[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]])
        key_positions = jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]) if cross else positions
        graph, params = nnx.split(module)

        def ours(params, x, context):
            where = dict(context=context, context_positions=key_positions) if cross else {}
            return nnx.merge(graph, params)(x, positions=positions, **where)

        def theirs(params, x, context):
            return definition(nnx.to_pure_dict(params), x, context if cross else x, positions, key_positions, causal=not cross)

        def both(f):
            out, pull = jax.vjp(f, params, x, context)
            return out, pull(jnp.cos(out))

        (out, gradients), (expected, expected_gradients) = jax.jit(lambda: (both(ours), both(theirs)))()
        np.testing.assert_allclose(out, expected, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), gradients, expected_gradients)
        assert all(abs(g).max() > 1e-6 for g in jax.tree.leaves(gradients[0]))


def test_equals_flax_with_flax_parameters():
    theirs = nnx.MultiHeadAttention(N, D, dtype=jnp.float32, decode=False, normalize_qk=True, rngs=nnx.Rngs(1))
    ours = Attention(D, N, mechanism=FULL, qk_norm=lambda size, **kw: nnx.LayerNorm(size, use_bias=False, **kw),
                     use_bias=True, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(theirs, nnx.Param))
    state = {name.replace("_ln", "_norm"): value for name, value in state.items()}
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(ours, nnx.Param)))
    assert shapes == jax.tree.map(jnp.shape, state)
    nnx.update(ours, state)
    x, context = inputs()
    f = nnx.jit(lambda m, *args: m(*args))
    np.testing.assert_allclose(f(ours, x), f(theirs, x), atol=1e-5)
    np.testing.assert_allclose(f(ours, x, context), f(theirs, x, context), atol=1e-5)


def test_initial_values_are_those_of_flax():
    ours = Attention(64, 4, mechanism=CAUSAL, use_bias=True, rngs=nnx.Rngs(0))
    assert abs(ours.query.kernel[...].std() - 1 / 8) < 0.01 and abs(ours.out.kernel[...].std() - 1 / 8) < 0.01
    assert (ours.value.bias[...] == 0).all()
    same = Attention(64, 4, mechanism=CAUSAL, use_bias=True, rngs=nnx.Rngs(0))
    assert (same.key.kernel[...] == ours.key.kernel[...]).all() and (ours.key.kernel[...] != ours.query.kernel[...]).any()


@pytest.fixture(scope="module")
def everything():
    return build(CAUSAL)


@nnx.jit
def call(module, x, **where):
    return module(x, **where)


@nnx.jit
def step(module, state, x):
    return module.step(state, x)


def test_future_does_not_matter(everything):
    x, _ = inputs()
    moved = call(everything, x.at[:, 3].add(1.0)) - call(everything, x)
    assert (moved[:, :3] == 0).all() and abs(moved[:, 3:]).max(-1).min() > 1e-4


def test_segments_are_separate(everything):
    x, _ = inputs()
    ids = jnp.array([[0, 0, 0, 1, 1, 1]] * B)
    moved = call(everything, x.at[:, 1].add(1.0), segment_ids=ids) - call(everything, x, segment_ids=ids)
    assert (moved[:, 3:] == 0).all() and abs(moved[:, 1]).max() > 1e-4


def test_steps_equal_the_call(everything):
    x, _ = inputs()
    expected = call(everything, x)
    state = first = everything.init_state(B, T + 2)
    outs = []
    for t in range(T):
        state, out = step(everything, state, x[:, t:t + 1])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=1e-5)
    assert int(state.position) == T
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, first)
    assert jax.tree.map(lambda a: a.dtype, state) == jax.tree.map(lambda a: a.dtype, first)
    state, prefilled = step(everything, first, x[:, :T - 1])
    _, last = step(everything, state, x[:, T - 1:])
    np.testing.assert_allclose(jnp.concatenate([prefilled, last], 1), expected, atol=1e-5)


def test_cross_attention_steps_equal_the_call():
    module = build(FULL)
    x, context = inputs()
    where = dict(context=context, context_positions=jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]))
    expected = call(module, x, **where)
    state = module.init_state(B, T, **where)
    outs = []
    for t in range(T):
        state, out = step(module, state, x[:, t:t + 1])
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=1e-5)


def test_sizes_that_differ():
    module = Attention(D, N, mechanism=FULL, head_size=3, value_size=5, num_kv_heads=1, context_features=7,
                       out_features=9, output_gate="channel", rngs=nnx.Rngs(0))
    shapes = {path[0]: p.shape for path, p in nnx.to_flat_state(nnx.state(module))}
    assert shapes == dict(query=(D, N, 3), key=(7, 1, 3), value=(7, 1, 5), out=(N, 5, 9), gate=(D, N, 5))
    assert call(module, jnp.ones((B, T, D)), context=jnp.ones((B, S, 7))).shape == (B, T, 9)


@pytest.mark.parametrize("dtype, param_dtype, x_dtype, expected", [
    (None, jnp.float32, jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16),
    (None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)])
def test_dtypes_as_in_flax(dtype, param_dtype, x_dtype, expected):
    def build(x):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        ours = Attention(D, N, mechanism=CAUSAL, **common, **EVERYTHING)
        return ours(x), nnx.MultiHeadAttention(N, D, decode=False, **common)(x), nnx.state(ours)

    out, theirs, state = nnx.eval_shape(build, jax.ShapeDtypeStruct((B, T, D), x_dtype))
    assert out.dtype == theirs.dtype == expected
    assert {p.dtype for p in jax.tree.leaves(state)} == {jnp.dtype(param_dtype)}


def test_logical_axes_and_split_merge(everything):
    specs = {path: tuple(p.get_value()) for path, p in nnx.to_flat_state(nnx.get_partition_spec(nnx.state(everything)))}
    assert specs["query", "kernel"] == ("embed", "heads", "head_size") and specs["key", "bias"] == ("kv_heads", "head_size")
    assert specs["out", "kernel"] == ("heads", "head_size", "embed") and specs["out", "bias"] == ("embed",)
    assert specs["gate", "kernel"] == ("embed", "heads", None) and specs["key_norm", "scale"] == ("head_size",)
    with nnx.logical_axis_rules((("heads", "tensor"), ("embed", None), ("head_size", None), ("kv_heads", None))):
        assert tuple(nnx.get_partition_spec(nnx.state(everything))["query"]["kernel"].get_value()) == (None, "tensor", None)
    x, _ = inputs()
    graph, params = nnx.split(everything)
    hash(graph)
    np.testing.assert_allclose(call(nnx.merge(graph, params), x), call(everything, x), atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A mechanism that holds an array."""

    factor: jax.Array

    def __call__(self, query, key, value, **where):
        return CAUSAL(query, key, value, **where) * self.factor

    def init(self, *sizes):
        return CAUSAL.init(*sizes)

    def step(self, state, query, key, value):
        state, out = CAUSAL.step(state, query, key, value)
        return state, out * self.factor


class Learned(nnx.Module):
    """A mechanism that owns a parameter."""

    def __init__(self, *, rngs):
        self.factor = nnx.Param(3.0 * jnp.ones(()))

    def __call__(self, query, key, value, **where):
        return Scaled(self.factor[...])(query, key, value, **where)

    def init(self, *sizes):
        return CAUSAL.init(*sizes)

    def step(self, state, query, key, value):
        return Scaled(self.factor[...]).step(state, query, key, value)


def test_mechanisms_with_arrays_and_parameters():
    x, _ = inputs()
    plain, held, learned = (Attention(D, N, mechanism=m, rngs=nnx.Rngs(0)) for m in (CAUSAL, Scaled(jnp.array(3.0)), Learned))
    np.testing.assert_allclose(call(held, x), 3 * call(plain, x), atol=1e-5)
    np.testing.assert_allclose(call(learned, x), 3 * call(plain, x), atol=1e-5)
    state, out = step(held, held.init_state(B, T), x)
    np.testing.assert_allclose(out, call(held, x), atol=1e-5)
    assert len(jax.tree.leaves(nnx.state(held, nnx.Param))) == 4 and len(jax.tree.leaves(nnx.state(held, Constant))) == 1
    gradient = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum()))(learned, x)
    assert len(jax.tree.leaves(gradient)) == 5 and gradient["mechanism"]["factor"][...] > 0


def test_vmap_over_batches_of_batches(everything):
    x, _ = inputs()
    several = jnp.stack([x, 2 * x, -x])
    out = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0)))(everything, several)
    np.testing.assert_allclose(out[1], call(everything, 2 * x), atol=1e-5)


@pytest.mark.parametrize("options, named", [
    (dict(num_kv_heads=3), "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
    (dict(features=18), "num_heads: expected a divisor of features = 18, got 4"),
    (dict(output_gate="all"), "output_gate"),
    (dict(qk_norm="batch"), "norm: expected 'rms', 'layer' or a constructor, got 'batch'"),
])
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        Attention(options.pop("features", D), N, mechanism=CAUSAL, rngs=nnx.Rngs(0), **options)


def test_wrong_inputs_are_named(everything):
    x, context = inputs()
    for arguments, named in [((x[0],), r"x: expected shape \[B, T, D\] with D = 16, got \(6, 16\)"),
                             ((x[..., :3],), "x: expected shape"), ((x, context[..., :3]), "context: expected shape")]:
        with pytest.raises(ValueError, match=named):
            everything(*arguments)
    with pytest.raises(ValueError, match="hooks: expected stages among"):
        everything(x, hooks={"logits": lambda value, layer, at: value})
    with pytest.raises(TypeError, match="hooks"):
        everything(x, hooks={"output": 3})
    with pytest.raises(TypeError, match="mechanism"):
        Attention(D, N, mechanism="softmax", rngs=nnx.Rngs(0))
