import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import masks, pairs
from attnx.models import Decoder, TransformerConfig, generate, generation

B, T, LENGTH = 2, 23, 5
CONFIG = TransformerConfig(vocab_size=16, features=16, num_layers=2, num_heads=2, hidden_features=24)
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, 16)


@pytest.fixture(scope="module", params=["causal", "window"])
def model(request):
    mask = masks.causal() if request.param == "causal" else masks.sliding_window(7)
    return Decoder(CONFIG, pairs(mask=mask, implementation="reference"), rngs=nnx.Rngs(0))


def tokens_of(model, **options):
    return np.stack(list(generate(model, TOKENS, LENGTH, **options)), 1)


@pytest.mark.parametrize("pieces", [(128, 16, 1), (5, 2, 1)])
def test_greedy_tokens_are_the_likeliest_of_the_whole_sequence(model, pieces, monkeypatch):
    """However the tokens before are cut, with other hooks and without."""
    monkeypatch.setattr(generation, "_READ_AT_ONCE", pieces)
    for hooks in (None, {"output": lambda value, layer, at: jnp.where(at.head == layer, -value, value)}):
        chosen = tokens_of(model, temperature=0.0, hooks=hooks)
        logits = nnx.jit(lambda m, tokens: m(tokens, hooks=hooks))(model, jnp.concatenate([TOKENS, chosen], 1))
        np.testing.assert_array_equal(chosen, logits[:, T - 1:-1].argmax(-1))


def test_choices_follow_the_key_and_the_temperature(model):
    draw = lambda seed, **options: tokens_of(model, key=jax.random.key(seed), **options)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1, temperature=3.0) != draw(2, temperature=3.0)).any()
    likeliest = tokens_of(model, temperature=0.0)
    np.testing.assert_array_equal(draw(1, top_k=1), likeliest)
    np.testing.assert_array_equal(draw(1, temperature=1e-6), likeliest)
    assert list(generate(model, TOKENS, 0)) == []


@pytest.mark.parametrize("arguments, options, message", [
    ((TOKENS[:, :0], 1), {}, "tokens: expected integers of shape .B, t., t at least 1"),
    ((TOKENS[0], 1), {}, "tokens: expected"),
    ((1.0 * TOKENS, 1), {}, "tokens: expected"),
    ((TOKENS, -1), {}, "length: expected 0 or more, got -1"),
    ((TOKENS, 1), dict(temperature=-0.5), "temperature: expected 0 or more, got -0.5"),
    ((TOKENS, 1), dict(top_k=17), "top_k: expected 1 to 16, got 17"),
])
def test_wrong_arguments(model, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, *arguments, **options)


def test_learned_positions_end():
    """A model reads as many tokens as it has positions, and says the token after them."""
    config = TransformerConfig(vocab_size=16, features=8, num_layers=1, num_heads=2, position_embedding="learned", max_length=8)
    model = Decoder(config, pairs(mask=masks.causal()), rngs=nnx.Rngs(0))
    assert model.reach == 8 and len(list(generate(model, TOKENS[:, :4], 5))) == 5
    with pytest.raises(ValueError, match="length: expected at most 5 after 4 tokens, for the model reads 8, got 6"):
        generate(model, TOKENS[:, :4], 6)
