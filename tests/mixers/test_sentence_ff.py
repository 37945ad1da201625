"""Feed-forward networks over sentences: sizes, the network written out, padding, causality, and taking the place of attention in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_modules import randomly

from attnx import masks, mixers, pairs
from attnx.models import EncoderDecoder, TransformerConfig
from attnx.nn import MLP, Attention, Layers, TransformerBlock, unstack

B, T, S, L, D, H = 2, 5, 6, 7, 4, 3
X, CONTEXT = jax.random.normal(jax.random.key(0), (B, T, D)), jax.random.normal(jax.random.key(1), (B, S, D))
POSITIONS = jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])
call = nnx.jit(lambda network, *args, **inputs: network(*args, **inputs))


def made(kind, **options):
    """A network with random parameters."""
    return randomly(lambda: kind(L, D, H, rngs=nnx.Rngs(0), **options))


def written_out(network, u):
    """F of one vector, in NumPy."""
    p = lambda x: np.asarray(x[...], np.float64)
    norm = lambda u, layer: (u - u.mean()) / np.sqrt(u.var() + 1e-5) * p(layer.scale) + p(layer.bias)
    hidden = norm(np.asarray(u, np.float64), network.norm) @ p(network.expand.kernel) + p(network.expand.bias)
    return norm(np.where(hidden > 0, hidden, 0.01 * hidden), network.hidden_norm) @ p(network.project.kernel) + p(network.project.bias)


def test_sizes():
    """Hidden sizes and numbers of parameters are the paper's, at L = 50 and D = 128."""
    width = 50 * 128
    for level, shares in (("ALR", (256, 128, 8, 2)), ("ALRR", (256, 128, 8, 2)), ("ELR", (256, 128, 8, 2)), ("ALSR", (32, 16, 8, 4))):
        for size, share in zip(("XS", "S", "M", "L"), shares):
            hidden, outputs = mixers.hidden_size(level, size, 50, 128), 16 if level == "ALSR" else 128
            network = nnx.eval_shape(lambda h=hidden, o=outputs: mixers.SentenceFF(50, 128, h, o, rngs=nnx.Rngs(0)))
            count = sum(np.prod(x.shape) for x in jax.tree.leaves(nnx.state(network)))
            assert hidden == width // share
            assert count == 2 * width + (width * hidden + hidden) + 2 * hidden + (hidden * 50 * outputs + 50 * outputs)
    assert mixers.hidden_size("ALR", "S", 50, 128) == 50
    with pytest.raises(ValueError, match="level, size"):
        mixers.hidden_size("ALR", "XL", 50, 128)


def test_sentence():
    """The network of the padded sentence; padding neither counts nor comes out; an order is not forgotten; places are positions."""
    network = made(mixers.SentenceFF)
    out = call(network, X, positions=POSITIONS)
    padded = np.zeros((L, D))
    padded[:3] = X[1, :3]
    np.testing.assert_allclose(out[1, :3], written_out(network.network, padded.reshape(-1)).reshape(L, D)[:3], atol=1e-4)
    assert not out[1, 3:].any()
    np.testing.assert_array_equal(call(network, X.at[1, 3:].set(9.0), positions=POSITIONS), out)
    np.testing.assert_allclose(call(network, X)[0], out[0], atol=1e-6)
    turned = jnp.array([2, 0, 1, 4, 3])
    assert jnp.abs(call(network, X[:, turned]) - call(network, X)[:, turned]).max() > 1e-2  # not equivariant
    np.testing.assert_allclose(call(network, X[:, turned], positions=turned), call(network, X)[:, turned], atol=1e-5)
    with pytest.raises(ValueError, match="x: expected at most 7 tokens"):
        network(jnp.ones((1, 8, D)))
    with pytest.raises(NotImplementedError, match="segment_ids"):
        network(X, segment_ids=jnp.zeros((B, T), int))
    with pytest.raises(NotImplementedError, match="no streaming form"):
        network.init_state(1, 4)


