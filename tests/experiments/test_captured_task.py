"""What is captured of a model on a text, here of a small one with random parameters whose tokens are characters."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks, models
from experiments.tasks import captured


@pytest.fixture
def model(monkeypatch):
    config = models.TransformerConfig(vocab_size=128, features=16, num_layers=2, num_heads=4, num_kv_heads=2)
    decoder = models.Decoder(config, attnx.pairs(mask=masks.causal()), rngs=nnx.Rngs(0))
    encode = lambda words: types.SimpleNamespace(ids=[ord(letter) % 128 for letter in words])
    loaded = types.SimpleNamespace(model=decoder, tokenizer=types.SimpleNamespace(encode=encode))
    monkeypatch.setattr(captured, "_load", lambda name: loaded)
    return decoder


def test_tokens(model):
    """Other texts by other seeds, of both kinds, and never fewer tokens than asked for: docstrings are drawn for 16 and more tokens."""
    found = [captured.tokens("any", kind, seed, 40) for kind in captured.TEXTS for seed in (0, 1)]
    assert all(ids.shape == (1, 40) and ids.dtype == jnp.int32 for ids in found)
    assert len({ids.tobytes() for ids in map(np.asarray, found)}) == 4
    assert jnp.array_equal(found[0], captured.tokens("any", captured.TEXTS[0], 0, 40))
    with pytest.raises(ValueError, match="length: expected at most"):
        captured.tokens("any", captured.TEXTS[0], 0, 12)


def test_attention_of_all_layers(model):
    """Queries, keys and values come from every layer; the same attention by another function predicts as well, another one does not, and the model stays as it was."""
    query, key, value = captured.qkv("any", 0, 32)
    assert query.shape == (2, 1, 32, 4, 4) and key.shape == value.shape == (2, 1, 32, 2, 4)
    assert not jnp.allclose(query[0], query[1])
    own = captured.nats(None, 0, 32)
    causal = lambda query, key, value: attnx.attention(query, key, value, mask=masks.causal(), implementation="reference")
    assert captured.nats(causal, 0, 32) == pytest.approx(own, abs=1e-5)
    last = lambda query, key, value: jnp.repeat(value, 2, axis=2)
    assert abs(captured.nats(last, 0, 32) - own) > 1e-4
    assert captured.nats(None, 0, 32) == own
