import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import masks, pairs
from attnx.models import Decoder, EncoderDecoder, TransformerConfig
from attnx.nn import record
from attnx.nn.hooks import STAGES

# The quickest to compile.
CAUSAL, FULL = pairs(mask=masks.causal(), implementation="reference"), pairs(implementation="reference")
B, T = 2, 6
CONFIG = TransformerConfig(vocab_size=16, features=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_features=24)
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, 16)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, CAUSAL, rngs=nnx.Rngs(0))


plain = nnx.jit(lambda m: m(TOKENS))


def call(model, hooks):
    return nnx.jit(lambda m: m(TOKENS, hooks=hooks))(model)


def without(model, layers, heads):
    """The logits of the model with the output projections of some heads of some layers set to zero."""
    graph, params = nnx.split(model)
    pure = nnx.to_pure_dict(params)
    out = pure["layers"]["blocks"][0]["attention"]["out"]
    out["kernel"] = out["kernel"].at[jnp.array(layers)[:, None], jnp.array(heads)].set(0)
    changed = jax.tree.map(lambda p: p, params)
    nnx.replace_by_pure_dict(changed, pure)
    return plain(nnx.merge(graph, changed))


def test_identity_changes_nothing(model):
    hooks = {stage: lambda value, layer, at: value for stage in STAGES}
    np.testing.assert_allclose(call(model, hooks), plain(model), atol=1e-6)


def test_zeroing_a_head_of_one_layer_at_every_stage(model):
    expected = without(model, [1], [2])
    assert abs(expected - plain(model)).max() > 1e-2

    def zero(value, layer, at):
        return jnp.where((layer == 1) & (at.head == 2), 0, value)

    for stage in ("output", "weights"):
        np.testing.assert_allclose(call(model, {stage: zero}), expected, atol=1e-5, err_msg=stage)

    def zero_values(qkv, layer, at):
        query, key, value = qkv
        return query, key, jnp.where((layer == 1) & (jnp.arange(2)[:, None] == 1), 0, value)

    np.testing.assert_allclose(call(model, {"qkv": zero_values}), without(model, [1], [2, 3]), atol=1e-5)


def test_positions_and_batch_are_visible(model):
    """A hook that cuts row 1 off from its past equals tokens that are documents of their own there, in every layer."""
    def alone(scores, layer, at):
        return jnp.where((at.batch == 1) & (at.query > at.key), -jnp.inf, scores)

    ids = jnp.stack([jnp.zeros(T, jnp.int32), jnp.arange(T)])
    expected = nnx.jit(lambda m: m(TOKENS, segment_ids=ids))(model)
    np.testing.assert_allclose(call(model, {"scores": alone}), expected, atol=1e-5)


def test_output_positions(model):
    """Zeroing the output of late positions leaves the logits before them alone."""
    out = call(model, {"output": lambda value, layer, at: jnp.where(at.query >= 4, 0, value)})
    moved = abs(out - plain(model)).max(axis=(0, 2))
    assert (moved[:4] == 0).all() and (moved[4:] > 1e-3).all()


def test_hooks_while_decoding(model):
    hooks = {"output": lambda value, layer, at: jnp.where((at.head == layer) & (at.query >= 2), 0, value),
             "qkv": lambda qkv, layer, at: (qkv[0], qkv[1], jnp.where(at.key == 3, 2 * qkv[2], qkv[2])),
             "weights": lambda value, layer, at: jnp.where(at.key == 1, value / 2, value)}
    step = nnx.jit(lambda m, s, t: m.step(s, t, hooks=hooks))
    state, first = step(model, model.init_state(B, T), TOKENS[:, :4])
    outs = [first]
    for t in (4, 5):
        state, out = step(model, state, TOKENS[:, t:t + 1])
        outs.append(out)
    expected = call(model, hooks)
    assert abs(expected - plain(model)).max() > 1e-3
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=1e-5)


