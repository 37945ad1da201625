"""Attention as inference: its weights are the posterior marginals of hidden edges, and each way of structuring these is a mechanism.

Singh, Buckley: "Attention: Marginal Probability is All You Need?" (2023, arXiv 2304.04556):

    p(edges, x) ~ p(edges) product over edges (i, j) of e^s_ij,        out_i = E[v(edges at i) | x],        s_ij = q_i . k_j / sqrt(H)

Which sets of edges there are, and their prior, make the mechanism:

    "categorical"   a query has one edge                                 softmax over keys; a causal mask is a prior of zero, a position bias a log prior
    "bernoulli"     every edge is there or not by itself                 sigmoid, rows that need not sum to 1
    "competition"   a key has one edge: queries compete for it           softmax over queries; outputs are means of the keys won (slot attention)
    "pairs"         a query has two distinct edges, v their mean         2 e_j (Z - e_j) / (Z^2 - sum e^2),   e = e^s, Z = sum e
    "chain"         one edge a query, each depending on the last one's   forward and backward messages along the queries (structured attention)
    "map"           one edge, the likeliest                              one-hot; the gradient is that of "categorical"

The principle is the paper's; this list, the mean of competition and the formula of pairs are written for this library. For all but "map" the marginals are
the gradient of the log of the sum over all structures. Of queries and keys, "categorical" is :func:`attnx.weights.softmax`, "bernoulli"
:func:`attnx.weights.sigmoid` and "pairs" :func:`edge_pairs`, in all executions of the pairs engine; :func:`brute_force_marginals` enumerates.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnx.core import checks
from pallas_kernels.parts import Softmax, Sum, Weights, part
from pallas_kernels.tile import FLOOR

STRUCTURES = ("categorical", "bernoulli", "competition", "pairs", "chain", "map")


def marginal_attention(potentials: Float[Array, "B N T S"], value: Float[Array, "B S K Hv"], *, structure: str = "categorical",
                       log_prior: Float[Array, "..."] | None = None, transition: Float[Array, "..."] | None = None, mask: Bool[Array, "..."] | None = None):
    """The posterior mean of the values at each query's edges, and the marginals of the edges.

    ::

        out_i = sum over j of m_ij v_j       ("pairs": half of it, "competition": over sum_j m_ij + 1e-8),        m_ij = p(edge from i to j | x)

    Args:
      potentials: s [B, N, T, S].
      value: [B, S, K, Hv], N a multiple of K.
      structure: "categorical", "bernoulli", "competition", "pairs", "chain" or "map".
      log_prior: log of the prior of each edge (its log odds for "bernoulli"), broadcasts to the potentials; -inf forbids an edge. Uniform by default.
      transition: for "chain", broadcasts to [B, N, S, S]: what it adds to the log probability that the edge to k follows the edge to j is ``[j, k]``.
      mask: booleans that broadcast to the potentials: which edges may be.

    Returns:
      ``(out [B, T, N, Hv] in the dtype of the values, m [B, N, T, S] in float32, or float64 for float64)``. A query that may have no edge has zeros; one of "pairs"
      that may have a single one has that.

    Raises:
      ValueError, TypeError: an argument of a wrong shape, dtype or kind, named.

    Cost: O(T S), for "chain" O(T S^2) in T steps.

    >>> s, v = jnp.log(jnp.array([1.0, 2.0, 3.0]))[None, None, None], jnp.eye(3)[None, :, None]
    >>> for structure in ("categorical", "pairs"):
    ...     print([f"{x:.2f}" for x in marginal_attention(s, v, structure=structure)[1][0, 0, 0]])
    ['0.17', '0.33', '0.50']
    ['0.45', '0.73', '0.82']
    """
    potentials, value = checks.check_real("potentials", potentials, ranks=(4,)), checks.check_real("value", value, ranks=(4,))
    if value.shape[:2] != (potentials.shape[0], potentials.shape[3]) or not value.shape[2] or potentials.shape[1] % value.shape[2]:
        raise ValueError(f"value: expected shape [B, S, K, Hv] with B, S = {potentials.shape[0]}, {potentials.shape[3]} and K a divisor of {potentials.shape[1]}, as the "
                         f"potentials {checks.describe(potentials)} say, got {checks.describe(value)}")
    marginals = posterior_edges(potentials, structure=structure, log_prior=log_prior, transition=transition, mask=mask)
    weights = marginals
    if structure == "pairs":
        count = jnp.sum(marginals, axis=-1, keepdims=True)  # 2, but for a query that may have one edge, or none
        weights = marginals / jnp.where(count > 0, count, 1)
    elif structure == "competition":
        weights = marginals / (jnp.sum(marginals, axis=-1, keepdims=True) + 1e-8)
    each = jnp.repeat(value, potentials.shape[1] // value.shape[2], axis=2)
    return jnp.einsum("bnts,bsnv->btnv", weights, each.astype(weights.dtype)).astype(value.dtype), marginals


def posterior_edges(potentials: Float[Array, "... T S"], *, structure: str = "categorical", log_prior=None, transition=None, mask=None) -> Float[Array, "... T S"]:
    """The marginals alone, of potentials [..., T, S]; arguments as in :func:`marginal_attention`.

    >>> [f"{x:.2f}" for x in posterior_edges(jnp.zeros((2, 3)), structure="competition")[0]]
    ['0.50', '0.50', '0.50']
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure: expected one of {', '.join(map(repr, STRUCTURES))}, got {structure!r}")
    if (transition is None) == (structure == "chain"):
        raise ValueError(f"transition: expected an array for 'chain' and None otherwise, got {checks.describe(transition)} for {structure!r}")
    s, ok = _potentials(potentials, log_prior, mask)
    if structure == "bernoulli":
        return jnp.where(ok, jax.nn.sigmoid(s), 0)
    if structure == "competition":
        return _softmax(s, ok, -2)
    if structure == "chain":
        return _chain(s, ok, checks.check_real("transition", transition))
    if structure == "pairs":
        return _pairs(s, ok)
    soft = _softmax(s, ok)
    if structure == "categorical":
        return soft
    best = jnp.where(ok, jax.nn.one_hot(jnp.argmax(jnp.where(ok, s, -jnp.inf), axis=-1), s.shape[-1], dtype=s.dtype), 0)
    return soft + jax.lax.stop_gradient(best - soft)


