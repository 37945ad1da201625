"""Linformer."""

import jax.numpy as jnp

from attnx import analysis, linear
from attnx.catalogue.entry import SEEN, Entry, Example, Input


def call(case, query, key, value, key_projection, value_projection, seen):
    """Five slots; keys not seen are padding."""
    return linear.linformer_attention(query, key, value, key_projection, value_projection, is_causal=case.causal, implementation=case.implementation,
                                      key_positions=jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1), block_sizes=case.block_sizes)


def slots(name, kind, **inputs):
    """An example of a projection alone."""
    def call(case, x, seen, kernel=None):
        return linear.project_sequence(x, kind, kernel=kernel, window=None if kind == "linear" else 4, seen=seen)

    return Example(call, {"x": "bskh", "seen": SEEN, **inputs}, "bikh", mask="seen", linear="s", sizes={"i": 5, "w": 4}, name=name)


projection = lambda axes: Input(axes, lambda normal: 0.5 * normal)

entry = Entry(
    id="linformer",
    objects=(linear.linformer_attention, linear.LinformerAttention, linear.LinformerProjection, linear.project_sequence, analysis.spectrum),
    equation="""out = softmax(Q (E K)^T / sqrt(H)) (F V),      E, F [k, S] over the sequence, S-independent k""",
    claim="Attention matrices are nearly of low rank, so that a few slots serve as well as all keys, at a time linear in the length.",
    examples=(
        Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "key_projection": projection("kis"), "value_projection": projection("is"), "seen": SEEN},
                "btnv", ("noncausal self", "noncausal cross"), ("reference", "blockwise", "pallas"), "seen", linear="t", sizes={"i": 5}),
        *(slots(name, kind, **inputs) for name, kind, inputs in (("linear slots", "linear", {"kernel": projection("is")}), ("means", "mean_pool", {}),
                                                                 ("largest", "max_pool", {}), ("strided convolution", "conv", {"kernel": projection("whh")})))),
    notes="There is no causal form, and asking for one raises. Padding is zeroed before the projection, which the known ports do not do.",
)
