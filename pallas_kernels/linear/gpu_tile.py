"""A chunk of the recurrent engine in what Triton has: whole matrices of powers of two, masks, and products.

The same sums as in :mod:`pallas_kernels.linear_tile`, of which none is a difference of two others: a program can neither slice nor shift what lies in registers, so
sums of log-decays are products with matrices of zeros and ones. Matrix units would round the decays, so these are taken apart
into three numbers of 8 bits each. All of it may be differentiated once in reverse mode, inside a program.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_tile import forget

LOWEST = -1e30  # for -inf, of which 0 times is no 0; exp of either is 0


class Reach(NamedTuple):
    """Which tokens of a chunk a row adds up: those of its block of ``half`` tokens from the first up to itself in every second block, and those
    after itself to the last in the others; ``late`` says that all blocks are, or none is, a second one."""

    size: int
    half: int
    late: bool | None = None

    def matrix(self, transposed: bool = False):
        """[size, size] booleans."""
        row, column = (lax.broadcasted_iota(jnp.int32, (self.size, self.size), int(axis != transposed)) for axis in (False, True))
        up_to, after = column <= row, column > row
        same = (row ^ column) < self.half
        if self.late is not None:
            return same & (up_to if self.late else after)
        return same & (((row & self.half != 0) & up_to) | ((row & self.half == 0) & after))


def since(size: int) -> Reach:
    """From the chunk's first token up to each."""
    return Reach(size, size, True)


def until(size: int) -> Reach:
    """From after each token to the chunk's last."""
    return Reach(size, size, False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_up(reach: Reach, x):
    """The sums of the rows of ``x`` [C, X] that ``reach`` says, [C, X], to the precision of ``x``."""
    return _add_up(reach.matrix(), x)


def _add_up(which, x):
    if x.dtype != jnp.float32:
        return jnp.dot(which.astype(x.dtype), x)
    total, which = jnp.zeros_like(x), which.astype(jnp.bfloat16)
    for _ in range(3):
        part = x.astype(jnp.bfloat16)
        total += jnp.dot(which, part, preferred_element_type=jnp.float32)
        x -= part.astype(jnp.float32)
    return total


add_up.defvjp(lambda reach, x: (_add_up(reach.matrix(), x), None), lambda reach, _, g: (_add_up(reach.matrix(transposed=True), g),))


def matmul(a, b, contract, narrow=None):
    """The matrix product over axis ``contract[0]`` of ``a`` and ``contract[1]`` of ``b``, of operands rounded to ``narrow``."""
    x, y = (x if narrow is None else x.astype(narrow) for x in (a, b))
    return lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=a.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a, b, contract, narrow):
    """:func:`matmul`, in whose gradient cotangents are rounded likewise."""
    return matmul(a, b, contract, narrow)


def _product_backward(contract, narrow, operands, g):
    (a, b), (i, j) = operands, contract
    da = matmul(g, b, (1, 1 - j), narrow) if i == 1 else matmul(b, g, (1 - j, 1), narrow)
    db = matmul(g, a, (0, 1 - i), narrow) if j == 1 else matmul(a, g, (1 - i, 0), narrow)
    return da, db


product.defvjp(lambda a, b, contract, narrow: (matmul(a, b, contract, narrow), (a, b)), _product_backward)


# A chunk ------------------------------------------------------------------------------------------------------------


def scores(query, key, log_decay, narrow):
    """<q_i * exp(g_(j+1) + ... + g_i), k_j> for j <= i and 0 otherwise, [C, C]; ``log_decay`` None, [1, C] (one for the head) or [C, H]."""
    if log_decay is not None and log_decay.shape[0] > 1:
        return _channel_scores(query, key, log_decay, narrow)
    i, j = _pairs(key.shape[0])
    found = product(query, key, (1, 1), narrow)
    if log_decay is not None:
        found *= jnp.exp(add_up(since(key.shape[0]), jnp.where(i > j, log_decay.T, 0)))
    return jnp.where(i >= j, found, 0)


