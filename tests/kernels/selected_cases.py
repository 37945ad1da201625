"""Calls of the selected engine that between them use everything its kernels serve."""

import functools

import jax
import jax.numpy as jnp
from cases import columns, documents, normal

from attnx import masks, scores, weights
from attnx.core.selected import selected_attention
from pallas_kernels.parts import Exponential

M = 3


def choice(block_sizes, heads, queries, keys, batch=2):
    """Any blocks, so with duplicates, and numbers of none on both sides; of the first query block's last row, nothing else. A score for each."""
    (bq, bk), key = block_sizes, jax.random.key(3)
    indices = jax.random.randint(key, (batch, heads, -(-queries // bq), M), -2, -(-keys // bk) + 1)
    return indices.at[:, -1, 0].set(-1), jax.random.normal(key, indices.shape, float)


@functools.partial(jax.jit, static_argnames=("block_sizes", "implementation", "dropout_rate"))
def evaluate(query, key, value, cotangent, indices, block_scores, scores=(), mask=None, weights=weights.softmax(), **options):
    """The output, the residual (exponential weights), and the gradients of a loss of both by all real arrays of the call."""
    exponential = isinstance(weights, Exponential)

    def loss(query, key, value, block_scores, scores, weights):
        out = selected_attention(query, key, value, indices, block_scores=block_scores, scores=scores, mask=mask, weights=weights,
                                 return_residual=exponential, **options)
        out, r = out if exponential else (out, jnp.zeros(()))
        return jnp.vdot(out, cotangent) + jnp.sum(jnp.sin(jnp.where(jnp.isfinite(r), r, 0))), (out, r)

    gradients, results = jax.grad(loss, argnums=range(6), has_aux=True)(query, key, value, block_scores, scores, weights)
    return results, jax.tree.leaves(gradients)


CASES = {  # block sizes, heads of the table, whether blocks have scores, and the parts
    "blocks of 64, causal inside": ((64, 64), 2, True, lambda: dict(mask=masks.causal())),
    "one choice for all, softpick, documents, column and offset operands": ((128, 32), 1, True, lambda: dict(
        weights=weights.softpick(), mask=documents(), scores=(*columns(), scores.t5_bias(normal(32, 4), max_distance=20)))),
    "each head for itself, several tiles in a block, a bias and dropout": ((16, 256), 4, True, lambda: dict(
        scores=(scores.bias(normal(1, 4, 200, 300)), scores.bias(normal(2, 1, 200, 300))), dropout_rate=0.3, dropout_key=jax.random.key(5))),
    "whole tiles, sigmoid, positions in another order and padding": ((256, 128), 2, False, lambda: dict(
        weights=weights.sigmoid(), mask=masks.causal(), query_positions=jnp.arange(200)[::-1] + 50, key_positions=jnp.arange(300).at[-1].set(-1))),
}
