"""Wrong calls of the public API: each names the argument, what came and what was expected, in one line."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import masks, scores, weights
from attnx.core import cache
from pallas_kernels.parts import part

Q, K, V = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 5, 2, 8)), jnp.ones((2, 5, 2, 3))
X = jnp.ones((2, 6, 4, 8))
KEY = jax.random.key(0)
CACHE = cache.init(2, 4, 2, 8, 3)


def modulo(at, step):
    return (at.query - at.key) % step == 0


class Unhashable:
    __hash__ = None

    def __call__(self, at):
        return at.query >= at.key


def call(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


def attention(query=Q, key=K, value=V, **kwargs):
    return call(attnx.attention, query, key, value, **kwargs)


def jax_like(query=X, key=X, value=X, **kwargs):
    return call(attnx.dot_product_attention, query, key, value, **kwargs)


# name: (call, error, what the message must hold: the argument, what came, what was expected)
WRONG = {
    # the arrays
    "query rank": (attention(Q[0]), ValueError, "query:", "float32[6, 4, 8]", "[B, T, N, H]"),
    "query kind": (attention("abc"), TypeError, "query:", "'abc'", "array"),
    "query list": (attention([[1.0]]), TypeError, "query:", "list", "array"),
    "query integers": (attention(Q.astype(int)), TypeError, "query:", "int32[2, 6, 4, 8]", "floating-point"),
    "query of 8 bits": (attention(Q.astype(jnp.float8_e4m3fn)), TypeError, "query:", "float8_e4m3fn[2, 6, 4, 8]", "16 bits"),
    "key rank": (attention(key=K[0]), ValueError, "key:", "float32[5, 2, 8]", "[B, S, K, H]"),
    "key batch": (attention(key=K[:1]), ValueError, "key:", "float32[1, 5, 2, 8]", "batch size 2"),
    "key head size": (attention(key=K[..., :4]), ValueError, "key:", "float32[2, 5, 2, 4]", "head size 8"),
    "key heads": (attention(key=jnp.ones((2, 5, 3, 8))), ValueError, "key:", "float32[2, 5, 3, 8]", "divides the query's 4"),
    "key no heads": (attention(key=K[:, :, :0]), ValueError, "key:", "float32[2, 5, 0, 8]", "divides the query's 4"),
    "key dtype": (attention(key=K.astype(jnp.bfloat16)), TypeError, "key:", "bfloat16[2, 5, 2, 8]", "float32"),
    "value missing": (attention(value=None), TypeError, "value:", "None", "array"),
    "value rank": (attention(value=V[..., 0]), ValueError, "value:", "float32[2, 5, 2]", "[B, S, K, H"),
    "value length": (attention(value=V[:, :3]), ValueError, "value:", "float32[2, 3, 2, 3]", "[2, 5, 2, Hv]"),
    "value heads": (attention(value=V[:, :, :1]), ValueError, "value:", "float32[2, 5, 1, 3]", "[2, 5, 2, Hv]"),
    "value dtype": (attention(value=V.astype(jnp.float16)), TypeError, "value:", "float16[2, 5, 2, 3]", "float32"),
    # the options
    "scale array": (attention(scale=jnp.ones(())), TypeError, "scale:", "float32[]", "static number"),
    "scale text": (attention(scale="half"), TypeError, "scale:", "'half'", "static number"),
    "dropout_rate 1": (attention(dropout_rate=1.0, dropout_key=KEY), ValueError, "dropout_rate:", "1.0", "[0, 1)"),
    "dropout_rate negative": (attention(dropout_rate=-0.1, dropout_key=KEY), ValueError, "dropout_rate:", "-0.1", "[0, 1)"),
    "dropout_rate kind": (attention(dropout_rate=True, dropout_key=KEY), TypeError, "dropout_rate:", "True", "static number"),
    "dropout_key missing": (attention(dropout_rate=0.1), ValueError, "dropout_key:", "None", "PRNG key"),
    "dropout_key kind": (attention(dropout_rate=0.1, dropout_key="seed"), TypeError, "dropout_key:", "'seed'", "PRNG key"),
    "dropout_key batch": (attention(dropout_rate=0.1, dropout_key=jax.random.split(KEY)), TypeError, "dropout_key:", "[2]", "PRNG key"),
    "query_positions floats": (attention(query_positions=jnp.arange(6.0)), TypeError, "query_positions:", "float32[6]", "integers"),
    "query_positions length": (attention(query_positions=jnp.arange(5)), ValueError, "query_positions:", "int32[5]", "[6]"),
    "query_positions rank": (attention(query_positions=jnp.zeros((1, 2, 6), int)), ValueError, "query_positions:", "[1, 2, 6]", "rank 1 or 2"),
    "key_positions batch": (attention(key_positions=jnp.zeros((3, 5), int)), ValueError, "key_positions:", "int32[3, 5]", "[2, 5]"),
    "key_positions text": (attention(key_positions="abc"), TypeError, "key_positions:", "'abc'", "integers"),
    "implementation": (attention(implementation="fast"), ValueError, "implementation:", "'fast'", "'blockwise'"),
    "block_sizes number": (attention(block_sizes=64), TypeError, "block_sizes:", "64", "(queries, keys)"),
    "block_sizes three": (attention(block_sizes=(1, 2, 3)), ValueError, "block_sizes:", "(1, 2, 3)", "(queries, keys)"),
    "block_sizes zero": (attention(block_sizes=(0, 4)), ValueError, "block_sizes:", "0", "at least 1"),
    "block_sizes float": (attention(block_sizes=(4.0, 4)), TypeError, "block_sizes:", "4.0", "integer"),
    "hooks stage": (attention(hooks={"logits": min}), ValueError, "hooks:", "logits", "'scores' and 'weights'"),
    "hooks kind": (attention(hooks=min), TypeError, "hooks:", "min", "dict"),
    "return_residual": (attention(weights=weights.relu(), return_residual=True), ValueError, "return_residual:", "Relu", "exponential family"),
    "unknown option": (attention(droput_rate=0.1), TypeError, "droput_rate"),
    # the parts
    "scores array": (attention(scores=jnp.ones((6, 5))), TypeError, "scores:", "float32[6, 5]", "score"),
    "scores of arrays": (attention(scores=(jnp.ones((6, 5)),)), TypeError, "scores[0]:", "float32[6, 5]", "attnx.scores.bias(array)"),
    "scores of masks": (attention(scores=[masks.causal()]), TypeError, "scores[0]:", "Causal", "score"),
    "mask array": (attention(mask=jnp.ones((6, 5), bool)), TypeError, "mask:", "bool[6, 5]", "attnx.masks.explicit(array)"),
    "mask True": (attention(mask=True), TypeError, "mask:", "True", "mask"),
    "weights name": (attention(weights="softmax"), TypeError, "weights:", "'softmax'", "attnx.weights.softmax()"),
    "weights function": (attention(weights=weights.softmax), TypeError, "weights:", "function", "attnx.weights.softmax()"),
    "bias shape": (attention(scores=scores.bias(jnp.ones((6, 4)))), ValueError, "scores[0] (Bias):", "4", "key axis of size 1 or 5", "(6, 4)"),
    "bias heads": (attention(scores=scores.bias(jnp.ones((2, 6, 5)))), ValueError, "scores[0] (Bias):", "2", "head axis of size 1 or 4"),
    "second score": (attention(scores=(scores.soft_cap(5.0), scores.alibi(8))), ValueError, "scores[1] (Alibi):", "8", "head axis of size 1 or 4"),
    "t5 heads": (attention(scores=scores.t5_bias(jnp.ones((32, 3)))), ValueError, "scores[0] (T5Bias):", "3", "head axis of size 1 or 4"),
    "explicit shape": (attention(mask=masks.explicit(jnp.ones((5, 5), bool))), ValueError, "mask (Explicit):", "5", "query axis of size 1 or 6"),
    "documents shape": (attention(mask=masks.documents(jnp.zeros(6, int))), ValueError, "mask (Documents):", "6", "key axis of size 1 or 5"),
    "composed mask": (attention(mask=masks.causal() & masks.lengths(jnp.ones(3, int))), ValueError, "mask (And):", "3", "batch axis of size 1 or 2"),
    "sink heads": (attention(weights=weights.softmax(sink=jnp.ones(3))), ValueError, "weights (Softmax):", "3", "head axis of size 1 or 4"),
    "temperature shape": (attention(weights=weights.softmax(temperature=jnp.ones(5))), ValueError, "weights (Softmax):", "5", "query axis of size 1 or 6"),
    "sigmoid bias": (attention(weights=weights.sigmoid(jnp.ones(3))), ValueError, "weights (Sigmoid):", "3", "head axis of size 1 or 4"),
    "operand rank": (attention(scores=scores.elementwise(min, attnx.Operand(jnp.ones(4), ("head", None)))), ValueError,
                     "scores[0] (Elementwise):", "(4,)", "('head', None)"),
    "operand axis": (attention(scores=scores.elementwise(min, attnx.Operand(jnp.ones(4), ("heads",)))), ValueError,
                     "scores[0] (Elementwise):", "('heads',)", "'head'"),
    "operand axis twice": (attention(scores=scores.elementwise(min, attnx.Operand(jnp.ones((4, 4)), ("head", "head")))), ValueError,
                           "scores[0] (Elementwise):", "('head', 'head')", "distinct"),
    "operand offset": (attention(scores=scores.elementwise(min, attnx.Operand(jnp.ones((10, 6)), ("offset", "query")))), ValueError,
                       "scores[0] (Elementwise):", "('offset', 'query')", "no other position axis"),
    # the halves
    "row_statistics key": (call(attnx.row_statistics, Q, K[..., :4]), ValueError, "key:", "float32[2, 5, 2, 4]", "head size 8"),
    "row_statistics option": (call(attnx.row_statistics, Q, K, hooks={}), TypeError, "hooks"),
    "row_statistics implementation": (call(attnx.row_statistics, Q, K, implementation="fast"), ValueError, "implementation:", "'fast'", "'reference'"),
    "row_statistics block_sizes": (call(attnx.row_statistics, Q, K, block_sizes=(4,)), ValueError, "block_sizes:", "(4,)", "(queries, keys)"),
    "apply value": (call(attnx.apply, Q, K, None, jnp.ones((2, 6, 4))), TypeError, "value:", "None", "array"),
    "apply r shape": (call(attnx.apply, Q, K, V, jnp.ones((2, 4, 6))), ValueError, "r:", "float32[2, 4, 6]", "[2, 6, 4]"),
    "apply r number": (call(attnx.apply, Q, K, V, 1.0), ValueError, "r:", "1.0", "[2, 6, 4]"),
    "apply r missing": (call(attnx.apply, Q, K, V, ()), ValueError, "r:", "got 0", "1 row statistics"),
    "apply r of relu": (call(attnx.apply, Q, K, V, jnp.ones((2, 6, 4)), weights=weights.relu()), ValueError, "r:", "got 1", "0 row statistics"),
    "attention_weights mask": (call(attnx.attention_weights, Q, K, mask=jnp.ones((6, 5), bool)), TypeError, "mask:", "bool[6, 5]", "explicit"),
    "attend_scores rank": (call(attnx.attend_scores, jnp.ones(5), V[0, :, 0]), ValueError, "scores:", "float32[5]", "[..., T, S]"),
    "attend_scores integers": (call(attnx.attend_scores, jnp.ones((1, 5), int), V[0, :, 0]), ValueError, "scores:", "int32[1, 5]", "floating-point"),
    "attend_scores text": (call(attnx.attend_scores, "abc", V), TypeError, "scores:", "'abc'", "array"),
    "attend_scores length": (call(attnx.attend_scores, jnp.ones((1, 4)), V[0, :, 0]), ValueError, "value:", "float32[5, 3]", "S = 4"),
    "attend_scores batch": (call(attnx.attend_scores, jnp.ones((3, 1, 5)), V[:, :, 0]), ValueError, "value:", "float32[2, 5, 3]", "float32[3, 1, 5]"),
    "attend_scores mask kind": (call(attnx.attend_scores, jnp.ones((1, 5)), V[0, :, 0], mask=jnp.ones((1, 5))), TypeError,
                                "mask:", "float32[1, 5]", "booleans"),
    "attend_scores mask shape": (call(attnx.attend_scores, jnp.ones((1, 5)), V[0, :, 0], mask=jnp.ones((1, 4), bool)), ValueError,
                                 "mask:", "bool[1, 4]", "[1, 5]"),
    "attend_scores mask part": (call(attnx.attend_scores, jnp.ones((1, 5)), V[0, :, 0], mask=masks.causal()), TypeError, "mask:", "Causal", "booleans"),
    "attend_scores weights": (call(attnx.attend_scores, jnp.ones((1, 5)), V[0, :, 0], weights=None), TypeError, "weights:", "None", "softmax()"),
    "attend_scores sink": (call(attnx.attend_scores, jnp.ones((1, 5)), V[0, :, 0], weights=weights.softmax(jnp.ones(4))), ValueError,
                           "weights (Softmax):", "4", "head axis of size 1"),
    "merge pair": (call(attnx.merge, Q, (Q, Q[..., 0])), ValueError, "a:", "float32[2, 6, 4, 8]", "(out [..., Hv], r [...])"),
    "merge shapes": (call(attnx.merge, (Q, Q[..., 0]), (Q, Q[..., 0, 0])), ValueError, "b:", "(2, 6)", "(out [..., Hv], r [...])"),
    "merge branches": (call(attnx.merge, (Q, Q[..., 0]), (K, K[..., 0])), ValueError, "b:", "(2, 5, 2, 8)", "(2, 6, 4, 8)"),
    # masks
    "sliding_window 0": (call(masks.sliding_window, 0), ValueError, "size:", "0", "at least 1"),
    "sliding_window float": (call(masks.sliding_window, 4.0), TypeError, "size:", "4.0", "integer"),
    "local negative": (call(masks.local, -1, 2), ValueError, "left:", "-1", "at least 0"),
    "local array": (call(masks.local, 1, jnp.ones(2, int)), TypeError, "right:", "int32[2]", "integer"),
    "prefix float": (call(masks.prefix, 2.5), TypeError, "length:", "2.5", "integers"),
    "prefix rank": (call(masks.prefix, jnp.ones((2, 2), int)), ValueError, "length:", "int32[2, 2]", "rank 0 or 1"),
    "prefix text": (call(masks.prefix, "two"), TypeError, "length:", "'two'", "integers"),
    "documents floats": (call(masks.documents, jnp.ones(6)), TypeError, "query_ids:", "float32[6]", "integers"),
    "documents rank": (call(masks.documents, jnp.ones((1, 2, 6), int)), ValueError, "query_ids:", "[1, 2, 6]", "rank 1 or 2"),
    "documents keys": (call(masks.documents, jnp.ones(6, int), 3), ValueError, "key_ids:", "int32[]", "rank 1 or 2"),
    "lengths neither": (call(masks.lengths), ValueError, "lengths:", "neither", "query_lengths or key_lengths"),
    "lengths floats": (call(masks.lengths, None, jnp.ones(2)), TypeError, "key_lengths:", "float32[2]", "integers"),
    "explicit floats": (call(masks.explicit, jnp.ones((6, 5))), TypeError, "array:", "float32[6, 5]", "booleans"),
    "explicit rank": (call(masks.explicit, jnp.ones(5, bool)), ValueError, "array:", "bool[5]", "[T, S]"),
    "explicit text": (call(masks.explicit, "causal"), TypeError, "array:", "'causal'", "booleans"),
    "predicate kind": (call(masks.predicate, 3), TypeError, "function:", "3", "function"),
    "predicate unhashable": (call(masks.predicate, Unhashable()), TypeError, "function:", "Unhashable", "hashable"),
    "predicate cover": (call(masks.predicate, modulo, 2, cover=True), TypeError, "cover:", "True", "function"),
    "predicate params": (call(masks.predicate, modulo, "two"), TypeError, "params[0]:", "'two'", "array"),
    "dilated 0": (call(masks.dilated, 0), ValueError, "step:", "0", "at least 1"),
    "strided_columns width": (call(masks.strided_columns, 4, 5), ValueError, "width:", "5", "1 to 4"),
    "within_blocks None": (call(masks.within_blocks, None), TypeError, "size:", "None", "integer"),
    "mask and array": (lambda: masks.causal() & jnp.ones((6, 5), bool), TypeError, "mask:", "explicit"),
    "mask or None": (lambda: masks.causal() | None, TypeError, "mask:", "NoneType"),
    # scores
    "bias rank": (call(scores.bias, jnp.ones(5)), ValueError, "array:", "float32[5]", "rank 2 or 3 or 4"),
    "bias booleans": (call(scores.bias, jnp.ones((6, 5), bool)), TypeError, "array:", "bool[6, 5]", "real numbers"),
    "bias complex": (call(scores.bias, jnp.ones((6, 5), jnp.complex64)), TypeError, "array:", "complex64[6, 5]", "real numbers"),
    "bias list": (call(scores.bias, [[1.0]]), TypeError, "array:", "list", "array"),
    "alibi 0": (call(scores.alibi, 0), ValueError, "num_heads:", "0", "at least 1"),
    "alibi rank": (call(scores.alibi, jnp.ones((4, 1))), ValueError, "slopes:", "float32[4, 1]", "rank 1"),
    "alibi_slopes float": (call(scores.alibi_slopes, 4.0), TypeError, "num_heads:", "4.0", "integer"),
    "t5 rank": (call(scores.t5_bias, jnp.ones(32)), ValueError, "table:", "float32[32]", "rank 2"),
    "t5 buckets": (call(scores.t5_bias, jnp.ones((3, 4))), ValueError, "table:", "3", "at least 4"),
    "t5 distance": (call(scores.t5_bias, jnp.ones((32, 4)), max_distance=8), ValueError, "max_distance:", "8", "at least 9"),
    "t5 distance float": (call(scores.t5_bias, jnp.ones((32, 4)), max_distance=64.0), TypeError, "max_distance:", "64.0", "integer"),
    "t5_bucket floats": (call(scores.t5_bucket, jnp.ones(3)), TypeError, "offset:", "float32[3]", "integers"),
    "t5_bucket buckets": (call(scores.t5_bucket, jnp.ones(3, int), num_buckets=2), ValueError, "num_buckets:", "2", "at least 4"),
    "t5_bucket distance": (call(scores.t5_bucket, jnp.ones(3, int), max_distance=2), ValueError, "max_distance:", "2", "at least 9"),
    "soft_cap 0": (call(scores.soft_cap, 0), ValueError, "cap:", "0", "positive"),
    "soft_cap text": (call(scores.soft_cap, "30"), TypeError, "cap:", "'30'", "number"),
    "soft_cap rank": (call(scores.soft_cap, jnp.ones(4)), ValueError, "cap:", "float32[4]", "rank 0"),
    "elementwise kind": (call(scores.elementwise, jnp.ones(3)), TypeError, "function:", "float32[3]", "function"),
    "elementwise params": (call(scores.elementwise, modulo, None), TypeError, "params[0]:", "None", "array"),
    # weights
    "softmax sink": (call(weights.softmax, sink="none"), TypeError, "sink:", "'none'", "number"),
    "softmax sink rank": (call(weights.softmax, jnp.ones((2, 4))), ValueError, "sink:", "float32[2, 4]", "rank 0 or 1"),
    "softmax temperature": (call(weights.softmax, temperature=0.0), ValueError, "temperature:", "0.0", "positive"),
    "softmax temperature rank": (call(weights.softmax, temperature=jnp.ones((2, 6))), ValueError, "temperature:", "float32[2, 6]", "rank 0 or 1 or 3"),
    "sigmoid rank": (call(weights.sigmoid, jnp.ones((2, 4))), ValueError, "bias:", "float32[2, 4]", "rank 0 or 1"),
    "clipped gamma": (call(weights.clipped_softmax, 0.1), ValueError, "gamma:", "0.1", "at most 0"),
    "clipped zeta": (call(weights.clipped_softmax, zeta=0.5), ValueError, "zeta:", "0.5", "at least 1"),
    "clipped array": (call(weights.clipped_softmax, jnp.ones(2)), ValueError, "gamma:", "float32[2]", "rank 0"),
    "entmax 1": (call(weights.entmax, 1.0), ValueError, "alpha:", "1.0", "1 < alpha <= 2"),
    "entmax array": (call(weights.entmax, jnp.ones(())), TypeError, "alpha:", "float32[]", "static number"),
    # caches and mechanisms
    "cache slots": (call(cache.init, 2, 0, 2, 8), ValueError, "slots:", "0", "at least 1"),
    "cache batch": (call(cache.init, 2.0, 4, 2, 8), TypeError, "batch:", "2.0", "integer"),
    "cache value_size": (call(cache.init, 2, 4, 2, 8, -1), ValueError, "value_size:", "-1", "at least 0"),
    "cache dtype": (call(cache.init, 2, 4, 2, 8, dtype=int), TypeError, "dtype:", "int", "floating"),
    "append too many": (call(cache.append, CACHE, K, V), ValueError, "key:", "float32[2, 5, 2, 8]", "slots (4)"),
    "append rank": (call(cache.append, CACHE, K[0, 0, 0], V), ValueError, "key:", "float32[8]", "[2, 't', 2, 8]"),
    "append heads": (call(cache.append, CACHE, K[:, :2, :1], V[:, :2]), ValueError, "key:", "float32[2, 2, 1, 8]", "[2, 't', 2, 8]"),
    "append value": (call(cache.append, CACHE, K[:, :2], V[:, :2, :, :2]), ValueError, "value:", "float32[2, 2, 2, 2]", "[2, 't', 2, 3]"),
    "append lengths": (call(cache.append, CACHE, K[:, :2], V[:, :3]), ValueError, "value:", "float32[2, 3, 2, 3]", "2"),
    "pairs mask": (call(attnx.pairs, mask="causal"), TypeError, "mask:", "'causal'", "mask"),
    "pairs scale": (call(attnx.pairs, scale="half"), TypeError, "scale:", "'half'", "static number"),
    "pairs dropout": (call(attnx.pairs, dropout_rate=2), ValueError, "dropout_rate:", "2", "[0, 1)"),
    "pairs implementation": (call(attnx.pairs, implementation="fast"), ValueError, "implementation:", "'fast'", "'blockwise'"),
    "pairs segment_ids": (call(attnx.pairs(), X, X, X, segment_ids=jnp.zeros((2, 5), int)), ValueError, "mask (Documents):", "5", "axis of size 1 or 6"),
    # jax.nn's signature
    "jax_like rank": (jax_like(X[0, 0]), ValueError, "query:", "float32[4, 8]", "[B, T, N, H]"),
    "jax_like text": (jax_like(key="abc"), TypeError, "key:", "'abc'", "array"),
    "jax_like value": (jax_like(value=X[..., :3]), ValueError, "value:", "float32[2, 6, 4, 3]", "[2, 6, 4, 8]"),
    "jax_like dtype": (jax_like(key=X.astype(jnp.bfloat16), value=X.astype(jnp.bfloat16)), TypeError, "key:", "bfloat16[2, 6, 4, 8]", "float32"),
    "jax_like bias": (jax_like(bias=jnp.ones((5, 5))), ValueError, "bias:", "float32[5, 5]", "[2, 4, 6, 6]"),
    "jax_like bias rank": (jax_like(bias=jnp.ones((1, 1, 1, 6, 6))), ValueError, "bias:", "float32[1, 1, 1, 6, 6]", "[2, 4, 6, 6]"),
    "jax_like mask shape": (jax_like(mask=jnp.ones((3, 1, 6, 6), bool)), ValueError, "mask:", "bool[3, 1, 6, 6]", "[2, 4, 6, 6]"),
    "jax_like mask floats": (jax_like(mask=jnp.ones((6, 6))), TypeError, "mask:", "float32[6, 6]", "booleans"),
    "jax_like lengths": (jax_like(query_seq_lengths=jnp.ones(3, int)), ValueError, "query_seq_lengths:", "int32[3]", "[2]"),
    "jax_like lengths floats": (jax_like(key_value_seq_lengths=jnp.ones(2)), TypeError, "key_value_seq_lengths:", "float32[2]", "integers"),
    "jax_like window three": (jax_like(local_window_size=(1, 2, 3)), ValueError, "local_window_size:", "(1, 2, 3)", "(left, right)"),
    "jax_like window negative": (jax_like(local_window_size=-1), ValueError, "local_window_size:", "-1", "at least 0"),
    "jax_like implementation": (jax_like(implementation="triton"), ValueError, "implementation:", "'triton'", "'xla'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    function, error, *said = WRONG[name]
    with pytest.raises(error) as caught:
        function()
    message = str(caught.value)
    assert type(caught.value) is error
    assert all(fragment in message for fragment in said), message
    assert "\n" not in message and len(message) < 400, message


def modified(s, at):
    return s


@part
class Silent(scores.Score):
    """Holds an array and says nothing of it."""

    shift: Any


@part
class Shortcut(scores.Score):
    """Reads its array without the execution's help."""

    shift: Any

    def operands(self, sizes):
        return (attnx.Operand(self.shift, ()),)

    def tile(self, s, at, shift):
        return s + self.shift