def _pairs(size):
    return (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _channel_scores(query, key, log_decay, narrow):
    """Each pair is separated by the middle of exactly one dyadic block, from and to which its decays add up."""
    size = key.shape[0]
    i, j = _pairs(size)

    def level(half, found):
        decay = jnp.exp(_add_up(Reach(size, half).matrix(), log_decay))
        return jnp.where((i ^ j) >= half, matmul(query * decay, key * decay, (1, 1), narrow), found)

    return jnp.where(i >= j, _levels(size, level, matmul(query, key, (1, 1), narrow)), 0)


def _channel_scores_backward(narrow, operands, g):
    """Level by level too, so that registers need not hold all of them at a time."""
    query, key, log_decay = operands
    size = key.shape[0]
    i, j = _pairs(size)

    def level(half, sums):
        reach = Reach(size, half)
        decay = jnp.exp(_add_up(reach.matrix(), log_decay))
        separated = jnp.where(((i ^ j) >= half) & ((i ^ j) < 2 * half) & (i > j), g, 0)
        dquery = matmul(separated, key * decay, (1, 0), narrow) * decay
        dkey = matmul(separated, query * decay, (0, 0), narrow) * decay
        return sums[0] + dquery, sums[1] + dkey, sums[2] + _add_up(reach.matrix(transposed=True), dquery * query + dkey * key)

    alone = jnp.sum(jnp.where(i == j, g, 0), axis=1, keepdims=True)
    return _levels(size, level, (alone * key, alone * query, jnp.zeros_like(log_decay)))


_channel_scores.defvjp(lambda query, key, log_decay, narrow: (_channel_scores(query, key, log_decay, narrow), (query, key, log_decay)), _channel_scores_backward)


def _levels(size, level, carry):
    """``level(half, carry)`` for every size of half a block."""
    for n in range(size.bit_length() - 1):
        carry = level(1 << n, carry)
    return carry


def decayed(x, reach: Reach, log_decay):
    """Queries or keys [C, H] as the state at a border of the chunk sees them."""
    if log_decay is None:
        return x
    if log_decay.shape[0] > 1:
        return x * jnp.exp(add_up(reach, log_decay))
    return x * jnp.exp(jnp.sum(jnp.where(reach.matrix(), log_decay, 0), axis=1, keepdims=True))


def total(log_decay):
    """The sum of a chunk's log-decays, [1, 1] or [1, H]; None without any."""
    return None if log_decay is None else jnp.sum(log_decay, axis=1 if log_decay.shape[0] == 1 else 0, keepdims=True)


def read(query, key, value, log_decay, memory, normalizer, *, narrow):
    """``(numerator [C, Hv], denominator [C, 1] or None)`` of one query a token, from the chunk's tokens and the state that arrives, S [H, Hv] and z [1, H]."""
    found, query = scores(query, key, log_decay, narrow), decayed(query, since(key.shape[0]), log_decay)
    numerator = product(found, value, (1, 0), narrow) + product(query, memory, (1, 0), narrow)
    if normalizer is None:
        return numerator, None
    return numerator, jnp.sum(found, axis=1, keepdims=True) + jnp.sum(query * normalizer, axis=1, keepdims=True)


def forgotten(memory, normalizer, lost):
    """A state, ``lost`` [.., 1, 1 or H] of whose logarithm is gone; None for nothing."""
    column = None if lost is None else jnp.swapaxes(lost, -1, -2)
    return forget(memory, column), None if normalizer is None else forget(normalizer, lost)


def write(key, value, log_decay, memory, normalizer, *, narrow):
    """The state that leaves the chunk."""
    memory, normalizer = forgotten(memory, normalizer, total(log_decay))
    key = decayed(key, until(key.shape[0]), log_decay)
    return memory + product(key, value, (0, 0), narrow), None if normalizer is None else normalizer + jnp.sum(key, axis=0, keepdims=True)
