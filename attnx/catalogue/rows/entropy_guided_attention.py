"""Entropy-guided attention."""

import jax
import jax.numpy as jnp

from attnx import masks, objectives
from attnx.catalogue.entry import PATTERNS, SEEN, Entry, Example, Input, stream
from attnx.catalogue.pairs import EXECUTIONS
from attnx.objectives.entropy_guided import TemperedPairs
from attnx.positions import Rotary


def attend(case, query, key, value, temperature, seen):
    """Temperatures of heads and queries; keys not seen are padding."""
    mask = masks.causal() if case.causal else None
    if case.execution == "step":
        mechanism = TemperedPairs(mask=mask)
        state = mechanism.init(query.shape[0], query.shape[1], key.shape[2], key.shape[3], value.shape[3], query.dtype)
        step = lambda state, query, key, value: mechanism.step(state, query, key, value, temperature=temperature)
        return stream(step, state, query, key, value)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return objectives.temperature_attention(query, key, value, temperature, mask=mask, key_positions=positions, implementation=case.implementation,
                                            block_sizes=case.block_sizes)


def entropy(case, query, key, seen):
    """Of rows, without the maps."""
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    found = objectives.row_entropy(query, key, mask=masks.causal() if case.causal else None, key_positions=positions, implementation=case.implementation,
                                   block_sizes=case.block_sizes)
    return found.astype(query.dtype)


def loss(case, entropies, thresholds):
    """Of the entropies of all layers."""
    return objectives.entropy_reg_loss(entropies, thresholds, coefficient=1.0, reduction="mean").astype(entropies.dtype)


entry = Entry(
    id="entropy-guided-attention",
    objects=(objectives.entropy_reg_loss, objectives.row_entropy, objectives.attention_entropy, objectives.temperature_attention, objectives.TemperatureAttention,
             objectives.SoftmaxOnlyBlock, objectives.head_entropy_bins),
    equation="""loss += c mean over layers and heads of (E - theta log T)^2 where |E - theta log T| > margin log T,      E_i = - sum_j w_ij log w_ij
w = softmax(q k^T / (sqrt(H) t));      block: x <- x + attention(x),  x <- beta x + x W / alpha""",
    claim="Without norms and activations heads collapse or have as much entropy as can be; temperatures and a loss on the entropies repair part of it.",
    examples=(Example(attend, {"query": "btnh", "key": "bskh", "value": "bskv", "temperature": Input("nt", jnp.exp), "seen": SEEN}, "btnv", PATTERNS, EXECUTIONS, "seen",
                      name="temperatures"),
              Example(entropy, {"query": "btnh", "key": "bskh", "seen": SEEN}, "btn", PATTERNS, ("reference", "blockwise"), "seen", name="entropies"),
              Example(loss, {"entropies": Input("lbtn", jnp.abs), "thresholds": Input("ln", jax.nn.sigmoid)}, "", sizes={"l": 3}, name="loss")),
    notes="Every layer has thresholds of its own, where the released trainer reads those of the first for all; reduction='mean' does not depend on the batch.",
    causal_layer=lambda features, num_heads, *, length, rngs: objectives.TemperatureAttention(features, num_heads, max_length=length, position=Rotary(), rngs=rngs),
)
