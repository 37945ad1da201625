"""The original transformer: torch's with the same weights, its positions, decoding, schedule and loss; and the searches by exhaustion."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import models
from attnx.positions import sinusoidal

B, S, T, V, D, N, F, LAYERS = 2, 9, 7, 13, 16, 4, 24, 2
SOURCE, TARGET = (jax.random.randint(jax.random.key(seed), shape, 0, V) for seed, shape in ((0, (B, S)), (1, (B, T))))
SEEN = jnp.arange(S) < jnp.array([[9], [6]])
POSITIONS = jnp.where(SEEN, jnp.arange(S), -1)


@pytest.fixture(scope="module")
def model():
    model = models.OriginalTransformer(vocab_size=V, features=D, hidden_features=F, num_heads=N, num_layers=LAYERS, implementation="reference", rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))  # biases and gains too
    return nnx.merge(graph, jax.tree.unflatten(structure, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]))


@nnx.jit
def call(model, source, target, positions):
    return model(source, target, source_positions=positions)


@nnx.jit
def encode(model, source, positions):
    return model.encoder(source, positions)


def torchs(torch, model):
    """torch.nn.Transformer, without the last norms that it adds to the paper's, with the weights of the model."""
    peer = torch.nn.Transformer(D, N, LAYERS, LAYERS, F, 0.0, batch_first=True, norm_first=False, layer_norm_eps=1e-6)
    peer.encoder.norm = peer.decoder.norm = None
    tensor = lambda param, layer: torch.tensor(np.asarray(param[...])[layer])

    def attention(to, ours, layer):
        for i, project in enumerate((ours.query, ours.key, ours.value)):
            to.in_proj_weight[i * D:(i + 1) * D] = tensor(project.kernel, layer).reshape(D, D).T
            to.in_proj_bias[i * D:(i + 1) * D] = tensor(project.bias, layer).reshape(D)
        to.out_proj.weight.copy_(tensor(ours.out.kernel, layer).reshape(D, D).T)
        to.out_proj.bias.copy_(tensor(ours.out.bias, layer))

    def linear(to, ours, layer):
        to.weight.copy_(tensor(ours.kernel, layer).T)
        to.bias.copy_(tensor(ours.bias, layer))

    def norms(to, ours, layer):
        for i, norm in enumerate(ours, 1):
            getattr(to, f"norm{i}").weight.copy_(tensor(norm.scale, layer))
            getattr(to, f"norm{i}").bias.copy_(tensor(norm.bias, layer))

    with torch.no_grad():
        for half, trunk in ((peer.encoder, model.encoder), (peer.decoder, model.decoder)):
            block = trunk.layers.blocks[0]
            for layer, to in enumerate(half.layers):
                attention(to.self_attn, block.attention, layer)
                if block.cross_attention is not None:
                    attention(to.multihead_attn, block.cross_attention, layer)
                linear(to.linear1, block.mlp.up, layer)
                linear(to.linear2, block.mlp.down, layer)
                norms(to, [n for n in (block.attention_norm, block.cross_norm, block.mlp_norm) if n is not None], layer)
    return peer


