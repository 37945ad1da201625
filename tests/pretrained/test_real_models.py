"""The two packaged models, where they have been fetched (`attnx fetch smollm2-135m minilm-l6`): what they say, and steering and looking into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import masks, nn, pairs, pretrained
from attnx.nn.hooks import STAGES

for package in ("gguf", "safetensors", "tokenizers"):
    pytest.importorskip(package)

PROMPT = "The capital of France is"

# Of Hugging Face's implementation in float32: logits of the five likeliest next tokens, the vector of [CLS] and one weight of head 0 in each layer.
TOP = {7042: 17.37126, 260: 14.88859, 4528: 13.24498, 2250: 13.00946, 1315: 12.95152}
CLS = [0.350430, 0.089584, 0.398606, -0.278652, 0.440581]
FIRST_HEADS = [0.301098, 0.989487, 0.983746, 0.978525, 0.948475, 0.399351]


def fetched(name):
    try:
        return pretrained.find(name)
    except pretrained.PretrainedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm():
    fetched("smollm2-135m")
    return pretrained.load("smollm2-135m")


@pytest.fixture(scope="module")
def minilm():
    fetched("minilm-l6")
    return pretrained.load("minilm-l6")


@pytest.fixture(scope="module")
def looked(minilm):
    """Vectors and attention maps of a sentence: tokens, [1, T, D], [L, 1, N, T, T]."""
    tokens, _ = minilm.encode("The capital of France is Paris.")
    return tokens, *nnx.jit(lambda model: nn.record(model, tokens))(minilm.model)


def logits_of(pretrained, tokens, hooks=None):
    return nnx.jit(lambda model: model(tokens, hooks=hooks))(pretrained.model)


def test_smollm_continues_greedily(smollm):
    """The words, and the logits that Hugging Face's implementation gives the five likeliest in float32."""
    assert "".join(smollm.generate(PROMPT, 2)) == " Paris."
    tokens, _ = smollm.encode(PROMPT)
    assert tokens.tolist() == [[504, 3575, 282, 4649, 314]]
    last = logits_of(smollm, tokens)[0, -1]
    best, ids = jax.lax.top_k(last, len(TOP))
    assert ids.tolist() == list(TOP)
    np.testing.assert_allclose(best, list(TOP.values()), atol=1e-3)


def test_minilm_vectors_and_maps(looked):
    """Those of Hugging Face's implementation in float32."""
    tokens, vectors, maps = looked
    assert tokens.tolist() == [[101, 1996, 3007, 1997, 2605, 2003, 3000, 1012, 102]] and maps.shape == (6, 1, 12, 9, 9)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0, 0, :5], CLS, atol=1e-4)
    np.testing.assert_allclose(maps[:, 0, 0, 0, 0], FIRST_HEADS, atol=1e-5)


def test_minilm_knows_what_sentences_are_about(minilm):
    near, far, question = minilm.embed(["Paris is the capital of France.", "It rains in the mountains.", "Which city is France governed from?"])
    assert near @ question > 0.5 > 0.2 > far @ question


def test_identity_hooks_change_nothing(minilm, looked):
    tokens, vectors, _ = looked
    np.testing.assert_allclose(logits_of(minilm, tokens, {stage: lambda value, layer, at: value for stage in STAGES}), vectors, atol=1e-5)


def test_replacing_keys(minilm, looked):
    """In layer 3 every key becomes that of the first token: there all weights are equal, before it nothing has changed."""
    tokens, _, maps = looked

    def first_key(qkv, layer, at):
        query, key, value = qkv
        return query, jnp.where(layer == 3, key[:, :1], key), value

    changed = nnx.jit(lambda model: nn.record(model, tokens, hooks={"qkv": first_key}))(minilm.model)[1]
    np.testing.assert_allclose(changed[:3], maps[:3], atol=1e-5)
    np.testing.assert_allclose(changed[3], 1 / 9, atol=1e-5)
    assert abs(changed[4:] - maps[4:]).max() > 0.1


def test_replacing_the_mechanism(smollm):
    """A sliding window in all layers is the same as a hook that hides what is further away, with the whole sequence as with a cache; and not the same as
    no window."""
    tokens, _ = smollm.encode(PROMPT)
    local = pretrained.load("smollm2-135m", mechanism=pairs(mask=masks.sliding_window(3)))
    hidden = logits_of(smollm, tokens, {"scores": lambda scores, layer, at: jnp.where(at.query - at.key < 3, scores, -jnp.inf)})
    step = nnx.jit(lambda model, state, tokens: model.step(state, tokens))
    state, first = step(local.model, local.model.init_state(1, 8), tokens[:, :4])
    state, last = step(local.model, state, tokens[:, 4:])
    assert jax.tree.leaves(state.layers)[1].shape == (30, 1, 3, 3, 64)  # a rolling cache
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), hidden, atol=1e-3)
    assert abs(hidden[0, -1, jnp.array(list(TOP))] - jnp.array(list(TOP.values()))).max() > 1


def test_smollm_agrees_with_transformers(smollm):
    """Logits of text, code and a chat, to 1e-3."""
    pytest.importorskip("accelerate")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = pretrained.find("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (PROMPT, "def f(n):\n    return 12345 + n  # na\u00efve \U0001f600\t\t x\r\n\n", "<|im_start|>user\nIt's 3.14, they'll say<|im_end|>\n"):
        tokens, _ = smollm.encode(text)
        assert tokens[0].tolist() == tokenizer(text)["input_ids"]
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens.tolist())).logits.numpy()
        np.testing.assert_allclose(logits_of(smollm, tokens), expected, atol=1e-3)


def test_minilm_agrees_with_transformers(minilm):
    """Vectors and attention maps of two texts of different lengths, to 1e-3."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(pretrained.find("minilm-l6"), attn_implementation="eager")
    tokens, positions = minilm.encode(["Paris is the capital of France.", "It rains."])
    with torch.no_grad():
        result = theirs(torch.tensor(tokens.tolist()), torch.tensor((positions >= 0).astype(int).tolist()), output_attentions=True)
    vectors, maps = nnx.jit(lambda model: nn.record(model, tokens, positions=positions))(minilm.model)
    real = positions >= 0
    np.testing.assert_allclose(vectors[real], result.last_hidden_state.numpy()[real], atol=1e-3)
    expected = np.stack([x.numpy() for x in result.attentions])
    np.testing.assert_allclose(maps[:, :1], expected[:, :1], atol=1e-3)
    np.testing.assert_allclose(maps[:, 1, :, :5], expected[:, 1, :, :5], atol=1e-3)
