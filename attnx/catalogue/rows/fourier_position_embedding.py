"""Fourier position embedding."""

import jax
import jax.numpy as jnp

from attnx import nn, positions
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example
from attnx.catalogue.pairs import EXECUTIONS, attend
from attnx.masks.causal import causal
from attnx.mechanism import pairs


def call(case, query, key, value, seen, coefficients):
    """Queries and keys turned by series of two tones, then softmax attention."""
    tones, _ = positions.fope_frequencies(8, train_length=63)
    turn = lambda x: positions.fope(x, *positions.fope_tables(jnp.arange(x.shape[1]), tones, *coefficients, 8))
    return attend(case, turn(query), turn(key), value, seen)


def coefficients(key):
    """Of two tones and two pairs, for each of two key-value heads."""
    return tuple(positions.fope_init(key, 2, 2, 2, 0.6) for key in jax.random.split(key))


def layer(features, num_heads, *, length, rngs):
    """Attention with such positions, and normalised queries and keys."""
    position = positions.FourierPosition(num_heads, features // num_heads, train_length=length, rngs=rngs)
    return nn.Attention(features, num_heads, mechanism=pairs(mask=causal()), position=position, qk_norm="rms", rngs=rngs)


entry = Entry(
    id="fourier-position-embedding",
    objects=(positions.FourierPosition, positions.fope, positions.fope_tables, positions.fope_frequencies, positions.fope_init, positions.fope_expand),
    equation="""(a, b) -> (a C - b S, b C + a S),      S_m(p) = sum_j W^sin_jm sin(w_j p),      C_m(p) = sum_j W^cos_jm cos(w_j p)
w_j = base^(-2j / H), those of at least 2 pi / training length""",
    claim="It loses less beyond the training length than rotary positions do, and finds a passkey there as often at least.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN, "coefficients": coefficients}, "btnv", PATTERNS,
                      tuple(name for name in EXECUTIONS if name not in ("pallas", "ring")), "seen"),),
    notes="Pairs without a series are left alone; pad='reference' turns and stretches them as the released code does.",
    causal_layer=layer,
)
