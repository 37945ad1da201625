"""Generalised neighbourhood attention."""

from attnx import masks
from attnx.catalogue.entry import Entry, Example


def line(case, query, key, value):
    """A sequence: three keys of one residue class, shared by two queries; a short one has tiles so small that there are several."""
    tiles = dict(query_tile=(2,), key_tile=(3,)) if query.shape[1] < 100 else {}
    return masks.neighborhood_attention(query, key, value, 3, stride=2, dilation=2 if query.shape[1] >= 6 else 1, is_causal=case.causal,
                                        implementation=case.implementation, **tiles)


def plane(case, query, key, value):
    """A picture."""
    return masks.neighborhood_attention(query, key, value, (4, 3), stride=(3, 1), dilation=(1, 2), implementation=case.implementation, query_tile=(2, 2), key_tile=(2, 3))


def video(case, query, key, value, extra_key, extra_value):
    """Frames, causal in time, with a text that all tokens see."""
    return masks.neighborhood_attention(query, key, value, (2, 3, 3), is_causal=(True, False, False), extra_key=extra_key, extra_value=extra_value,
                                        implementation=case.implementation, query_tile=(1, 2, 4), key_tile=(2, 2, 2))


EXECUTIONS = ("reference", "blockwise", "pallas")

entry = Entry(
    id="generalized-neighborhood-attention",
    objects=(masks.neighborhood_attention, masks.neighborhood, masks.neighborhood_plan, masks.token_permute, masks.token_unpermute),
    equation="""out_i = sum over j in the neighbourhood of i of softmax_j(q_i . k_j / sqrt(H)) v_j
in each dimension: w keys around leader(i) = i div s * s + s div 2, shifted inside at borders, all in i's residue class mod the dilation""",
    claim="With strides that match the tiles, attention is as many times faster than dense attention as it has fewer pairs; with sliding windows it is not.",
    examples=(Example(line, {"query": "btnh", "key": "bskh", "value": "bskv"}, "btnv", ("noncausal self", "causal self"), EXECUTIONS, local=True, linear="t",
                      lengths=(3, 6), name="line"),
              Example(plane, {"query": "byxnh", "key": "byxkh", "value": "byxkv"}, "byxnv", executions=EXECUTIONS[:2], sizes={"y": 5, "x": 7}, name="plane"),
              Example(video, {"query": "bzyxnh", "key": "bzyxkh", "value": "bzyxkv", "extra_key": "bskh", "extra_value": "bskv"}, "bzyxnv", executions=EXECUTIONS[:2],
                      sizes={"z": 3, "y": 4, "x": 4}, name="video and text")),
    notes="Any weights and every execution of the pairs engine run on permuted tokens; speed depends on tiles that fit (masks.neighborhood_plan). In kernels for TPUs "
          "a tile of a power of two of at least 128 tokens is a block. Not measured on an accelerator.",
)
