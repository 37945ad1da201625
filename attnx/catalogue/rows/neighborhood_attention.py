"""Neighbourhood attention in images."""

import jax

from attnx import models, vision
from attnx.catalogue.entry import Entry, Example
from attnx.masks import neighborhood_attention

WINDOW = 4, 3


def plane(case, query, key, value, bias):
    """A picture, with relative biases: by tiles, or in two steps."""
    if case.execution == "two steps":
        return vision.neighborhood_av(jax.nn.softmax(vision.neighborhood_qk(query, key, WINDOW, bias=bias)), value, WINDOW)
    return neighborhood_attention(query, key, value, WINDOW, bias=bias, implementation=case.implementation, query_tile=(2, 2), key_tile=(2, 3))


entry = Entry(
    id="neighborhood-attention",
    objects=(vision.NeighborhoodAttention, vision.NATBlock, vision.neighborhood_qk, vision.neighborhood_av, models.NAT, models.NATConfig, models.ConvTokenizer,
             models.ConvDownsampler),
    equation="""out_i = sum over j in the window of i of softmax_j(q_i . k_j / sqrt(H) + B[j - i + w - 1]) v_j
in each dimension: j = start .. start + w - 1,      start = clamp(i - w div 2, 0, n - w)""",
    claim="Windows around each pixel classify better than windows in which pixels stand at different places, more so where objects stand where none stood before, at a "
          "cost linear in the pixels.",
    examples=(Example(plane, {"query": "byxnh", "key": "byxkh", "value": "byxkv", "bias": "nij"}, "byxnv", executions=("reference", "blockwise", "pallas", "two steps"),
                      sizes={"y": 5, "x": 4, "i": 7, "j": 5}, name="plane"),),
    notes="A grid smaller than the window raises: what is released fills it up with zeros, which the projections' biases make keys of. In kernels "
          "windows with biases have at most 256 tokens.",
)
