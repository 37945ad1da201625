"""Attention on the sphere."""

from functools import partial

from attnx import geometry
from attnx.catalogue.entry import Entry, Example, Input


def call(case, query, key, value, key_mask, attend):
    """Fields on grids."""
    return attend(query, key, value, key_mask=key_mask, implementation=case.implementation, block_sizes=case.block_sizes)


def example(attend, executions, name, out_shape, in_shape):
    """From the input grid [r, l] to the output grid [y, x]."""
    sizes = dict(zip("yx", out_shape)) | dict(zip("rl", in_shape))
    inputs = {"query": "byxnh", "key": "brlkh", "value": "brlkv", "key_mask": Input("brl", lambda normal: normal > -1)}
    return Example(partial(call, attend=attend), inputs, "byxnv", executions=executions, mask="key_mask", sizes=sizes, name=name)


PAIRS = ("reference", "blockwise", "pallas", "ring")
LOCAL = partial(geometry.s2_neighborhood_attention, theta_cutoff=0.9)

entry = Entry(
    id="attention-on-sphere",
    objects=(geometry.s2_attention, geometry.s2_neighborhood_attention, geometry.AttentionS2, geometry.NeighborhoodAttentionS2, geometry.sphere_quadrature,
             geometry.s2_neighborhood_index),
    equation="""out_p = sum over s of softmax_s(q_p . k_s / sqrt(H) + log w_s) v_s,      w_s the area that point s stands for
locally: s within a great-circle distance of p""",
    claim="What it finds turns with the sphere better than attention without weights or in windows of the grid, and local operators are learnt better near the poles.",
    examples=(example(geometry.s2_attention, PAIRS, "global", (4, 4), (5, 6)), example(LOCAL, (*PAIRS, "gathered"), "disks", (5, 8), (5, 8)),
              example(LOCAL, ("reference", "gathered"), "disks, to a coarser grid", (3, 4), (5, 8)),
              example(LOCAL, ("reference", "gathered"), "disks, to a finer grid", (5, 8), (3, 4))),
    notes="Disks are a thousandth larger than their cutoff, as in the released code, so that points on the rim are inside.",
)