@part
class Miscounted(masks.Mask):
    """Declares one operand for two arrays."""

    first: Any
    second: Any

    def operands(self, sizes):
        return (attnx.Operand(self.first, ()),)


UNSERVED = {
    "pallas": (attention(implementation="pallas"), "'pallas'", "use 'blockwise'"),
    "cudnn dropout": (attention(implementation="cudnn", dropout_rate=0.1, dropout_key=KEY), "'cudnn'", "dropout", "0.1", "use 'blockwise'"),
    "cudnn positions": (attention(implementation="cudnn", query_positions=jnp.arange(6)), "'cudnn'", "positions", "use 'blockwise'"),
    "cudnn scores": (attention(implementation="cudnn", scores=scores.soft_cap(5.0)), "'cudnn'", "SoftCap", "use 'blockwise'"),
    "cudnn elementwise": (attention(implementation="cudnn", scores=scores.elementwise(modified)), "'cudnn'", "Elementwise", "use 'blockwise'"),
    "cudnn two biases": (attention(implementation="cudnn", scores=(scores.bias(jnp.ones((6, 5))),) * 2), "'cudnn'", "Bias", "use 'blockwise'"),
    "cudnn mask": (attention(implementation="cudnn", mask=masks.prefix(2)), "'cudnn'", "Prefix", "use 'blockwise'"),
    "cudnn or": (attention(implementation="cudnn", mask=masks.causal() | masks.causal()), "'cudnn'", "Or", "use 'blockwise'"),
    "cudnn weights": (attention(implementation="cudnn", weights=weights.softpick()), "'cudnn'", "Softpick", "use 'blockwise'"),
    "cudnn sink": (attention(implementation="cudnn", weights=weights.softmax(sink=0.0)), "'cudnn'", "Softmax", "use 'blockwise'"),
    "hooks": (attention(implementation="blockwise", hooks={"weights": modified}), "'blockwise'", "hooks", "use 'reference'"),
    "halves": (call(attnx.row_statistics, Q, K, implementation="cudnn"), "'cudnn'", "halves", "use 'blockwise'"),
    "apply": (call(attnx.apply, Q, K, V, jnp.ones((2, 6, 4)), implementation="pallas"), "'pallas'", "halves", "use 'blockwise'"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_implementation(name):
    function, *said = UNSERVED[name]
    with pytest.raises(NotImplementedError) as caught:
        function()
    assert all(fragment in str(caught.value) for fragment in said), str(caught.value)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the backend serves the call")
@pytest.mark.parametrize("function", [attention(implementation="cudnn", mask=masks.causal()), jax_like(implementation="cudnn")])
def test_cudnn_needs_a_gpu(function):
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, the backend is 'cpu'; use 'blockwise'"):
        function()


def test_offset_operand_in_a_mask():
    """An offset table cannot decide which pairs are allowed: positions do."""
    mask = masks.predicate(modulo, attnx.Operand(np.ones(10, np.int32), ("offset",)))
    with pytest.raises(NotImplementedError, match="mask: an 'offset' operand .* use positions"):
        attnx.attention(Q, K, V, mask=mask)


def test_part_that_reads_its_array():
    """A tile function gets blocks; reaching for the part's own array is an error that says so."""
    with pytest.raises(TypeError, match="a part read one of its arrays inside a tile; declare it in operands"):
        attnx.attention(Q, K, V, scores=Shortcut(jnp.ones(())))


def test_part_that_hides_its_array():
    """A part with arrays says what their axes mean."""
    with pytest.raises(NotImplementedError, match="Silent holds arrays and must say in operands"):
        attnx.attention(Q, K, V, scores=Silent(jnp.ones(())))


def test_part_with_another_arity():
    """Composed masks share out operands by arity, so it has to be right."""
    with pytest.raises(ValueError, match=r"mask \(Miscounted\): expected as many operands as its arity 2, got 1"):
        attnx.attention(Q, K, V, mask=Miscounted(jnp.ones((), int), jnp.ones((), int)))


def test_wrong_argument_under_jit():
    """Static checks come before tracing noise under jit too."""
    with pytest.raises(ValueError, match=r"key: expected head size 8 as in query float32\[2, 6, 4, 8\], got float32\[2, 5, 2, 4\]"):
        jax.jit(attnx.attention)(Q, K[..., :4], V)