def test_causal():
    """The network of the sentence so far, by copies and by sums; the future does not matter to the bit; the state does not grow."""
    network = made(mixers.CausalSentenceFF)
    out = call(network, X, positions=POSITIONS)
    for t in (0, 2):
        prefix = np.zeros((L, D))
        prefix[:t + 1] = X[1, :t + 1]
        np.testing.assert_allclose(out[1, t], written_out(network.network, prefix.reshape(-1)), atol=1e-4)
    np.testing.assert_allclose(call(made(mixers.CausalSentenceFF, implementation="reference"), X, positions=POSITIONS), out, atol=1e-4)
    np.testing.assert_array_equal(call(network, X.at[:, 3:].set(9.0))[:, :3], call(network, X)[:, :3])
    assert not out[1, 3:].any()
    states = [jax.eval_shape(lambda n=n: mixers.CausalSentenceFF(n, D, H, rngs=nnx.Rngs(0)).init_state(B, n)) for n in (8, 64)]
    assert states[0] == states[1]
    with pytest.raises(ValueError, match="max_length"):
        network.init_state(1, L + 1)


def test_cross():
    """The network of a token and the context."""
    network = made(mixers.CrossSentenceFF)
    places = jnp.array([0, 1, 2, 3, -1, -1])
    out = call(network, X, CONTEXT, positions=POSITIONS, context_positions=places)
    sentence = np.zeros((1 + L, D))
    sentence[0], sentence[1:5] = X[1, 2], CONTEXT[1, :4]
    np.testing.assert_allclose(out[1, 2], written_out(network.network, sentence.reshape(-1)), atol=1e-4)
    assert not out[1, 3:].any()
    assert not call(network, X, CONTEXT, context_positions=jnp.full(S, -1)).any()


VOCABULARY = 7
SOURCE, GIVEN = jax.random.randint(jax.random.key(3), (B, S), 0, VOCABULARY), jax.random.randint(jax.random.key(4), (B, T), 0, VOCABULARY)
PLACES = jnp.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]])


@pytest.fixture(scope="module")
def model():
    """A small translator whose layers can be changed."""
    config = TransformerConfig(vocab_size=VOCABULARY, features=D, num_heads=2, num_layers=2, hidden_features=8, position=None, position_embedding="sinusoidal")
    everything = pairs(implementation="reference")
    make = lambda: EncoderDecoder(config, pairs(mask=masks.causal(), implementation="reference"), encoder_mechanism=everything, cross_mechanism=everything,
                                  rngs=nnx.Rngs(0))
    return unstack(randomly(make))


run = nnx.jit(lambda model: model(SOURCE, GIVEN, source_positions=PLACES))


class Wrapped(nnx.Module):
    """A perfect student."""

    def __init__(self, teacher):
        self.teacher = teacher

    def __call__(self, *args, **inputs):
        """What the teacher does."""
        return self.teacher(*args, **inputs)


PARTS = [("encoder", "ALR", False), ("encoder", "ELR", False), ("decoder", "ALR", False), ("decoder", "ALR", True)]


def part_of(model, half):
    return getattr(model, half).layers


@pytest.mark.parametrize(("half", "level", "cross"), PARTS)
def test_perfect_student(model, half, level, cross):
    """A student that does the same leaves all logits as they are; what was there can be put back."""
    layers, before = part_of(model, half), run(model)
    block = layers.blocks[1]
    teacher = block if level == "ELR" else block.cross_attention if cross else block.attention
    assert mixers.swap(layers, 1, Wrapped(teacher), level=level, cross=cross) is teacher
    np.testing.assert_allclose(run(model), before, atol=1e-6)
    assert isinstance(layers.blocks[1] if level == "ELR" else block.cross_attention if cross else block.attention, Wrapped)
    mixers.swap(layers, 1, teacher, level=level, cross=cross)
    np.testing.assert_allclose(run(model), before, atol=1e-6)


@pytest.mark.parametrize(("half", "level", "cross"), [*PARTS, ("encoder", "ALRR", False), ("encoder", "ALSR", False)])
def test_recording(model, half, level, cross):
    """What is recorded is what the part was given and made of it; the model is as it was."""
    layers = part_of(model, half)
    record = nnx.jit(lambda model: mixers.extract_io(part_of(model, half), lambda: model(SOURCE, GIVEN, source_positions=PLACES), level=level, cross=cross))
    out, found = record(model)
    np.testing.assert_allclose(out, run(model), atol=1e-6)
    assert len(found) == 2 and found[0].inputs.shape == (B, S if half == "encoder" else T, D)
    for block, seen in zip(layers.blocks, found):
        options = dict(positions=seen.positions)
        if cross:
            options |= dict(context=seen.context, context_positions=seen.context_positions)
        elif half == "decoder" and level == "ELR":
            continue
        target = {"ELR": block, "ALRR": block.attend}.get(level, block.cross_attention if cross else block.attention)
        if level == "ALSR":
            target = lambda x, block=block, **options: block.attention.out(seen.outputs).reshape(x.shape)
            expected = block.attention(seen.inputs, **options)
            np.testing.assert_allclose(target(seen.inputs), expected, atol=1e-5)
            continue
        np.testing.assert_allclose(seen.outputs, target(seen.inputs, **options), atol=1e-5)
    if half == "encoder":
        np.testing.assert_array_equal(found[0].positions, PLACES)
    np.testing.assert_allclose(run(model), out, atol=1e-6)


