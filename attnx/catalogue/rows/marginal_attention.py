"""Attention as posterior marginals of hidden edges."""

import functools

import jax.numpy as jnp

from attnx import masks, weights
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example
from attnx.catalogue.pairs import pairs_example
from attnx.mechanism import pairs
from attnx.nn import Attention
from attnx.positions import Rotary


def call(case, potentials, value, seen, transition=None, *, structure):
    """The posterior means; where a structure looks at all queries, it cannot be causal."""
    mask = seen[:, None, None]
    if structure in ("competition", "chain"):
        if case.causal:
            raise NotImplementedError(f"{structure}: what an early query finds depends on later ones")
        mask = mask if case.cross else mask & seen[:, None, :, None]
    elif case.causal:
        mask = mask & jnp.tri(*potentials.shape[2:], dtype=bool)
    return weights.marginal_attention(potentials, value, structure=structure, transition=transition, mask=mask)[0]


def _example(structure, causal=True, **inputs):
    patterns = PATTERNS if causal else tuple(pattern for pattern in PATTERNS if pattern.startswith("noncausal"))
    sizes = {"n": 2, "k": 1} | ({"t": 5, "s": 4} if inputs else {})
    return Example(functools.partial(call, structure=structure), {"potentials": "bnts", "value": "bskv", "seen": SEEN, **inputs}, "btnv", patterns, mask="seen",
                   sizes=sizes, lengths=(1,), name=structure)


def causal_layer(features, num_heads, *, length, rngs):
    """Two edges a query, with rotary positions."""
    del length
    return Attention(features, num_heads, mechanism=pairs(mask=masks.causal(), weights=weights.edge_pairs()), position=Rotary(), rngs=rngs)


entry = Entry(
    id="marginal-attention",
    objects=(weights.marginal_attention, weights.posterior_edges, weights.brute_force_marginals, weights.edge_pairs),
    equation="""p(edges, x) ~ p(edges) product over edges (i, j) of e^s_ij,      out_i = E[v(edges at i) | x]
one edge a query: softmax;  edges by themselves: sigmoid;  one a key: softmax over queries;  two a query: 2 e_j (Z - e_j) / (Z^2 - sum e^2);  a chain of edges""",
    claim="The structure that is assumed of the edges decides what attention finds: with two edges a query it finds the mean of two values better than with one.",
    examples=(pairs_example(lambda: dict(weights=weights.edge_pairs()), name="pairs, of queries and keys"), _example("pairs"), _example("categorical"),
              _example("bernoulli"), _example("competition", causal=False), _example("chain", causal=False, transition="ss")),
    notes="The principle is the paper's, the list of structures is this library's. The likeliest edge alone ('map') has the gradient of softmax.",
    causal_layer=causal_layer,
)
