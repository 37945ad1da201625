"""Latte."""

import jax.numpy as jnp

from attnx import linear
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.linear.latent_states import LatteWindow

WINDOW = 4


def call(case, query, key, value, seen):
    """Latents alone; keys not seen are padding."""
    if case.execution == "step":
        state = linear.latte_init(query.shape[0], *key.shape[2:], value.shape[3], dtype=jnp.promote_types(query.dtype, jnp.float32))
        return stream(linear.latte_step, state, query, key, value)
    return linear.latte(query, key, value, is_causal=case.causal, key_positions=jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1),
                        implementation=case.implementation, chunk_size=4 if case.execution == "chunked" else None)


def window(case, query_logits, key_logits, query, key, value, seen):
    """Latents and a window of four tokens."""
    if case.execution == "step":
        mechanism = LatteWindow(WINDOW, key_logits.shape[3])
        state = mechanism.init(query.shape[0], query.shape[1], *key.shape[2:], value.shape[3], query.dtype)
        step = lambda state, query_logits, key_logits, *token: mechanism.step(state, *token, query_logits=query_logits, key_logits=key_logits)
        return stream(step, state, query_logits, key_logits, query, key, value)
    if not case.causal:
        raise NotImplementedError("the window is causal")
    return linear.latte_window(query_logits, key_logits, query, key, value, window=WINDOW, positions=jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1),
                               implementation=case.implementation)


def layer(features, num_heads, *, length, rngs):
    """Latents, as many as features, and a window of a quarter of the length."""
    return linear.LatteWindowAttention(features, num_heads, latents=features, window=max(length // 4, 1), rngs=rngs)


EXECUTIONS = ("parallel", "chunked", "recurrent", "pallas", "step")

entry = Entry(
    id="latte-latent-attention",
    objects=(linear.latte, linear.latte_step, linear.latte_window, linear.LatteAttention, linear.LatteWindowAttention, linear.position_softmax_attention),
    equation="""out_t = sum over l of softmax_l(q_tl) sum over s of softmax_s(k_sl) v_s,      s <= t where causal, in the softmax too
with a window: latent 0 is softmax attention to the last w tokens""",
    claim="As good as softmax attention, with a token generated in the same time after any number of others.",
    examples=(
        Example(call, {"query": "btnl", "key": "bskl", "value": "bskv", "seen": SEEN}, "btnv", ("causal self", "noncausal self", "noncausal cross"), EXECUTIONS,
                "seen", linear="t", sizes={"l": 5}),
        Example(window, {"query_logits": "btnm", "key_logits": "bskl", "query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}, "btnv", ("causal self",),
                ("parallel", "chunked", "step"), "seen", linear="t", sizes={"l": 5, "m": 6}, name="with a window")),
    causal_layer=layer,
    notes="A latent's state is its mean of values and the log of its normaliser, where the paper's code keeps sums and a running maximum. The window is a later "
          "extension, reconstructed.",
)