@pytest.mark.parametrize("level", ["ALR", "ALRR", "ALSR", "ELR"])
def test_students_of_the_encoder(level):
    """Each level's network learns, takes its place, and does there what it learned: the loss of the swapped part is that of the distillation."""
    attention = lambda: Attention(D, 2, mechanism=pairs(implementation="reference"), rngs=nnx.Rngs(0))
    layers = randomly(lambda: Layers([TransformerBlock(D, attention=attention(), mlp=MLP(D, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))]))
    x = jax.random.normal(jax.random.key(5), (B, S, D))
    _, (data,) = nnx.jit(lambda layers: mixers.extract_io(layers, lambda: layers(x, positions=PLACES), level=level))(layers)
    network = lambda seed, outputs=None: randomly(lambda: mixers.SentenceFF(S, D, 8, outputs, rngs=nnx.Rngs(0)), seed=seed)
    student = mixers.HeadwiseFF([network(0, 2), network(1, 2)]) if level == "ALSR" else network(0)
    losses = mixers.distill_attention(student, data, steps=150, batch_size=4, learning_rate=1e-2, key=jax.random.key(0))
    assert losses[-1] < losses[0] / 5
    old = mixers.swap(layers, 0, student, level=level)

    @nnx.jit
    def both(layers, student):
        block = layers.blocks[0]
        own = student(data.inputs, positions=data.positions)
        swapped = {"ELR": block, "ALRR": getattr(block, "attend", None)}.get(level) or block.attention
        return own, swapped(data.inputs, positions=data.positions), old.out(own) if level == "ALSR" else own, layers(x, positions=PLACES)

    own, swapped, expected, out = both(layers, student)
    np.testing.assert_allclose(swapped, expected, atol=1e-5)
    assert 0 < mixers.distillation_loss(own, data.outputs, data.positions) < losses[0] / 5 and out.shape == (B, S, D)


def test_students_of_the_decoder(model):
    """Networks for a decoder's attention decode token by token as they do all at once."""
    layers = model.decoder.layers
    put = lambda layer, student, cross: mixers.swap(layers, layer, student, cross=cross)
    students = (randomly(lambda kind=kind, n=n: kind(n, D, H, rngs=nnx.Rngs(0))) for kind, n in ((mixers.CausalSentenceFF, T), (mixers.CrossSentenceFF, S)))
    before = put(0, next(students), False), put(1, next(students), True)

    @nnx.jit
    def stream(model):
        state, out = model.init_state(SOURCE, T, source_positions=PLACES), []
        for t in range(T):
            state, logits = model.step(state, GIVEN[:, t:t + 1])
            out.append(logits)
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(stream(model), run(model), atol=1e-4)
    put(0, before[0], False)
    put(1, before[1], True)


def test_loss():
    """The released form: the mean over all with padding counted as right, over the share of tokens that are real."""
    target = jnp.where((POSITIONS >= 0)[..., None], X, 0)
    out = jnp.where((POSITIONS >= 0)[..., None], jnp.cos(X), 0)
    expected = jnp.mean((out - target) ** 2) / jnp.mean(POSITIONS >= 0)
    np.testing.assert_allclose(mixers.distillation_loss(jnp.cos(X), X, POSITIONS), expected, rtol=1e-6)


def test_refusals(model):
    """Scanned stacks, levels and layers that do not exist."""
    config = TransformerConfig(vocab_size=VOCABULARY, features=D, num_heads=2, num_layers=1, hidden_features=8)
    scanned = nnx.eval_shape(lambda: EncoderDecoder(config, pairs(), encoder_mechanism=pairs(), cross_mechanism=pairs(), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="unstack makes it so"):
        mixers.swap(scanned.encoder, 0, None)
    with pytest.raises(ValueError, match="level: expected one of"):
        mixers.swap(model.encoder, 0, None, level="all")
    with pytest.raises(ValueError, match="layer: expected"):
        mixers.swap(model.encoder, 2, None)
    with pytest.raises(ValueError, match="layer: expected a block with cross_attention"):
        mixers.swap(model.encoder, 0, None, cross=True)
