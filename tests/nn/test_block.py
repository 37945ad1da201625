import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import masks, pairs
from attnx.nn import MLP, Attention, Embedding, Stack, TransformerBlock
from attnx.nn.common import constrain, dropout
from attnx.positions import Rotary, sinusoidal

# The quickest to compile.
CAUSAL, FULL = pairs(mask=masks.causal(), implementation="reference"), pairs(implementation="reference")
B, T, S, D, N = 2, 6, 5, 16, 4
X, CONTEXT = jax.random.normal(jax.random.key(0), (B, T, D)), jax.random.normal(jax.random.key(1), (B, S, D))


def make_block(cross=False, *, rngs, **options):
    attention = functools.partial(Attention, D, N, rngs=rngs)
    return TransformerBlock(D, attention=attention(mechanism=CAUSAL, position=Rotary()), mlp=MLP(D, 24, rngs=rngs),
                            cross_attention=attention(mechanism=FULL) if cross else None, rngs=rngs, **options)


@nnx.jit
def call(module, x, **inputs):
    return module(x, **inputs)


@nnx.jit
def step(module, state, x):
    return module.step(state, x)


@pytest.mark.parametrize("norm_position, norm", [("pre", "rms"), ("post", "layer")])
def test_block_is_its_equation(norm_position, norm):
    block = make_block(cross=True, norm=norm, norm_position=norm_position, rngs=nnx.Rngs(0))

    @nnx.jit
    def by_hand(b, x, context):
        for norm, f in ((b.attention_norm, b.attention), (b.cross_norm, lambda y: b.cross_attention(y, context)), (b.mlp_norm, b.mlp)):
            x = x + f(norm(x)) if norm_position == "pre" else norm(x + f(x))
        return x

    expected = by_hand(block, X, CONTEXT)
    np.testing.assert_allclose(call(block, X, context=CONTEXT), expected, atol=1e-6)
    state, out = step(block, block.init_state(B, T, context=CONTEXT), X)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_block_without_mlp_and_residual_dtype():
    def build(x):
        block = TransformerBlock(D, attention=Attention(D, N, mechanism=CAUSAL, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
        return block(x)

    assert nnx.eval_shape(build, jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)).dtype == jnp.bfloat16


def test_mlp_is_its_equation():
    for gated in (True, False):
        mlp = MLP(D, 24, activation=jax.nn.gelu, gated=gated, use_bias=True, rngs=nnx.Rngs(0))
        mlp.up.bias[...] += 0.5
        hidden = X @ mlp.up.kernel[...] + mlp.up.bias[...]
        hidden = jax.nn.gelu(X @ mlp.gate.kernel[...]) * hidden if gated else jax.nn.gelu(hidden)
        np.testing.assert_allclose(mlp(X), hidden @ mlp.down.kernel[...], atol=1e-5)


def test_dropout():
    x = jnp.ones((200, 50), jnp.bfloat16)
    y = dropout(x, 0.25, jax.random.key(0))
    assert y.dtype == x.dtype and set(np.unique(y.astype(np.float32))) == {0.0, np.float32(jnp.bfloat16(1 / 0.75))}
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert (dropout(x, 0.25, None) == x).all() and (dropout(x, 0.0, jax.random.key(0)) == x).all()


def test_dropout_reaches_every_layer_differently_and_is_repeatable():
    build = nnx.jit(lambda: Stack(functools.partial(make_block, dropout_rate=0.5), 2, rngs=nnx.Rngs(0)))
    stack = build()
    a, b, again = (call(stack, X, dropout_key=jax.random.key(seed)) for seed in (1, 2, 1))
    assert (a == again).all() and (a != b).any()
    # With the input's own contribution removed, a layer that repeated the mask of the one before would leave zeros in common.
    seen = []
    for layer in range(2):
        one = build()
        for module in (one.blocks[0].attention.out, one.blocks[0].mlp.down):
            module.kernel[...] = module.kernel[...].at[1 - layer].set(0)
        seen.append(call(one, X, dropout_key=jax.random.key(1)) == X)
    assert 0 < (seen[0] & seen[1]).mean() < 0.8 * seen[0].mean()


def unstack(stack, group):
    graph, params = nnx.split(stack.blocks)
    return nnx.merge(graph, jax.tree.map(lambda p: p[group], params))


def test_scan_equals_loop_with_gradients():
    def bare(mechanism, *, rngs):
        wide = dict(param_dtype=jnp.float64, rngs=rngs)
        return TransformerBlock(D, attention=Attention(D, N, mechanism=mechanism, position=Rotary(), **wide), **wide)

    def stack(**options):
        return Stack([functools.partial(bare, m) for m in (CAUSAL, FULL)], 4, rngs=nnx.Rngs(0), **options)

    def looped(params, x):
        for group in range(2):
            for block in unstack(nnx.merge(graph, params), group):
                x = block(x)
        return x

    def both(f):
        out, pull = jax.vjp(f, params, X.astype(jnp.float64))
        return out, pull(jnp.cos(out))

    with jax.enable_x64(True):
        graph, params = nnx.split(nnx.jit(stack)())
        expected = jax.jit(lambda: both(looped))()
        for options in (dict(), dict(unroll=True, remat="nothing_saveable")):
            other, _ = nnx.split(nnx.eval_shape(lambda: stack(**options)))
            ours = jax.jit(lambda: both(lambda params, x: nnx.merge(other, params)(x)))()
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), ours, expected)