def _potentials(potentials, log_prior, mask):
    """Potentials with the prior in them, finite, and which edges may be."""
    s = checks.check_real("potentials", potentials)
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    ok = jnp.ones((), bool) if mask is None else checks.as_array("mask", mask, "booleans")
    if ok.dtype != bool:
        raise TypeError(f"mask: expected booleans, got {checks.describe(mask)}")
    if log_prior is not None:
        prior = checks.check_real("log_prior", log_prior).astype(s.dtype)
        ok &= prior > -jnp.inf
        s = s + jnp.where(prior > -jnp.inf, prior, 0)
    try:
        ok = jnp.broadcast_to(ok, jnp.shape(potentials))
    except ValueError as error:
        raise ValueError(f"mask, log_prior: expected to broadcast to the potentials {checks.describe(potentials)}, got {ok.shape}") from error
    if s.shape != ok.shape:
        raise ValueError(f"log_prior: expected to broadcast to the potentials {checks.describe(potentials)}, got {checks.describe(log_prior)}")
    return jnp.where(ok, s, 0), ok


def _log_total(s, ok, axis=-1):
    """The log of the sum of e^s over allowed entries; FLOOR, with zero gradient, where there is none."""
    top = jax.lax.stop_gradient(jnp.max(jnp.where(ok, s, FLOOR), axis=axis, keepdims=True, initial=FLOOR))
    total = jnp.sum(jnp.where(ok, jnp.exp(jnp.where(ok, s - top, 0)), 0), axis=axis, keepdims=True)
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), FLOOR)


def _softmax(s, ok, axis=-1):
    return jnp.where(ok, jnp.exp(jnp.where(ok, s - _log_total(s, ok, axis), 0)), 0)


def _pairs(s, ok):
    """Twice the softmax of ``s_j + log(sum of the others' e^s)``; that sum by itself for the largest, where Z - e_j would cancel."""
    place = jnp.arange(s.shape[-1])
    first = ok & (place == jnp.argmax(jnp.where(ok, s, -jnp.inf), axis=-1, keepdims=True))
    rest = _log_total(s, ok & ~first)
    share = jnp.where(ok & ~first, jnp.exp(jnp.where(ok, s - _log_total(s, ok), 0)), 0)  # at most 1/2
    others = jnp.where(first, rest, _log_total(s, ok) + jnp.log1p(-share))
    two = jnp.sum(ok, axis=-1, keepdims=True) > 1
    return jnp.where(two, 2 * _softmax(jnp.where(two, s + others, 0), ok & two), ok.astype(s.dtype))


