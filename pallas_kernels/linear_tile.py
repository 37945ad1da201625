"""The mathematics of a chunk of the recurrent engine, written once.

    S_t = exp(g_t) * S_(t-1) + k_t v_t^T,        o_t = q_t S_t

over C tokens of one head splits into a part that needs no state and a part that is one matrix product with the state that arrives:

    o_i = sum_(j <= i) <q_i * exp(g_(j+1) + ... + g_i), k_j> v_j  +  (q_i * exp(g_1 + ... + g_i)) S_0
    S_C = exp(g_1 + ... + g_C) * S_0  +  sum_j (k_j * exp(g_(j+1) + ... + g_C)) v_j^T

The usual factorisation exp(G_i - G_j) = exp(G_i) exp(-G_j), G = cumsum g, overflows for strong decays, and the difference G_i - G_j loses
the decays between i and j to rounding (and is NaN once some g is -inf). Here no two sums are ever subtracted: each pair j < i is
separated by the middle of exactly one dyadic block, and its exponent is the sum from j to that middle plus the sum from there to i,
both sums of log-decays and at most 0 like these. So every decay from 1 down to exact 0 (g = -inf, which is how documents are kept apart)
costs no more than rounding, per head or per channel, in C^2 H / 2 multiplications of matrix products, half as many as q k^T takes.

The functions take any number L of chunks (those of several heads, or the one of a kernel's program) and G queries per token and state:
rows ``t G .. t G + G - 1`` of the queries are those of token t. They are plain ``jax.numpy`` on arrays of three axes and may be
differentiated any number of times in both modes; the backward chunk is ``jax.vjp`` of :func:`chunk`.
"""

import jax.numpy as jnp


def _rows(x, query):
    """``x`` [.., tokens, .] for each row of ``query`` [.., tokens G, .]."""
    groups = query.shape[-2] // x.shape[-2]
    return x if groups == 1 else jnp.repeat(x, groups, axis=-2)


def decayed_scores(query, key, log_decay):
    """The scores of chunks, <q_i * exp(g_(j+1) + ... + g_i), k_j> for j <= i and 0 otherwise, and the sums of g from and to their borders.

    Args:
      query: [L, C G, H], C a power of two.
      key, log_decay: [L, C, H].

    Returns:
      ``(scores [L, C G, C], since [L, C, H], until [L, C, H])``: ``since_i = g_1 + ... + g_i`` is what a state that arrives has lost by
      token i, ``until_i = g_(i+1) + ... + g_C`` what the contribution of token i loses until the end of the chunk.
    """
    chunks, size, _ = key.shape
    # Blocks of 1, 2, 4, ... tokens, [blocks, tokens, .]: those of one size are joined in pairs to those of the next.
    query, key, since = (x.reshape(chunks * size, x.shape[1] // size, x.shape[2]) for x in (query, key, log_decay))
    until = jnp.zeros_like(since)
    scores = jnp.sum(query * key, axis=2, keepdims=True)
    while key.shape[1] < size:
        early_since, late_since, early_until, late_until = since[::2], since[1::2], until[::2], until[1::2]
        late = query[1::2] * jnp.exp(_rows(late_since, query))
        across = jnp.einsum("nih,njh->nij", late, key[::2] * jnp.exp(early_until))
        upper = jnp.concatenate([scores[::2], jnp.zeros_like(across)], axis=2)
        lower = jnp.concatenate([across, scores[1::2]], axis=2)
        scores = jnp.concatenate([upper, lower], axis=1)
        since = jnp.concatenate([early_since, late_since + early_since[:, -1:]], axis=1)
        until = jnp.concatenate([early_until + late_since[:, -1:], late_until], axis=1)
        query, key = (x.reshape(x.shape[0] // 2, 2 * x.shape[1], x.shape[2]) for x in (query, key))
    return scores, since, until


def chunk(query, key, value, log_decay):
    """Everything of a chunk that does not need the state: ``(out, query, total, added)``, with which

        o = out + query S,        S <- forget(S, total) + added

    Args:
      query: [L, C G, H], C a power of two.
      key, value: [L, C, H], [L, C, Hv].
      log_decay: None (no decay), [L, C, 1] (one for the head) or [L, C, H] (one for each channel of the key); at most 0, -inf allowed.

    Returns:
      ``out`` [L, C G, Hv], the outputs without the state; ``query``, decayed; ``total`` [L, 1 or H, 1], the sum of log_decay, None without;
      ``added`` [L, H, Hv].
    """
    total = None
    if log_decay is not None and log_decay.shape[2] == key.shape[2]:
        scores, since, until = decayed_scores(query, key, log_decay)
    else:
        scores = jnp.einsum("lih,ljh->lij", query, key)
        if log_decay is None:
            scores *= _rows(jnp.tri(key.shape[1], dtype=scores.dtype), query)
        else:
            one = jnp.ones_like(log_decay)
            decay, since, until = decayed_scores(one, one, log_decay)
            scores *= _rows(decay, query)
    if log_decay is not None:
        query, key, total = query * jnp.exp(_rows(since, query)), key * jnp.exp(until), since[:, -1, :, None]
    return jnp.einsum("lij,ljv->liv", scores, value), query, total, jnp.einsum("ljh,ljv->lhv", key, value)


def forget(state, log_decay):
    """``exp(log_decay) * state``, or the state itself for None.

    A factor just below 1 would be rounded the same way in thousands of steps, so there the (small) loss is computed, and subtracted.
    """
    if log_decay is None:
        return state
    half = jnp.tanh(log_decay / 2)
    loss = 2 * half / (1 - half)  # expm1, which kernels on TPU lack
    return jnp.where(log_decay > -0.5, state + loss * state, jnp.exp(log_decay) * state)
