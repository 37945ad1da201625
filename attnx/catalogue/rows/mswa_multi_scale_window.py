"""Multi-scale window attention."""

import jax.numpy as jnp

from attnx import masks
from attnx.catalogue.entry import SEEN, Entry, Example, stream
from attnx.catalogue.modules import rotary_layer

WINDOWS = (2, 3, 3, 20)


def call(case, query, key, value, seen):
    """A window a head; two heads of one window read different keys."""
    if case.execution == "step":
        mechanism = masks.multi_scale_window(WINDOWS)
        state = mechanism.init(*query.shape[:2], key.shape[2], key.shape[3], value.shape[3], query.dtype)
        return stream(mechanism.step, state, query, key, value)
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return masks.multi_window_attention(query, key, value, WINDOWS, key_positions=positions, implementation=case.execution, block_sizes=case.block_sizes)


entry = Entry(
    id="mswa-multi-scale-window",
    objects=(masks.multi_window_attention, masks.mswa_windows, masks.per_head_window, masks.multi_scale_window, masks.mswa_mechanisms, masks.MSWAttention),
    equation="""out_i = sum over i - w < j <= i of softmax_j(s_ij) v_j
w     = base * f_layer * f_head,      f = 1/4, 1/2, 1, 2 by group of heads, and of layers from shallow to deep""",
    claim="With seven eighths of the windows' budget it models text better than one window for all heads and layers.",
    examples=(Example(call, {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}, "btnv", ("causal self",),
                      ("reference", "gathered", "blockwise", "pallas", "ring", "step"), "seen", linear="t"),),
    notes="Reconstructed from the abstract; where heads or layers do not divide by four, earlier groups have more.",
    causal_layer=rotary_layer(lambda length, num_heads: masks.multi_scale_window(masks.mswa_windows(1, num_heads, max(length // 4, 1), mode="head")[0])),
)