def _chain(s, ok, transition):
    """Forward and backward messages, normalised at each query so that none underflows. A query that may have no edge is no link of the chain."""
    some = jnp.any(ok, axis=-1, keepdims=True)
    s = jnp.where(some, jnp.where(ok, s, FLOOR), 0)
    shape = (*s.shape[:-2], s.shape[-1], s.shape[-1])
    try:
        steps = jnp.broadcast_to(transition.astype(s.dtype), shape)
    except ValueError as error:
        raise ValueError(f"transition: expected to broadcast to {list(shape)}, got {checks.describe(transition)}") from error
    rows = tuple(jnp.moveaxis(x, -2, 0) for x in (s, some))
    normal = lambda x: x - jax.nn.logsumexp(x, axis=-1, keepdims=True)
    nothing = jnp.zeros((*s.shape[:-2], s.shape[-1]), s.dtype)

    def forward(carry, here):  # the log of the sum over all earlier edges, by where this one goes
        (message, begun), (row, some) = carry, here
        after = normal(row + jnp.where(begun, jax.nn.logsumexp(message[..., :, None] + steps, axis=-2), 0))
        return (jnp.where(some, after, message), begun | some), after

    def backward(message, here):  # that over all later edges, given where this one goes
        row, some = here
        return jnp.where(some, normal(jax.nn.logsumexp(steps + (message + row)[..., None, :], axis=-1)), message), message

    _, past = jax.lax.scan(forward, (nothing, jnp.zeros((*s.shape[:-2], 1), bool)), rows)
    _, future = jax.lax.scan(backward, nothing, rows, reverse=True)
    return jnp.where(ok, jnp.moveaxis(jax.nn.softmax(past + future, axis=-1), 0, -2), 0)


def brute_force_marginals(potentials, *, structure: str = "categorical", log_prior=None, transition=None) -> np.ndarray:
    """The marginals by enumeration of all sets of edges, in NumPy and float64: the definition, for tiny sizes.

    Args:
      potentials: s [T, S]; for "bernoulli" there are 2^(T S) sets, for others at most S^(2 T) or T^S.
      structure, log_prior, transition: as in :func:`marginal_attention`; a forbidden edge has a log prior of -inf.

    Returns:
      [T, S].

    >>> brute_force_marginals([[0.0, 0.0, 0.0]], structure="pairs").round(3)
    array([[0.667, 0.667, 0.667]])
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure: expected one of {', '.join(map(repr, STRUCTURES))}, got {structure!r}")
    s = np.asarray(potentials, np.float64) + (0 if log_prior is None else np.asarray(log_prior, np.float64))
    t, n = s.shape
    eye = np.eye(n, dtype=bool)
    if structure == "bernoulli":
        sets = [np.array(bits, bool).reshape(t, n) for bits in itertools.product((False, True), repeat=t * n)]
    elif structure == "competition":
        sets = [np.eye(t, dtype=bool)[:, list(winners)] for winners in itertools.product(range(t), repeat=n)]
    else:
        rows = [eye[a] | eye[b] for a, b in itertools.combinations(range(n), 2)] if structure == "pairs" else list(eye)
        sets = [np.stack(edges) for edges in itertools.product(rows, repeat=t)]
    follow = np.zeros((n, n)) if transition is None else np.asarray(transition, np.float64)
    log = np.array([s[edges].sum() + sum(follow[a.argmax(), b.argmax()] for a, b in zip(edges, edges[1:])) if structure == "chain" else s[edges].sum()
                    for edges in sets])
    if structure == "map":
        return sets[log.argmax()].astype(np.float64)
    p = np.exp(log - log.max())
    return np.einsum("c,cts->ts", p / p.sum(), np.stack(sets))


# Two edges, of queries and keys -----------------------------------------------------------------------------------------


def _lesser(s, earlier):
    share = jnp.exp(s - earlier[0])
    return jnp.where(share > 0.5, 0, share)


def _log_of_rest(total, earlier):
    """0 where nothing is left to speak of: its reciprocal, and the gradient's, would be infinite."""
    enough = total > jnp.finfo(total.dtype).tiny ** 0.9
    return jnp.where(enough, jnp.log(jnp.where(enough, total, 1)), 0)


@part
class EdgePairs(Weights):
    """See :func:`edge_pairs`."""

    statistics = (Softmax(), Sum(_lesser, _log_of_rest))  # log Z, and the log of the share left beside a key with more than half of Z
    normalized = True

    def weight(self, s, statistics):
        total, rest = statistics
        share = jnp.exp(s - total)
        # e_j (Z - e_j) over Z^2 and over the rest: however small that is, the weights' sum is of order 1; for the larger key nothing cancels.
        return jnp.where(share > 0.5, share, jnp.exp(s - total - rest) * (1 - share))


def edge_pairs() -> Weights:
    """Half the marginals of :func:`marginal_attention` with two edges a query: ``e_j (Z - e_j) / sum over j of the same``, e = e^s, Z = sum e.

    No key has more than half of the weight, unless it is the only one to be seen; or, in float32, unless its score exceeds all others by 78. A given row
    statistic: two passes for sums over the row's keys and the one over the values, in every execution.

    >>> import attnx
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.log(jnp.array([1.0, 2.0, 3.0])).reshape(1, 3, 1, 1)
    >>> [f"{x:.2f}" for x in attnx.attention_weights(q, k, weights=edge_pairs())[0, 0, 0]]
    ['0.23', '0.36', '0.41']
    """
    return EdgePairs()
