"""Safetensors encoders: tiny folders in the real format, against the model in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import pretrained

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("gguf")
import tiny_checkpoints as tiny  # noqa: E402


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return folder, tiny.write_bert(folder)


@pytest.fixture(scope="module")
def loaded(stored):
    return pretrained.load(stored[0])


call = nnx.jit(lambda model, tokens, positions, types: model(tokens, positions, token_types=types))


def test_vectors_are_those_of_the_file(stored, loaded):
    """Of two texts of different lengths, with types; padding changes nothing."""
    tokens, positions = loaded.encode(["Where is Paris", "rains"])
    assert tokens.tolist() == [[2, 6, 5, 4, 3], [2, 7, 8, 3, 0]] and positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, -1]]
    types = jnp.array([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    out = call(loaded.model, tokens, positions, types)
    for row, length in enumerate((5, 4)):
        expected = tiny.bert_vectors(stored[1], np.asarray(tokens[row, :length]), np.asarray(types[row, :length]))
        np.testing.assert_allclose(out[row, :length], expected, atol=1e-4)


def test_embeddings_are_means_of_unit_length(loaded):
    tokens, positions = loaded.encode(["Where is Paris", "rains"])
    vectors = call(loaded.model, tokens, positions, jnp.zeros_like(tokens))
    means = jnp.stack([vectors[0].mean(0), vectors[1, :4].mean(0)])
    np.testing.assert_allclose(loaded.embed(["Where is Paris", "rains"]), means / jnp.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(TypeError, match="generate: expected a decoder"):
        loaded.generate("paris", 1)
    with pytest.raises(ValueError, match="texts: expected 1 to 16 tokens, got 22"):
        loaded.encode("is " * 20)


def test_checkpoints_with_heads_and_old_names(stored, loaded, tmp_path):
    tiny.write_bert(tmp_path, prefix="bert.", extra=["pooler.dense.bias", "embeddings.position_ids"])
    other = pretrained.load(tmp_path)
    for mine, theirs in zip(*(nnx.to_flat_state(nnx.state(p.model)) for p in (loaded, other))):
        assert mine[0] == theirs[0]
        np.testing.assert_array_equal(mine[1][...], theirs[1][...])


@pytest.mark.parametrize("options, message", [
    (dict(model_type="roberta"), "expected model_type 'bert', got 'roberta'"),
    (dict(position_embedding_type="relative_key"), "expected position_embedding_type 'absolute'"),
    (dict(hidden_act="selu"), "expected hidden_act 'gelu' or"),
    (dict(drop=["encoder.layer.1.output.dense.bias"]), "no tensor 'encoder.layer.1.output.dense.bias'"),
    (dict(extra=["encoder.layer.0.adapter.weight"]), "does not: encoder.layer.0.adapter.weight"),
    (dict(intermediate_size=128), "mlp.down.kernel: expected shape .2, 128, 32., the checkpoint has .2, 64, 32."),
])
def test_what_is_not_such_a_model_is_refused(options, message, tmp_path):
    tiny.write_bert(tmp_path, **options)
    with pytest.raises(pretrained.PretrainedError, match=message):
        pretrained.load(tmp_path)


def test_broken_folders(tmp_path):
    tiny.write_bert(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04nothing is ever unpickled")
    with pytest.raises(pretrained.PretrainedError, match="no encoder that can be read"):
        pretrained.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(pretrained.PretrainedError, match="tokenizer.json"):
        pretrained.load(tmp_path)
