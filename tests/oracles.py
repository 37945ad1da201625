"""Attention written out densely, one formula after another, sharing no code with the library: what its definition is held against."""

import jax
import jax.numpy as jnp
from jax import lax


def dot_products(query, key, scale=None):
    """[B, N, T, S]: scale q.k, every query head with the key head of its group."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return jnp.einsum("btnh,bsnh->bnts", query, key) * scale


def attend(weigh, query, key, value, allowed=True, change=lambda s: s, scale=None):
    """[B, T, N, Hv]: values weighed by ``weigh(scores, allowed)``."""
    s = change(dot_products(query, key, scale))
    w = weigh(s, jnp.broadcast_to(allowed, s.shape))
    return jnp.einsum("bnts,bsnv->btnv", w, jnp.repeat(value, query.shape[2] // value.shape[2], axis=2))


def _total(ok, x):
    return jnp.sum(jnp.where(ok, x, 0), axis=-1, keepdims=True)


def _ratio(ok, x, total):
    return jnp.where(ok & (total > 0), x / jnp.where(total > 0, total, 1), 0)


def softmax(s, ok, sink=None, temperature=None):
    """``sink`` and ``temperature`` broadcast to [B, N, T, 1]."""
    s = s if temperature is None else s / temperature
    s = jnp.where(ok, s, 0)
    top = lax.stop_gradient(jnp.max(jnp.where(ok, s, -jnp.inf), axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = _total(ok, jnp.exp(s - top)) + (0 if sink is None else jnp.exp(sink - top))
    return _ratio(ok, jnp.exp(s - top), total)


def log_normaliser(s, ok):
    return jax.nn.logsumexp(s, axis=-1, where=ok)


def sigmoid(s, ok, bias=0.0):
    return jnp.where(ok, 1 / (1 + jnp.exp(-s - bias)), 0)


def relu(s, ok):
    return jnp.where(ok & (s > 0), s, 0)


def softpick(s, ok):
    e = jnp.expm1(s)
    return _ratio(ok, jnp.where(e > 0, e, 0), _total(ok, jnp.where(e > 0, e, -e)))


def clipped_softmax(s, ok, gamma, zeta):
    return jnp.where(ok, jnp.clip((zeta - gamma) * softmax(s, ok) + gamma, 0, 1), 0)


def _support(ok, z, holds):
    """Which entries belong to the support: those at least as large as the last, in falling order, for which ``holds(rank, sorted)``."""
    z = lax.stop_gradient(jnp.where(ok, z, -jnp.inf))
    falling = -jnp.sort(-z, axis=-1)
    rank = jnp.arange(1, z.shape[-1] + 1)
    inside = jnp.isfinite(falling) & holds(rank, jnp.where(jnp.isfinite(falling), falling, 0))
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    return ok & (z >= least)


def sparsemax(s, ok):
    """Exact, by sorting (Martins and Astudillo, 2016, algorithm 1)."""
    support = _support(ok, s, lambda rank, z: 1 + rank * z > jnp.cumsum(z, axis=-1))
    count = jnp.maximum(_total(support, jnp.ones_like(s)), 1)
    threshold = (_total(support, s) - 1) / count
    return jnp.where(support, s - threshold, 0)


def entmax15(s, ok):
    """Exact, by sorting (Peters, Niculae and Martins, 2019, algorithm 2): on the support the threshold solves a quadratic."""
    def threshold(rank, mean, square):
        spread = rank * (square - mean**2)
        return mean - jnp.sqrt(jnp.maximum((1 - spread) / rank, 0))

    z = s / 2
    support = _support(ok, z, lambda rank, z: threshold(rank, jnp.cumsum(z, axis=-1) / rank, jnp.cumsum(z**2, axis=-1) / rank) <= z)
    count = jnp.maximum(_total(support, jnp.ones_like(s)), 1)
    mean = _total(support, z) / count
    deviation = _total(support, (z - mean) ** 2)
    return jnp.where(support, (z - mean + jnp.sqrt((1 - deviation) / count)) ** 2, 0)


def cog(s, ok):
    """sgn(s) e^|s| over the sum of e^|s|: weights of either sign."""
    ok = ok & (s != 0)
    e = jnp.exp(jnp.where(s < 0, -s, s))
    return _ratio(ok, jnp.where(s < 0, -e, e), _total(ok, e))


def power(s, ok, epsilon):
    """relu(s)^2 over epsilon plus its sum."""
    p = jnp.where(ok & (s > 0), s, 0) ** 2
    return p / (epsilon + jnp.sum(p, axis=-1, keepdims=True))