def test_gradients_flow_through_hooks(model):
    """The derivative of the loss with respect to a steering vector, by a hook that closes over it."""
    def loss(vector, at_once):
        hooks = {"output": lambda value, layer, at: value + jnp.where(layer == 0, vector, 0)}
        return (model(TOKENS, hooks=hooks) ** 2).sum()

    value, slope = jax.jit(jax.value_and_grad(loss), static_argnums=1)(jnp.zeros(4), True)
    moved = jax.jit(loss, static_argnums=1)(1e-2 * slope / jnp.linalg.norm(slope), True)
    np.testing.assert_allclose(moved - value, 1e-2 * jnp.linalg.norm(slope), rtol=0.05)


def test_cross_attention_has_stages_of_its_own():
    model = EncoderDecoder(CONFIG, CAUSAL, encoder_mechanism=FULL, cross_mechanism=FULL, rngs=nnx.Rngs(0))

    def run(source, hooks=None):
        return nnx.jit(lambda m, s: m(s, TOKENS, hooks=hooks))(model, source)

    hooks = {"cross_output": lambda value, layer, at: 0 * value}
    assert abs(run(TOKENS) - run(TOKENS[:, ::-1])).max() > 1e-3
    np.testing.assert_allclose(run(TOKENS, hooks), run(TOKENS[:, ::-1], hooks), atol=1e-5)
    assert abs(run(TOKENS, hooks) - run(TOKENS, {"output": hooks["cross_output"]})).max() > 1e-3


class Silent:
    """A mechanism without pairs."""

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        return query

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        return ()

    def step(self, state, query, key, value):
        return state, query


def test_stages_that_do_not_exist_are_named():
    model = Decoder(CONFIG, Silent(), rngs=nnx.Rngs(0))
    assert call(model, {"output": lambda value, layer, at: value}).shape == (B, T, 16)
    with pytest.raises(NotImplementedError, match="Silent does not evaluate query-key pairs and has no stage 'weights'"):
        model(TOKENS, hooks={"weights": lambda value, layer, at: value})
    with pytest.raises(ValueError, match="hooks: expected stages among"):
        model(TOKENS, hooks={"keys": lambda value, layer, at: value})


def test_recording_a_stage_of_every_layer(model):
    """What a scan over alternating layers hands out is what each layer saw, behind the user's own hook; while decoding too."""
    windowed = Decoder(dataclasses.replace(CONFIG, num_layers=4, remat="nothing_saveable"), (CAUSAL, pairs(mask=masks.sliding_window(2))), rngs=nnx.Rngs(0))
    logits, maps = nnx.jit(lambda m: record(m, TOKENS))(windowed)
    np.testing.assert_allclose(logits, plain(windowed), atol=1e-6)
    assert maps.shape == (4, B, 4, T, T)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    ones = jnp.ones((T, T), bool)
    assert (maps == jnp.tril(maps)).all() and ((maps > 0)[::2] == jnp.tril(ones)).all() and ((maps > 0)[1::2] == jnp.tril(ones) & ~jnp.tril(ones, -2)).all()

    def mark(value, layer, at):
        return value + layer

    _, (query, key, value) = nnx.jit(lambda m: record(m, TOKENS, stage="qkv"))(model)
    assert query.shape == (3, B, T, 4, 4) and key.shape == value.shape == (3, B, T, 2, 4)
    _, heads = nnx.jit(lambda m: record(m, TOKENS, stage="output", hooks={"weights": lambda w, layer, at: 0 * w, "output": mark}))(model)
    assert (heads == jnp.arange(3)[:, None, None, None, None]).all()

    (_, first), rows = nnx.jit(lambda m, s: record(m.step, s, TOKENS[:, :4]))(model, model.init_state(B, T))
    assert rows.shape[:4] == (3, B, 4, 4) and first.shape == (B, 4, 16)
    slope = jax.jit(jax.grad(lambda x: (record(model.layers, x, stage="output")[1] ** 2).sum()))(jnp.ones((1, 3, 16)))
    assert jnp.isfinite(slope).all() and abs(slope).max() > 0
    with pytest.raises(ValueError, match="stage: no layer of Decoder has 'cross_weights'"):
        record(model, TOKENS, stage="cross_weights")
