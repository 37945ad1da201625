"""YOSO."""

import jax
import jax.numpy as jnp

from attnx import sparse, weights
from attnx.catalogue.entry import SEEN, Entry, Example

BITS, HASHES = 2, 12


def expectation(case, query, key, value, seen):
    """The expectation with the slope of its weights, so that its gradient is one; keys not seen are padding."""
    if case.causal:
        raise NotImplementedError("tables hold all keys, so what they estimate is not causal")
    return sparse.yoso_expectation(query, key, value, bits=BITS, gradient="exact", key_positions=jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1),
                                   implementation=case.implementation, block_sizes=case.block_sizes)


def sample(case, query, key, value, seen):
    """A sample. Codes have no derivative: only values have gradients here."""
    if case.causal:
        raise NotImplementedError("tables hold all keys")
    positions = jnp.where(seen, jnp.arange(key.shape[1], dtype=jnp.int32), -1)
    return sparse.yoso_sample(jax.random.key(0), jax.lax.stop_gradient(query), jax.lax.stop_gradient(key), value, bits=BITS, hashes=HASHES, key_positions=positions,
                              implementation=case.implementation)


ARRAYS = {"query": "btnh", "key": "bskh", "value": "bskv", "seen": SEEN}
PATTERNS = ("noncausal self", "noncausal cross")

entry = Entry(
    id="yoso",
    objects=(sparse.yoso_sample, sparse.yoso_expectation, sparse.lsh_codes, sparse.bucket_cumulate, sparse.bucket_query, weights.collision, sparse.YosoAttention),
    equation="""out_i = 1/m sum over r of  sum over j with code_r(k_j) = code_r(q_i) of v_j,        codes of tau random hyperplanes
E out_i = sum over j of (1 - arccos(q_i . k_j) / pi)^tau v_j""",
    claim="Sampled attention is as accurate as its expectation, and that as softmax attention, at a time linear in the length.",
    examples=(
        Example(sample, ARRAYS, "btnv", PATTERNS, ("reference", "gathered"), "seen", linear="t", name="sampled"),
        Example(expectation, ARRAYS, "btnv", PATTERNS, ("reference", "blockwise", "pallas", "ring"), "seen", name="expectation")),
    notes="Gradients of queries and keys are stand-ins, as in the paper: bits / 2 times the share of tables in which a pair meets. Outputs become unit vectors in "
          "the layer.",
)

