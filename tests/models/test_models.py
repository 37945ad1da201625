import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from attnx import masks, pairs, recurrent, scores
from attnx.models import Decoder, Encoder, EncoderDecoder, TransformerConfig
from attnx.positions import Rotary

# The quickest to compile.
CAUSAL, FULL = pairs(mask=masks.causal(), implementation="reference"), pairs(implementation="reference")
B, T, S = 2, 8, 5
SMALL = TransformerConfig(vocab_size=16, features=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_features=24)
RANDOM = np.random.default_rng(0)
TOKENS, SOURCE = (jnp.asarray(RANDOM.integers(16, size=shape)) for shape in ((B, T), (B, S)))


@nnx.jit
def call(model, *args, **inputs):
    return model(*args, **inputs)


@nnx.jit
def step(model, state, tokens):
    return model.step(state, tokens)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(SMALL, CAUSAL, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def seq2seq():
    config = dataclasses.replace(SMALL, norm_position="post", norm="layer", mlp="relu", use_bias=True, position=None,
                                 position_embedding="sinusoidal", scale_embedding=True)
    return EncoderDecoder(config, CAUSAL, encoder_mechanism=FULL, cross_mechanism=FULL, rngs=nnx.Rngs(0))


def test_decoder_is_causal(decoder):
    logits = call(decoder, TOKENS)
    assert logits.shape == (B, T, 16) and logits.dtype == jnp.float32
    moved = call(decoder, TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 16)) - logits
    assert (moved[:, :4] == 0).all() and abs(moved[:, 4:]).max(-1).min() > 1e-4


def test_steps_equal_the_call(decoder):
    state, outs, start = decoder.init_state(B, T), [], 0
    for n in (5, 1, 1, 1):
        shapes = jax.tree.map(jnp.shape, state)
        state, logits = step(decoder, state, TOKENS[:, start:start + n])
        assert jax.tree.map(jnp.shape, state) == shapes
        outs.append(logits)
        start += n
    np.testing.assert_allclose(jnp.concatenate(outs, 1), call(decoder, TOKENS), atol=1e-5)
    assert int(state.position) == T


def test_a_rolling_cache_and_arrays_in_the_mechanism():
    model = Decoder(SMALL, pairs(mask=masks.sliding_window(3), scores=scores.alibi(4)), rngs=nnx.Rngs(0))
    assert jax.tree.leaves(model.init_state(B, T).layers)[1].shape == (2, B, 3, 2, 4)
    expected = call(model, TOKENS)
    moved = call(model, TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 16)) - expected
    assert (moved[:, :4] == 0).all()
    state = model.init_state(B, T)
    outs = []
    for chunk in (TOKENS[:, :5], *jnp.split(TOKENS[:, 5:], 3, axis=1)):
        state, logits = step(model, state, chunk)
        outs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=1e-5)


def test_steps_inside_a_scan(decoder):
    graph, params = nnx.split(decoder)

    def one(state, tokens):
        return nnx.merge(graph, params).step(state, tokens[:, None])

    _, logits = jax.jit(lambda s: jax.lax.scan(one, s, TOKENS.T))(decoder.init_state(B, T))
    np.testing.assert_allclose(logits[:, :, 0].swapaxes(0, 1), call(decoder, TOKENS), atol=1e-5)