def test_remat_keeps_less():
    def kept(remat):
        graph, params = nnx.split(nnx.eval_shape(lambda: Stack(make_block, 2, remat=remat, rngs=nnx.Rngs(0))))
        residuals = jax.eval_shape(lambda p, x: jax.vjp(lambda p, x: nnx.merge(graph, p)(x), p, x)[1], params, X)
        return sum(r.size for r in jax.tree.leaves(residuals)) - sum(p.size for p in jax.tree.leaves(params))

    assert kept("nothing_saveable") < 0.2 * kept("dots_saveable") < 0.2 * kept(None)


def test_stack_steps_equal_the_call():
    stack = Stack(functools.partial(make_block, cross=True), 3, rngs=nnx.Rngs(0))
    expected = call(stack, X, context=CONTEXT)
    state = nnx.jit(lambda m, c: m.init_state(B, T, context=c))(stack, CONTEXT)
    for t in range(T):
        state, out = step(stack, state, X[:, t:t + 1])
        np.testing.assert_allclose(out, expected[:, t:t + 1], atol=1e-5)


def test_layers_differ_and_carry_their_axis():
    stack = Stack(make_block, 3, rngs=nnx.Rngs(0))
    kernel = stack.blocks[0].attention.query.kernel
    assert kernel.shape == (3, D, N, D // N) and (kernel[...][0] != kernel[...][1]).any()
    for _, spec in nnx.to_flat_state(nnx.get_partition_spec(nnx.state(stack))):
        assert spec.get_value()[0] == "layers"


def test_embedding():
    embedding = Embedding(11, D, scaled=True, position="sinusoidal", rngs=nnx.Rngs(0))
    tokens, positions = jnp.array([[3, 10, 0]]), jnp.array([5, 0, 2])
    table = embedding.table[...]
    np.testing.assert_allclose(embedding(tokens, positions), table[tokens] * 4 + sinusoidal(positions, D), atol=1e-6)
    np.testing.assert_allclose(embedding.logits(X), X @ table.T, atol=1e-5)
    untied = Embedding(11, D, tied=False, position="learned", max_length=8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = untied(tokens)
    assert (x == untied.table[...][tokens] + untied.positions[...][:3]).all()
    assert x.dtype == jnp.bfloat16 and untied.logits(x).dtype == jnp.float32
    np.testing.assert_allclose(untied.logits(x), x.astype(jnp.float32) @ untied.output[...].astype(jnp.float32).T, atol=1e-5)


@pytest.mark.parametrize("call, named", [
    (lambda rngs: make_block(norm_position="mid", rngs=rngs), "norm_position"),
    (lambda rngs: make_block(dropout_rate=1.0, rngs=rngs), "dropout_rate"),
    (lambda rngs: make_block(rngs=rngs)(X, CONTEXT), "context: the block expects none"),
    (lambda rngs: make_block(cross=True, rngs=rngs)(X), "context: the block expects one, got nothing"),
    (lambda rngs: make_block(rngs=rngs)(X[0]), "x: expected shape"),
    (lambda rngs: MLP(D, 8, rngs=rngs)(X[..., 1:]), "x: expected shape"),
    (lambda rngs: Stack(make_block, 0, rngs=rngs), "num_layers"),
    (lambda rngs: Stack([make_block, make_block], 3, rngs=rngs), "num_layers"),
    (lambda rngs: Stack(make_block, 2, remat="everything", rngs=rngs), "remat"),
    (lambda rngs: Embedding(4, D, position="rotary", rngs=rngs), "position"),
    (lambda rngs: Embedding(4, D, position="learned", rngs=rngs), "max_length"),
    (lambda rngs: Embedding(4, D, rngs=rngs)(X), "tokens: expected integers"),
])
def test_wrong_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call(nnx.Rngs(0))


def test_activations_are_constrained_by_rules():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("batch", ("data", "tensor")), ("sequence", "data"), ("mlp", "tensor"))

    def sharding(shape, *names):
        return jax.jit(lambda x: constrain(x + 0, *names))(jnp.ones(shape)).sharding

    with jax.set_mesh(mesh):
        assert sharding((2, 6, 4), None, "sequence", "mlp").is_fully_replicated
        with nnx.logical_axis_rules(rules):
            assert sharding((2, 6, 4), None, "sequence", "mlp").spec == jax.P(None, "data", "tensor")
            assert sharding((2, 1, 4), None, "sequence", "mlp").spec == jax.P(None, None, "tensor")
            assert sharding((8, 1, 1), "batch", None, None).spec == jax.P(("data", "tensor"))
            assert (constrain(X, None, "sequence", "mlp") == X).all()
    with nnx.logical_axis_rules(rules):
        assert len(sharding((2, 6, 4), None, "sequence", "mlp").device_set) == 1
