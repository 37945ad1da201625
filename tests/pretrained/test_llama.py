"""GGUF decoders: tiny files in the real format, against the format's own conventions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import masks, pairs, pretrained, recurrent

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
import tiny_checkpoints as tiny  # noqa: E402

CAUSAL = pairs(mask=masks.causal())
PROMPT = "hello hello 12\tnaïve 😀"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    return path, tiny.write_llama(path, tied=False)


@pytest.fixture(scope="module")
def loaded(untied):
    return pretrained.load(untied[0])


call = nnx.jit(lambda model, tokens: model(tokens))


def test_logits_are_those_of_the_file(untied, loaded):
    """All tensor types, the permuted rows of queries and keys, grouped heads, an output table of its own."""
    tokens, positions = loaded.encode(PROMPT)
    assert tokens.dtype == jnp.int32 and positions.tolist() == [list(range(tokens.shape[1]))] and loaded.max_length == 64
    expected = tiny.llama_logits(untied[1], np.asarray(tokens[0]))
    np.testing.assert_allclose(call(loaded.model, tokens)[0], expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_numbers_of_all_tensor_types_are_exact(untied, loaded):
    block, stored = loaded.model.layers.blocks[0], untied[1]
    for path, name in {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}.items():
        np.testing.assert_array_equal(getattr(block.mlp, path).kernel[...][2].T, stored[f"blk.2.{name}"], err_msg=name)
    np.testing.assert_array_equal(block.attention.value.kernel[...][1].reshape(32, -1).T, stored["blk.1.attn_v"])
    np.testing.assert_array_equal(block.attention.out.kernel[...][3].reshape(-1, 32).T, stored["blk.3.attn_output"])
    np.testing.assert_array_equal(loaded.model.embedding.output[...], stored["output"])


def test_tied_tables_and_mechanisms_of_single_layers(tmp_path):
    """As many mechanisms as layers: each layer has its own, and the parameters that the file has for it."""
    path = tmp_path / "tiny.gguf"
    stored = tiny.write_llama(path)
    each = pretrained.load(path, mechanism=[CAUSAL] * tiny.LAYERS)
    assert len(each.model.layers.blocks) == tiny.LAYERS and each.model.embedding.output is None
    tokens, _ = each.encode(PROMPT)
    expected = tiny.llama_logits(stored, np.asarray(tokens[0]))
    np.testing.assert_allclose(call(each.model, tokens)[0], expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
    mixed = pretrained.load(path, mechanism=(CAUSAL, recurrent(log_decay=jnp.array([-0.1, -0.5]))), dtype=jnp.bfloat16)
    logits = jax.eval_shape(lambda model: model(tokens), mixed.model)
    assert len(mixed.model.layers.blocks) == 2 and logits.dtype == jnp.float32
    np.testing.assert_array_equal(mixed.model.layers.blocks[1].attention.mechanism().log_decay, jnp.array([[-0.1, -0.5]] * 2))
    np.testing.assert_array_equal(mixed.model.layers.blocks[1].mlp.up.kernel[...][1].T, stored["blk.3.ffn_up"].astype(jnp.bfloat16))


def test_generation_is_the_greedy_continuation(loaded):
    tokens, _ = loaded.encode(PROMPT)
    padded = jnp.zeros((1, tokens.shape[1] + 6), jnp.int32).at[:, :tokens.shape[1]].set(tokens)
    for i in range(tokens.shape[1], padded.shape[1]):
        padded = padded.at[0, i].set(call(loaded.model, padded)[0, i - 1].argmax())
    chosen = padded[0, tokens.shape[1]:].tolist()
    pieces = list(loaded.generate(PROMPT, 6))
    assert "".join(pieces) == loaded.tokenizer.decode(chosen[:(chosen + [0]).index(0)], skip_special_tokens=False)
    with pytest.raises(ValueError, match="max_tokens: expected at most"):
        loaded.generate(PROMPT, 64)
    with pytest.raises(TypeError, match="embed: expected an encoder"):
        loaded.embed(PROMPT)


def test_text_comes_in_whole_characters_and_ends_at_the_stop_token(loaded):
    ids = loaded.tokenizer.encode("aé😀b").ids
    assert list(loaded._pieces(iter([[i] for i in ids]))) == ["a", "é", "😀", "b"]
    assert list(loaded._pieces(iter([[i] for i in [ids[0], 0, ids[-1]]]))) == ["a"]
    assert list(loaded._pieces(iter([[i] for i in ids[:2]]))) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_tokenizer(loaded, tmp_path):
    def words(text):
        return [tiny.TOKENS[i] for i in loaded.tokenizer.encode(text).ids]

    assert words("hello hello") == ["hello", "Ġhello"]
    assert words("12 12") == ["1", "2", "Ġ", "1", "2"]  # digits are apart whatever the merges say
    assert words("<|begin|>he<|end|>") == ["<|begin|>", "he", "<|end|>"]
    for text in (PROMPT, " \n\n\tx\r\n", "<|begin|>12<|end|>", "日本語", ""):
        assert loaded.tokenizer.decode(loaded.tokenizer.encode(text).ids, skip_special_tokens=False) == text
    with pytest.raises(ValueError, match="texts: expected 1 to 64 tokens, got 0"):
        loaded.encode("")
    for pre, expected in {"gpt-2": ["<|begin|>", "12"], "llama-bpe": ["<|begin|>", "12"], "qwen2": ["<|begin|>", "1", "2"]}.items():
        tiny.write_llama(tmp_path / f"{pre}.gguf", pre=pre, bos=True)
        tokenizer = pretrained.load(tmp_path / f"{pre}.gguf").tokenizer
        assert [tiny.TOKENS[i] for i in tokenizer.encode("12").ids] == expected
        assert tokenizer.decode(tokenizer.encode(PROMPT).ids) == PROMPT


@pytest.mark.parametrize("options, message", [
    (dict(architecture="mamba"), "expected a GGUF file of architecture 'llama', got 'mamba'"),
    (dict(drop=["blk.2.ffn_up"]), "no tensor 'blk.2.ffn_up.weight'"),
    (dict(extra=["blk.1.attn_q_norm", "rope_freqs"]), "does not: blk.1.attn_q_norm.weight, rope_freqs.weight"),
    ({"rope.scaling.type": "yarn"}, "rotary positions that are scaled"),
    (dict(tokenizer="llama"), "expected a tokenizer of byte pairs .'gpt2'., the GGUF file has 'llama'"),
    (dict(pre="unheard-of"), "cuts text as 'unheard-of'"),
])
def test_what_is_not_such_a_model_is_refused(options, message, tmp_path):
    tiny.write_llama(tmp_path / "tiny.gguf", **options)
    with pytest.raises(pretrained.PretrainedError, match=message):
        pretrained.load(tmp_path)


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUG" + bytes(100))
    with pytest.raises(pretrained.PretrainedError, match="is not a GGUF file that can be read"):
        pretrained.load(tmp_path / "tiny.gguf")