def test_a_step_copies_no_caches(optimised):
    """What a token needs beside the state that it changes in place is a layer's cache, not all layers'."""
    model = Decoder(dataclasses.replace(SMALL, num_layers=8), pairs(mask=masks.causal()), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    state = jax.eval_shape(lambda: model.init_state(1, 4096))
    caches = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    one = jax.jit(lambda params, state, tokens: nnx.merge(graph, params).step(state, tokens), donate_argnums=1)
    memory = one.lower(params, state, jax.ShapeDtypeStruct((1, 1), jnp.int32)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= caches and memory.temp_size_in_bytes < 0.3 * caches


def test_packed_documents_are_as_if_alone(decoder):
    ids = jnp.array([[0, 0, 0, 0, 0, 1, 1, 1]] * B)
    positions = jnp.array([0, 1, 2, 3, 4, 0, 1, 2])
    packed = call(decoder, TOKENS, positions, ids)
    np.testing.assert_allclose(packed[:, :5], call(decoder, TOKENS)[:, :5], atol=1e-5)
    alone = call(decoder, TOKENS[:, jnp.array([5, 6, 7, 0, 0, 0, 0, 0])])
    np.testing.assert_allclose(packed[:, 5:], alone[:, :3], atol=1e-5)


def test_unrolled_and_rematerialised_are_the_same_model(decoder):
    other = Decoder(dataclasses.replace(SMALL, unroll=True, remat="dots_saveable"), CAUSAL, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(call(other, TOKENS), call(decoder, TOKENS), atol=1e-5)
    tree = jax.tree.structure(nnx.to_pure_dict(nnx.state(decoder)))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(other))) == tree


def test_alternating_mechanisms_and_options():
    config = dataclasses.replace(SMALL, num_layers=4, tie_embedding=False, qk_norm="layer", output_gate="channel", mlp="geglu",
                                 position=Rotary(fraction=0.5), position_embedding="learned", max_length=T)
    model = Decoder(config, (CAUSAL, recurrent(log_decay=jnp.array([-0.1, -0.5]))), rngs=nnx.Rngs(0))
    assert len(model.layers.blocks) == 2 and model.layers.blocks[1].mlp.up.kernel.shape == (2, 16, 24)
    expected = call(model, TOKENS)
    state, logits = step(model, model.init_state(B, T), TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    moved = call(model, TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 16)) - expected
    assert (moved[:, :4] == 0).all()


def test_dtypes():
    config = dataclasses.replace(SMALL, dtype=jnp.bfloat16)

    def build(tokens):
        model = Decoder(config, CAUSAL, rngs=nnx.Rngs(0))
        return model(tokens), model.hidden(tokens), model.init_state(B, T), nnx.state(model)

    logits, hidden, state, params = nnx.eval_shape(build, jax.ShapeDtypeStruct((B, T), jnp.int32))
    assert logits.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_dropout_needs_only_a_key(decoder):
    model = Decoder(dataclasses.replace(SMALL, dropout_rate=0.5), CAUSAL, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(call(model, TOKENS), call(decoder, TOKENS), atol=1e-5)
    a, b, again = (call(model, TOKENS, dropout_key=jax.random.key(seed)) for seed in (1, 2, 1))
    assert (a == again).all() and (a != b).any()


def test_learns():
    """A few steps of gradient descent on a sequence that repeats."""
    config = dataclasses.replace(SMALL, num_layers=1)
    tokens = jnp.tile(jnp.arange(4), (B, 2))
    graph, params = nnx.split(Decoder(config, CAUSAL, rngs=nnx.Rngs(0)))

    def loss(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

    @jax.jit
    def train(params):
        return jax.lax.fori_loop(0, 60, lambda _, p: jax.tree.map(lambda w, g: w - 0.3 * g, p, jax.grad(loss)(p)), params)

    before, after = jax.jit(loss)(params), jax.jit(loss)(train(params))
    assert 2 < before < 4 and after < 0.1


def test_encoder_ignores_padding_and_order():
    model = Encoder(dataclasses.replace(SMALL, position=None), FULL, rngs=nnx.Rngs(0))
    order = RANDOM.permutation(T)
    out = call(model, TOKENS)
    assert out.shape == (B, T, 16)
    np.testing.assert_allclose(call(model, TOKENS[:, order]), out[:, order], atol=1e-5)
    positioned = Encoder(SMALL, FULL, rngs=nnx.Rngs(0))
    assert abs(call(positioned, TOKENS[:, order]) - call(positioned, TOKENS)[:, order]).max() > 1e-3
    padded = jnp.where(jnp.arange(T) < 5, jnp.arange(T), -1)
    a, b = (call(positioned, jnp.where(padded >= 0, TOKENS, filler), padded) for filler in (0, 9))
    np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-6)


def test_encoder_decoder(seq2seq):
    positions = jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])
    logits = call(seq2seq, SOURCE, TOKENS, source_positions=positions)
    moved = call(seq2seq, SOURCE, TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 16), source_positions=positions) - logits
    assert (moved[:, :4] == 0).all() and abs(moved[:, 4]).max() > 1e-4
    refilled = call(seq2seq, SOURCE.at[1, 3:].set(7), TOKENS, source_positions=positions)
    np.testing.assert_allclose(refilled, logits, atol=1e-6)
    assert abs(call(seq2seq, SOURCE.at[:, 0].add(1), TOKENS, source_positions=positions) - logits).max(axis=(1, 2)).min() > 1e-4
    state = nnx.jit(lambda m, s: m.init_state(s, T, source_positions=positions))(seq2seq, SOURCE)
    for t in range(T):
        state, out = step(seq2seq, state, TOKENS[:, t:t + 1])
        np.testing.assert_allclose(out, logits[:, t:t + 1], atol=1e-5)


def test_encoder_decoder_shares_one_table(seq2seq):
    assert seq2seq.encoder.embedding is seq2seq.decoder.embedding
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(seq2seq)) if path[-1] == "table"]
    assert len(paths) == 1
    graph, params = nnx.split(seq2seq)
    merged = nnx.merge(graph, params)
    assert merged.encoder.embedding is merged.decoder.embedding
    np.testing.assert_allclose(call(merged, SOURCE, TOKENS), call(seq2seq, SOURCE, TOKENS), atol=1e-5)


def test_sharded_over_a_mesh_by_the_names_of_its_axes(decoder):
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "sequence", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rules = (("batch", "fsdp"), ("sequence", "sequence"), ("embed", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"), ("head_size", None),
             ("mlp", "tensor"), ("vocab", "tensor"), ("layers", None))
    graph, params = nnx.split(decoder)

    def loss(params, tokens):
        return (nnx.merge(graph, params)(tokens) ** 2).mean()

    expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(params, TOKENS)
    with nnx.logical_axis_rules(rules), jax.set_mesh(mesh):
        specs = nnx.get_partition_spec(params)
        sharded = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), nnx.to_pure_dict(params), nnx.to_pure_dict(specs))
        assert sharded["layers"]["blocks"][0]["attention"]["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
        nnx.replace_by_pure_dict(params, sharded)
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("fsdp", "sequence")))
        value, gradient = jax.jit(jax.value_and_grad(loss))(params, tokens)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected_gradient)


def test_config():
    assert TransformerConfig(features=128).hidden == 352 and TransformerConfig(features=128, mlp="gelu").hidden == 512
    assert hash(SMALL) == hash(dataclasses.replace(SMALL))


def test_wrong_tokens_are_named(decoder):
    with pytest.raises(ValueError, match=r"tokens: expected integers of shape \[B, T\]"):
        decoder(TOKENS[0])
    with pytest.raises(ValueError, match="tokens: expected integers"):
        decoder(TOKENS * 1.0)
