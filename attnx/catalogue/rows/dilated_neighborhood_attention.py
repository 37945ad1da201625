"""Dilated neighbourhood attention in images."""

from attnx import models, vision
from attnx.catalogue.entry import Entry, Example
from attnx.masks import neighborhood_attention

DILATION = 2, 1


def plane(case, query, key, value, bias):
    """A picture of odd height, whose classes have different sizes: by tiles, or class by class."""
    attend = lambda query, key, value, **options: neighborhood_attention(query, key, value, 2, bias=bias, **options)
    if case.execution == "partition":
        parts = zip(*(vision.dilation_partition(x, DILATION) for x in (query, key, value)))
        return vision.dilation_merge([attend(*part, implementation="reference") for part in parts], DILATION)
    return attend(query, key, value, dilation=DILATION, implementation=case.implementation, query_tile=(2, 2), key_tile=(2, 3))


entry = Entry(
    id="dilated-neighborhood-attention",
    objects=(models.DiNATConfig, vision.dilation_partition, vision.dilation_merge, models.PatchTokenizer, models.PatchMerging),
    equation="""out_i = sum over j in the window of i of softmax_j(q_i . k_j / sqrt(H) + B[j' - i' + w - 1]) v_j,      i' = i div d,  j' = j div d
in each dimension: j = i mod d,      j' = start .. start + w - 1,      start = clamp(i' - w div 2, 0, n' - w)""",
    claim="Dilation in every second layer sees relations across the image that plain neighbourhoods do not, and loses nothing near by.",
    examples=(Example(plane, {"query": "byxnh", "key": "byxkh", "value": "byxkv", "bias": "nij"}, "byxnv", executions=("reference", "blockwise", "partition"),
                      sizes={"y": 5, "x": 4, "i": 3, "j": 3}, name="plane"),),
    notes="vision.NeighborhoodAttention and masks.neighborhood_attention take the dilation; a grid smaller than window times dilation raises. The layer is the "
          "first paper's.",
)
