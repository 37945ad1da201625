"""Lean attention."""

import numpy as np

from attnx.catalogue.entry import SEEN, Entry, Example
from attnx.core import lean_attention_decode, softmax_state_finish, softmax_state_identity, softmax_state_merge, softmax_state_of
from attnx.core.decode import decode
from pallas_kernels.decode import fixed_split_plan, flash_decoding_splits, no_split_plan, simulate_makespan, stream_k_plan

PLANS = {"stream-K": lambda *args: stream_k_plan(*args, 5), "fixed split": lambda *args: fixed_split_plan(*args, 2), "no split": no_split_plan}


def call(case, query, key, value, seen):
    """The first tokens that are seen, in tiles of four."""
    lengths = seen.sum(1)
    if case.execution in PLANS:
        plan = PLANS[case.execution](np.full(key.shape[0], key.shape[1]), key.shape[2], 4)
        return lean_attention_decode(query, key, value, lengths, plan)[0]
    return decode(query, key, value, lengths, implementation=case.implementation, block_size=4 if case.implementation == "blockwise" else None,
                  splits=3 if case.implementation == "blockwise" else None)


entry = Entry(
    id="lean-attention",
    objects=(lean_attention_decode, stream_k_plan, fixed_split_plan, no_split_plan, flash_decoding_splits, simulate_makespan, softmax_state_of,
             softmax_state_identity, softmax_state_merge, softmax_state_finish),
    equation="""m = max(m_a, m_b),      l = e^(m_a - m) l_a + e^(m_b - m) l_b,      o = e^(m_a - m) o_a + e^(m_b - m) o_b,      out = o / l
tiles of all heads and sequences in one list, cut into equal shares""",
    claim="Equal shares of all tiles decode faster than a split by head or a fixed number of pieces, the more so the longer the context and the smaller the batch.",
    examples=(Example(call, {"query": "bqnh", "key": "bskh", "value": "bskv", "seen": SEEN}, "bqnv",
                      executions=("reference", "blockwise", "pallas", "stream-K", "fixed split", "no split"), mask="seen", linear="s", sizes={"q": 1}),),
    notes="To decode, call attnx.decode: it makes the same equal shares on the device, with all heads of a sequence in a tile. Plans are for study and comparison.",
)