def test_torch(model):
    """The same weights in torch.nn.Transformer give the same, with padding and causal masks; embeddings are tied and scaled, positions interleaved."""
    torch = pytest.importorskip("torch")
    table = np.asarray(model.encoder.embedding.table[...])
    assert model.decoder.embedding.table[...] is model.encoder.embedding.table[...]
    angle = np.arange(S)[:, None] / 10000 ** (2 * np.arange(D // 2) / D)
    waves = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(S, D)
    embed = lambda tokens: torch.tensor(table[np.asarray(tokens)] * D**0.5 + waves[:tokens.shape[1]], dtype=torch.float32)
    hidden = torch.tensor(~np.asarray(SEEN))
    with torch.no_grad():
        out = torchs(torch, model)(embed(SOURCE), embed(TARGET), tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(T),
                            src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
    np.testing.assert_allclose(call(model, SOURCE, TARGET, POSITIONS), out.numpy() @ table.T, atol=2e-5)


def test_attention_core():
    """Scaled dot-product attention is torch's and jax's; a row with nothing to see is zero, with finite gradients."""
    torch = pytest.importorskip("torch")
    q, k, v = jax.random.normal(jax.random.key(3), (3, B, T, N, 8))
    mask = jax.random.bernoulli(jax.random.key(4), 0.5, (B, N, T, T)).at[:, :, 2].set(False)
    attend = lambda q: attnx.attention(q, k, v, mask=attnx.masks.explicit(mask))
    out, slope = attend(q), jax.grad(lambda q: jnp.sum(attend(q) ** 2))(q)
    full = mask.at[:, :, 2].set(True)
    of_torch = torch.nn.functional.scaled_dot_product_attention(*(torch.tensor(np.swapaxes(x, 1, 2)) for x in (q, k, v)), attn_mask=torch.tensor(np.asarray(full)))
    for peer in (np.swapaxes(of_torch.numpy(), 1, 2), jax.nn.dot_product_attention(q, k, v, mask=full)):
        np.testing.assert_allclose(np.delete(out, 2, 1), np.delete(peer, 2, 1), atol=1e-5)
    assert not np.any(out[:, 2]) and not np.any(slope[:, 2]) and np.isfinite(slope).all()


def test_masks(model):
    """Later target tokens change nothing before them, to the bit; padded source tokens change nothing."""
    logits = call(model, SOURCE, TARGET, POSITIONS)
    later = call(model, SOURCE, TARGET.at[:, 4:].set((TARGET[:, 4:] + 1) % V), POSITIONS)
    np.testing.assert_array_equal(later[:, :4], logits[:, :4])
    assert np.abs(later[:, 4:] - logits[:, 4:]).max() > 0.1
    np.testing.assert_array_equal(call(model, jnp.where(SEEN, SOURCE, 0), TARGET, POSITIONS), logits)


def test_steps(model):
    """Token by token with caches is teacher forcing; keys and values of the source are projected once."""
    @nnx.jit
    def stream(model, target):
        state = model.init_state(SOURCE, T, source_positions=POSITIONS)
        _, logits = jax.lax.scan(lambda state, token: model.step(state, token[:, None]), state, target.T)
        return jnp.swapaxes(logits[:, :, 0], 0, 1)

    np.testing.assert_allclose(stream(model, TARGET), call(model, SOURCE, TARGET, POSITIONS), atol=1e-5)
    state = jax.eval_shape(lambda: model.init_state(SOURCE, T))
    products = str(jax.make_jaxpr(lambda state: model.step(state, TARGET[:, :1]))(state)).count(f"f32[{B},{S},{N},{D // N}] = dot_general")
    assert products == 0


def test_permutations(model):
    """The encoder's layers take permuted vectors to permuted vectors; with positions the encoder does not."""
    order = jax.random.permutation(jax.random.key(5), S)
    x = jax.random.normal(jax.random.key(6), (B, S, D))
    layers = nnx.jit(lambda model, x: model.encoder.layers(x))
    np.testing.assert_allclose(layers(model, x[:, order]), layers(model, x)[:, order], atol=2e-5)
    everything = jnp.broadcast_to(jnp.arange(S), (B, S))
    moved = encode(model, SOURCE[:, order], everything) - encode(model, SOURCE, everything)[:, order]
    assert np.abs(moved).max() > 0.1


def test_positions_turn(x64):
    """PE(p + k) is PE(p) turned pairwise by angles that depend on k alone."""
    shift = 5
    angle = shift * 10000.0 ** (-np.arange(0, D, 2) / D)
    turn = np.zeros((D, D))
    for i, a in enumerate(angle):
        turn[2 * i:2 * i + 2, 2 * i:2 * i + 2] = [[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]
    p = jnp.arange(50)
    np.testing.assert_allclose(sinusoidal(p + shift, D, dtype=jnp.float64), sinusoidal(p, D, dtype=jnp.float64) @ turn.T, atol=1e-12)


def test_configurations():
    """The paper's sizes: 65 and 213 million parameters with a vocabulary of 37000; pre-norm is an option."""
    def count(size):
        model = nnx.eval_shape(lambda: models.OriginalTransformer(size, vocab_size=37000, rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model))) / 1e6

    assert 62 < count("base") < 66 and 209 < count("big") < 217
    assert models.original_config(norm_position="pre").norm_position == "pre"
    with pytest.raises(ValueError, match="size: expected"):
        models.original_config("small")


def test_schedule():
    """It peaks at step 4000, linear before and an inverse root after."""
    schedule = models.noam_schedule(512)
    rates = jax.vmap(schedule)(jnp.arange(10000))
    assert int(jnp.argmax(rates)) == 4000 and rates[0] == 0
    np.testing.assert_allclose(rates[4000], 512**-0.5 * 4000**-0.5, rtol=1e-6)
    np.testing.assert_allclose(rates[jnp.array([2000, 9000])] / rates[4000], [1 / 2, 2 / 3], rtol=1e-5)


def test_label_smoothing(x64):
    """It is torch's, and least, at the entropy of the smoothed label, where the model predicts that."""
    torch = pytest.importorskip("torch")
    logits, labels = jax.random.normal(jax.random.key(7), (6, V), float), jnp.arange(6)
    mask = jnp.array([1, 1, 0, 1, 1, 0], bool)
    peer = torch.nn.functional.cross_entropy(torch.tensor(np.asarray(logits)), torch.tensor(np.asarray(labels)), label_smoothing=0.1, reduction="none").numpy()
    np.testing.assert_allclose(models.label_smoothed_cross_entropy(logits, labels), peer.mean(), rtol=1e-12)
    np.testing.assert_allclose(models.label_smoothed_cross_entropy(logits, labels, mask=mask), peer[np.asarray(mask)].mean(), rtol=1e-12)
    smoothed = 0.9 * jax.nn.one_hot(labels, V) + 0.1 / V
    least, slope = jax.value_and_grad(models.label_smoothed_cross_entropy)(jnp.log(smoothed), labels)
    np.testing.assert_allclose(least, -jnp.sum(smoothed[0] * jnp.log(smoothed[0])), rtol=1e-12)
    assert least > 0.4 and np.abs(slope).max() < 1e-12
    assert models.label_smoothed_cross_entropy(logits, labels, mask=~jnp.ones(6, bool)) == 0


# The searches -------------------------------------------------------------------------------------------------------

WORDS, END, LONGEST = 4, 3, 4


def bigrams(seed):
    """Random log probabilities of the next word by row, step and word."""
    return jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(seed), (2, LONGEST, WORDS, WORDS)))


def model_of(table):
    """Of two rows."""
    def step(state, token):
        row, t = state
        return (row, t + 1), table[row, t, token]

    return step, (jnp.arange(2), jnp.zeros(2, jnp.int32))


def exhausted(table, limit, alpha):
    """All sequences with their scores, the best first."""
    found = []
    for length in range(1, limit + 1):
        for word in itertools.product(range(WORDS), repeat=length):
            if END in word[:-1] or (word[-1] != END and length < limit):
                continue
            logp = sum(float(table[t, a, b]) for t, (a, b) in enumerate(zip((0, *word), word)))
            found.append((logp / ((5 + length) / 6) ** alpha, word))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_beam_search(alpha):
    """A beam wide enough to hold all beginnings finds the best sequences, whatever the length penalty and the limit of each row."""
    limits = (LONGEST, 3)
    search = jax.jit(lambda table: models.beam_search(*model_of(table), jnp.zeros(2, int), end=END, max_length=LONGEST, width=30, alpha=alpha,
                                                      limits=jnp.array(limits), padding=9))
    for seed in range(3):
        table = bigrams(seed)
        found = search(table)
        for row, limit in enumerate(limits):
            for (score, word), tokens, length, got in zip(exhausted(table[row], limit, alpha)[:8], *(np.asarray(x[row]) for x in found)):
                np.testing.assert_allclose(got, score, rtol=1e-5)
                assert tuple(tokens[:length]) == word and (tokens[length:] == 9).all()


def test_greedy_search():
    """The likeliest token each time; a beam of width 1 ends no better."""
    table = bigrams(4)
    limits = jnp.array([LONGEST, 2])
    found = models.greedy_search(*model_of(table), jnp.zeros(2, int), end=END, max_length=LONGEST, limits=limits, padding=9)
    for row in range(2):
        token, total, word = 0, 0.0, []
        while token != END and len(word) < limits[row]:
            now = table[row, len(word), token]
            token = int(now.argmax())
            total, word = total + float(now[token]), [*word, token]
        assert found.tokens[row, 0].tolist() == word + [9] * (LONGEST - len(word)) and int(found.lengths[row, 0]) == len(word)
        np.testing.assert_allclose(found.scores[row, 0], total, rtol=1e-5)


def test_translate(model):
    """A beam's score is what the model says of its tokens; padding of the source changes nothing; width 1 is greedy."""
    translate = nnx.jit(lambda model, source, positions: model.translate(source, start=0, end=1, source_positions=positions, max_length=5, padding=1))
    found = translate(model, SOURCE, POSITIONS)
    best = found.tokens[:, 0]
    logp = jax.nn.log_softmax(call(model, SOURCE, jnp.pad(best, ((0, 0), (1, T - 6)))[:, :T], POSITIONS))[:, :5]
    each = jnp.take_along_axis(logp, best[..., None], -1)[..., 0]
    for row in range(B):
        n = int(found.lengths[row, 0])
        np.testing.assert_allclose(found.scores[row, 0], each[row, :n].sum() / models.length_penalty(n, 0.6), rtol=1e-4)
    assert (jnp.diff(found.scores) <= 0).all()
    np.testing.assert_array_equal(translate(model, jnp.where(SEEN, SOURCE, 0), POSITIONS).tokens, found.tokens)
    greedy = model.translate(SOURCE, start=0, end=1, source_positions=POSITIONS, max_length=2, width=1)
    assert int(greedy.tokens[0, 0, 0]) == int(jnp.argmax(call(model, SOURCE, jnp.zeros((B, T), int), POSITIONS)[0, 0]))
