"""The decoder as a generator and under evaluation."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.training import Corpus, spans
from experiments.language_model import LanguageModel, ModelOptions
from experiments.mechanisms import mechanism

LENGTH = 8
PROMPT = bytes(range(40, 45))


@pytest.fixture(scope="module", params=["window", "linear"])
def model(request):
    return LanguageModel(ModelOptions(features=16, layers=1, heads=2), mechanism(request.param, LENGTH, 2), seed=3)


def test_streaming_is_the_parallel_argmax(model):
    """Each byte, from a state, is the likeliest after all before it, read at once; also when a state no longer holds them all."""
    params = model.init()
    written = bytes(model.stream(params, PROMPT, 12, temperature=0.0))
    tokens = np.frombuffer(b"\0" + PROMPT + written, np.uint8).astype(np.int32)[None]
    logits = model.decoder(params)(jnp.asarray(tokens[:, :-1]))
    np.testing.assert_array_equal(np.asarray(logits.argmax(-1))[0, len(PROMPT):], tokens[0, 1 + len(PROMPT):])


def test_choices_depend_on_the_seed_and_top_1_is_the_likeliest(model):
    params = model.init()

    def draw(**options):
        return bytes(model.stream(params, PROMPT, 12, **options))

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(seed=1, top_k=1) == draw(temperature=0.0)


def test_evaluation_is_the_cost_of_each_byte(model, monkeypatch):
    monkeypatch.setattr("experiments.language_model._EVALUATED", 3 * LENGTH)  # batches of 3, the last one padded
    corpus = Corpus.of([(str(n), np.random.default_rng(n).integers(1, 256, n, dtype=np.uint8)) for n in (LENGTH, 3 * LENGTH)])
    windows, params = spans(corpus, LENGTH, 9), model.init()
    bits = model.evaluate(params, windows)
    assert bits.shape == (4, LENGTH)
    for row, tokens in zip(bits, windows.tokens):
        logits = np.asarray(model.decoder(params)(jnp.asarray(tokens[None, :-1])))[0]
        probability = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(LENGTH), tokens[1:]]
        np.testing.assert_allclose(row, -np.log2(probability), rtol=1e-4, atol=1e-4)


def test_state_bytes_count_what_decoding_keeps():
    sizes = {}
    for name in ("softmax", "window", "linear"):
        model = LanguageModel(ModelOptions(features=16, layers=2, heads=2), mechanism(name, LENGTH, 2))
        sizes[name] = [model.state_bytes(length) for length in (64, 128)]
    keys_and_values = 2 * 2 * 64 * 16 * 4  # layers, keys and values, tokens, features, bytes
    assert sizes["softmax"][0] >= keys_and_values and sizes["softmax"][1] - sizes["softmax"][0] >= keys_and_values
    assert sizes["window"][0] == sizes["window"][1] < keys_and_values / 4
    assert sizes["linear"][0] == sizes["linear"][1] < keys_and_values / 4
