"""YOSO: attention whose weights are coin tosses, made by hashing, at a cost linear in the length.

Zeng, Xiong, Ravi, Acharya, Fung, Singh: "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling" (ICML 2021, arXiv 2111.09714).
Unit queries and keys get the same code of tau bits (the sides of tau random hyperplanes) with probability

    P_ij = (1 - arccos(q_i . k_j) / pi)^tau,                    the weights of the expectation     E_i = sum over j of P_ij v_j

One toss for all pairs is a table: values are added up by the codes of their keys, and a query reads the sum at its own code. The mean over m tables is unbiased, with a
variance of at most P (1 - P) / m a pair. The output is made a unit vector, and a short convolution of the values may be added to it.

Codes have no derivative. With B_ij the share of the tables in which i and j meet, gradients of values are those of B, and those of queries and keys take
(tau / 2) B_ij for the slope of P_ij, a lower bound of it that is finite where q_i = k_j. Not causal: a table holds all keys.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.core.attention import attention
from attnx.core.convolve import convolution
from attnx.core.edges import segment_sum
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes
from attnx.weights.hash_collision import collision
from pallas_kernels.tile import accumulator_dtype

HASHES = ("gaussian", "hadamard")
GRADIENTS = ("lower_bound", "lower_bound_expectation", "exact_expectation")
FEW = 1024  # keys up to which all pairs of codes are compared by default: quicker than tables, whose gradients go channel by channel


def unit(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """``x / |x|``, in at least float32 and returned in the dtype of x; 0 where x is 0.

    >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    wide = x.astype(accumulator_dtype(x.dtype))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return jnp.where(square > 0, wide * lax.rsqrt(jnp.where(square > 0, square, 1)), 0).astype(x.dtype)


def yoso_expectation(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *, bits: int = 9, gradient: str = "lower_bound",
                     shrink: float | None = None, query_positions: Int[Array, "*B T"] | None = None, key_positions: Int[Array, "*B S"] | None = None,
                     **options) -> Float[Array, "B T N Hv"]:
    """What :func:`yoso_sample` estimates: attention with the probabilities that hashes collide.

    ::

        E_i = sum over j of  (1 - arccos(shrink q_i . k_j / (|q_i| |k_j|)) / pi)^bits  v_j

    Args:
      query: [B, T, N, H], of any length: made unit vectors here.
      key: [B, S, K, H], likewise, N a multiple of K.
      value: [B, S, K, Hv].
      bits: tau.
      gradient, shrink: as in :func:`attnx.weights.collision`.
      query_positions, key_positions: int32 [T] or [B, T] ([S] or [B, S]); -1 is padding, which finds zero and is not seen.
      **options: mask, implementation, block_sizes and the like as in :func:`attnx.attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype, not yet made unit vectors.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T S (H + Hv)) time a head, O(T + S) memory.

    Source: Zhanpeng Zeng et al., "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling", 2021, arXiv 2111.09714.

    >>> q, k = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), jnp.eye(2).reshape(1, 2, 1, 2)
    >>> yoso_expectation(q, k, jnp.array([1.0, 8.0]).reshape(1, 2, 1, 1), bits=3)[0, 0, 0].round(3)  # 1 + 8 / 2^3
    Array([2.], dtype=float32)
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    weights = collision(bits, gradient=gradient, shrink=shrink)
    out = attention(unit(query), unit(key), value, weights=weights, scale=1.0, query_positions=query_positions, key_positions=key_positions, **options)
    there = _present("query_positions", query_positions, query)
    return out if there is None else jnp.where(there[..., None, None], out, 0)


def _present(name, positions, x):
    """Which tokens of x there are, booleans [B, T], or None for all."""
    positions = checks.check_positions(name, positions, *x.shape[:2])
    return None if positions is None else jnp.broadcast_to(positions, x.shape[:2]) >= 0


# Codes and tables ---------------------------------------------------------------------------------------------------


def lsh_codes(random_key: Array, x: Float[Array, "B T N H"], *, bits: int, hashes: int, kind: str = "gaussian", kv_heads: int | None = None) -> Int[Array, "m B T N"]:
    """Codes of vectors: on which side of each of ``bits`` hyperplanes they lie, ``sum over b of 2^b [x . w_b > 0]``, for each of m sets of hyperplanes.

    Args:
      random_key: of the hyperplanes; the same key and shapes give queries and keys the same ones.
      x: [B, T, N, H]; lengths do not matter.
      bits: tau; with "hadamard" at most H, rounded up to a power of two.
      hashes: m.
      kind: "gaussian" (independent hyperplanes, O(tau H) a vector) or "hadamard" (the first tau numbers of ``H D3 H D2 H D1 x``, H Hadamard's
        matrix and D random signs, O(H log H)).
      kv_heads: K, of which each has hyperplanes of its own, shared by N / K heads; N by default.

    Returns:
      int32 [m, B, T, N], from 0 to 2^tau - 1.

    Raises:
      ValueError, TypeError: an argument that does not fit, named.

    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    >>> codes = lsh_codes(jax.random.key(1), x, bits=3, hashes=4)
    >>> codes.shape, bool((codes == lsh_codes(jax.random.key(1), 7 * x, bits=3, hashes=4)).all())
    ((4, 1, 5, 2), True)
    """
    x = checks.check_real("x", x, ranks=(4,))
    b, t, n, h = x.shape
    heads = n if kv_heads is None else kv_heads
    checks.check_integer("bits", bits, least=1, most=30)
    checks.check_integer("hashes", hashes, least=1)
    if kind not in HASHES:
        raise ValueError(f"kind: expected one of {HASHES}, got {kind!r}")
    if not heads or n % heads:
        raise ValueError(f"kv_heads: expected a divisor of the {n} heads of x, got {kv_heads}")
    size = 1 << max(h - 1, 0).bit_length()
    if kind == "hadamard" and bits > size:
        raise ValueError(f"bits: expected at most {size} with kind='hadamard' and vectors of size {h}, got {bits}")
    dtype = accumulator_dtype(x.dtype)
    grouped = lax.stop_gradient(x.astype(dtype)).reshape(b, t, heads, n // heads, h)

    def one(key):
        if kind == "gaussian":
            sides = jnp.einsum("btkgh,khc->btkgc", grouped, jax.random.normal(key, (heads, h, bits), dtype))
        else:
            sides = jnp.pad(grouped, [(0, 0)] * 4 + [(0, size - h)])
            for signs in jax.random.rademacher(key, (3, heads, 1, size), dtype):
                sides = _hadamard(sides * signs)
        return jnp.sum(jnp.where(sides[..., :bits] > 0, 1 << jnp.arange(bits, dtype=jnp.int32), 0), axis=-1, dtype=jnp.int32)

    return lax.map(one, jax.random.split(random_key, hashes)).reshape(hashes, b, t, n)


def _hadamard(x):
    """The product with Hadamard's matrix along the last axis, a power of two, unscaled."""
    size, half = x.shape[-1], 1
    while half < size:
        first, second = jnp.split(x.reshape(*x.shape[:-1], size // (2 * half), 2 * half), 2, axis=-1)
        x = jnp.concatenate([first + second, first - second], axis=-1).reshape(x.shape)
        half *= 2
    return x


def bucket_cumulate(codes: Int[Array, "B S N"], values: Float[Array, "B S N V"], buckets: int, *, kv_heads: int | None = None) -> Float[Array, "B K buckets V"]:
    """Values added up by code: ``table[c] = sum over j with code c of v_j``, a table a key-value head.

    Args:
      codes: int [B, S, N], from 0 to ``buckets - 1``; what lies outside is left out.
      values: [B, S, N, V].
      buckets: 2^tau.
      kv_heads: K, a divisor of N: the heads of a group share a table. N by default.

    Returns:
      [B, K, buckets, V] in at least float32. O(S V + buckets V) a head.

    >>> bucket_cumulate(jnp.array([[[1], [0], [1]]]), jnp.arange(3.0).reshape(1, 3, 1, 1), 2)[0, 0, :, 0]
    Array([1., 2.], dtype=float32)
    """
    b, s, n = codes.shape
    heads = n if kv_heads is None else kv_heads
    first = (jnp.arange(b, dtype=jnp.int32)[:, None, None] * heads + jnp.arange(n, dtype=jnp.int32) // (n // heads)) * buckets
    ids = jnp.where((codes >= 0) & (codes < buckets), first + codes, -1)
    return segment_sum(values.reshape(b * s * n, -1), ids.reshape(-1), b * heads * buckets).reshape(b, heads, buckets, -1)


def bucket_query(tables: Float[Array, "B K buckets V"], codes: Int[Array, "B T N"]) -> Float[Array, "B T N V"]:
    """What tables hold at codes, N a multiple of K. O(T V) a head.

    >>> bucket_query(jnp.array([5.0, 7.0]).reshape(1, 1, 2, 1), jnp.array([[[1]]])).item()
    7.0
    """
    b, _, n = codes.shape
    return tables[jnp.arange(b)[:, None, None], jnp.arange(n) // (n // tables.shape[1]), codes]


# Sampling -----------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is static about a sample."""

    bits: int
    gradient: str
    pairs: bool  # of codes compared all, rather than tables


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sampled(plan, query, key, value, query_codes, key_codes):
    """The mean over hashes; unit queries [B, T, N, H] and keys, values, and codes [m, B, T, N] and [m, B, S, K]."""
    if plan.pairs:
        return _weigh(_collisions(query_codes, key_codes, value.dtype), value)
    return _transfer(plan, key_codes, query_codes, value)


def _forward(plan, *arguments):
    return _sampled(plan, *arguments), arguments


def _backward(plan, saved, slope):
    query, key, value, query_codes, key_codes = saved
    share = _collisions(query_codes, key_codes, value.dtype) if plan.pairs else None
    value_slope = jnp.einsum("bkgij,bikgv->bjkv", share, _grouped(slope, key)) if plan.pairs else _transfer(plan, query_codes, key_codes, slope, key.shape[2])
    if plan.gradient != "lower_bound":
        gradient = "exact" if plan.gradient == "exact_expectation" else "lower_bound"
        expected = lambda query, key: attention(query, key, value, weights=collision(plan.bits, gradient=gradient), scale=1.0)
        return *jax.vjp(expected, query, key)[1](slope), value_slope, None, None
    half = plan.bits / 2
    if plan.pairs:
        scores = half * share * jnp.einsum("bikgv,bjkv->bkgij", _grouped(slope, key), value)
        query_slope, key_slope = _weigh(scores, key), jnp.einsum("bkgij,bikgh->bjkh", scores, _grouped(query, key))
        return query_slope, key_slope, value_slope, None, None

    def channel(slopes, pair):  # sum over j of B_ij (slope_i . v_j) k_j, one channel of the dot product after the other
        d, v = pair[0][..., None], pair[1][..., None]
        return (slopes[0] + d * _transfer(plan, key_codes, query_codes, v * key),
                slopes[1] + v * _transfer(plan, query_codes, key_codes, d * query, key.shape[2])), None

    channels = jnp.moveaxis(slope, -1, 0), jnp.moveaxis(value, -1, 0)
    slopes, _ = lax.scan(channel, (jnp.zeros_like(query), jnp.zeros_like(key)), channels)
    return *(half * x for x in slopes), value_slope, None, None


_sampled.defvjp(_forward, _backward)


def _grouped(x, like):
    """[B, T, N, ...] as [B, T, K, G, ...]."""
    return x.reshape(*x.shape[:2], like.shape[2], -1, x.shape[3])


def _weigh(weights, values):
    """[B, K, G, T, S] and [B, S, K, V] to [B, T, N, V]."""
    out = jnp.einsum("bkgij,bjkv->bikgv", weights, values)
    return out.reshape(*out.shape[:2], -1, out.shape[4])


def _collisions(query_codes, key_codes, dtype):
    """The share of hashes in which a query and a key have the same code, [B, K, G, T, S]."""
    m, b, t, n = query_codes.shape
    heads = key_codes.shape[3]

    def add(total, codes):
        query, key = codes[0].reshape(b, t, heads, n // heads), codes[1]
        equal = jnp.transpose(query, (0, 2, 3, 1))[..., None] == jnp.transpose(key, (0, 2, 1))[:, :, None, None]
        return total + equal, None

    total = jnp.zeros((b, heads, n // heads, t, key_codes.shape[2]), jnp.int32)
    return lax.scan(add, total, (query_codes, key_codes))[0].astype(dtype) / m


def _transfer(plan, from_codes, to_codes, values, heads=None):
    """The mean over hashes of what ``values``, added up by ``from_codes``, amount to at ``to_codes``; one table at a time."""
    def add(total, codes):
        return total + bucket_query(bucket_cumulate(codes[0], values, 1 << plan.bits, kv_heads=heads), codes[1]).astype(total.dtype), None

    return lax.scan(add, jnp.zeros((*to_codes.shape[1:], values.shape[3]), values.dtype), (from_codes, to_codes))[0] / len(from_codes)


def yoso_sample(random_key: Array, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *, bits: int = 9, hashes: int = 32,
                hash: str = "gaussian", gradient: str = "lower_bound", query_positions: Int[Array, "*B T"] | None = None,
                key_positions: Int[Array, "*B S"] | None = None, implementation: str | None = None) -> Float[Array, "B T N Hv"]:
    """An unbiased estimate of :func:`yoso_expectation` by m hash tables.

    ::

        out_i = 1/m sum over r of  sum over j with code_r(k_j) = code_r(q_i) of v_j

    Args:
      random_key: of the hyperplanes.
      query: [B, T, N, H], of any length: made unit vectors here.
      key: [B, S, K, H], likewise, N a multiple of K.
      value: [B, S, K, Hv].
      bits: tau, bits of a code: more make attention sharper. The paper has 9 for text, 10 to 12 elsewhere.
      hashes: m, tables.
      hash: how codes are made, "gaussian" or "hadamard", see :func:`lsh_codes`.
      gradient: of queries and keys: "lower_bound", (tau / 2) B_ij for the slope of P_ij, with the tables of the output; "lower_bound_expectation", (tau / 2) P_ij;
        or "exact_expectation", the slope of (1 - arccos(0.98 s) / pi)^tau. The latter two cost O(T S). That of values is always the output's, transposed.
      query_positions, key_positions: int32 [T] or [B, T] ([S] or [B, S]); -1 is padding: such queries find zero, such keys are in no table.
      implementation: "gathered" (tables, one at a time), "reference" (all pairs of codes compared) or None.

    Returns:
      [B, T, N, Hv] in the query's dtype, not yet made unit vectors.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: any other implementation.

    Cost: "gathered" O(m (T (tau H + Hv) + 2^tau Hv)) time a head and O(T (m + H) + 2^tau Hv) memory, with gradients O(m Hv H (T + 2^tau)) and O(2^tau H);
    "reference" O(m T S) and O(T S).

    Source: Zhanpeng Zeng et al., "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling", 2021, arXiv 2111.09714.

    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    >>> near = yoso_sample(jax.random.key(1), x, x, x, bits=4, hashes=1000) - yoso_expectation(x, x, x, bits=4)
    >>> bool(jnp.abs(near).max() < 0.2)
    True
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: expected one of {GRADIENTS}, got {gradient!r}")
    if implementation not in (None, "reference", "gathered"):
        raise NotImplementedError(f"implementation={implementation!r}: hash tables are 'gathered', all pairs of codes 'reference'")
    pairs = implementation == "reference" or (implementation is None and key.shape[1] <= FEW)
    dtype = accumulator_dtype(query.dtype)
    wide_query, wide_key = unit(query.astype(dtype)), unit(key.astype(dtype))
    codes = partial(lsh_codes, random_key, bits=bits, hashes=hashes, kind=hash, kv_heads=key.shape[2])
    seen, there = _present("key_positions", key_positions, key), _present("query_positions", query_positions, query)
    values = value.astype(dtype) if seen is None else jnp.where(seen[..., None, None], value.astype(dtype), 0)
    out = _sampled(_Plan(bits, gradient, pairs), wide_query, wide_key, values, codes(wide_query), codes(wide_key))
    return (out if there is None else jnp.where(there[..., None, None], out, 0)).astype(query.dtype)


class Yoso(nnx.Module):
    """YOSO as an :class:`attnx.Mechanism`; made by :class:`YosoAttention`, whose arguments it has."""

    def __init__(self, kv_heads: int, *, bits: int = 9, hashes: int | None = 32, hash: str = "gaussian", gradient: str = "lower_bound", normalize: bool = True,
                 window: int | None = None, seed: int = 0, implementation: str | None = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        checks.check_integer("bits", bits, least=1)
        self.bits, self.hashes, self.hash, self.gradient = bits, hashes, hash, gradient
        self.normalize, self.seed, self.implementation = normalize, seed, implementation
        self.kernel = nnx.data(None)
        if window is not None:
            if checks.check_integer("window", window, least=1) % 2 == 0:
                raise ValueError(f"window: expected an odd number of tokens, got {window}")
            bound = window**-0.5
            self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (window, kv_heads), param_dtype, -bound, bound), **logical_axes(None, "kv_heads"))

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        if segment_ids is not None:
            raise NotImplementedError("segment_ids: tables hold all tokens of a row; give each document a row of its own")
        common = dict(bits=self.bits, query_positions=query_positions, key_positions=key_positions, implementation=self.implementation)
        if self.hashes is None:
            out = yoso_expectation(query, key, value, gradient=self.gradient, **common)
        else:
            random_key = jax.random.key(self.seed) if dropout_key is None else dropout_key
            out = yoso_sample(random_key, query, key, value, hashes=self.hashes, hash=self.hash, gradient=self.gradient, **common)
        out = unit(out) if self.normalize else out
        return out if self.kernel is None else out + self._convolved(value, key_positions, query)

    def _convolved(self, value, key_positions, query):
        if value.shape[1] != query.shape[1]:
            raise ValueError(f"value: expected the {query.shape[1]} tokens of query for the convolution, got {checks.describe(value)}")
        b, t, heads, size = value.shape
        seen = _present("key_positions", key_positions, value)
        value = value if seen is None else jnp.where(seen[..., None, None], value, 0)
        kernel = jnp.repeat(self.kernel[...][::-1], size, axis=1)
        near = convolution(value.reshape(b, t, heads * size), kernel, origin=len(kernel) // 2).reshape(value.shape)
        return jnp.repeat(near, query.shape[2] // heads, axis=2)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        """There is no causal form: refused."""
        raise NotImplementedError("init: tables hold the whole sequence, so there is no streaming form")

    step = init


class YosoAttention(Attention):
    """Multi-head YOSO: unit outputs of :func:`yoso_sample`, and a convolution of the values.

    ::

        out = (unit(yoso_sample(x W_q, x W_k, x W_v)) + DWC(x W_v)) W_o

    Hyperplanes are drawn from the call's ``dropout_key``; without one from ``seed``, always the same.

    Args:
      features, num_heads: as in :class:`attnx.nn.Attention`; so are all options but the mechanism.
      bits, hash, gradient, implementation: as in :func:`yoso_sample`.
      hashes: m; None for :func:`yoso_expectation` (gradients "lower_bound" or "exact").
      normalize: whether outputs are made unit vectors.
      window: taps of the convolution over tokens, one kernel a key-value head, odd (33 in the paper's long-range tasks); None for none. Padded queries, which find
        nothing, have what it gives them.
      seed: of hyperplanes in calls without a key.

    >>> layer = YosoAttention(32, 4, bits=4, hashes=8, window=3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32)), dropout_key=jax.random.key(0)).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, bits: int = 9, hashes: int | None = 32, hash: str = "gaussian", gradient: str = "lower_bound",
                 normalize: bool = True, window: int | None = None, seed: int = 0, implementation: str | None = None, rngs: nnx.Rngs, **options):
        mechanism = Yoso(options.get("num_kv_heads") or num_heads, bits=bits, hashes=hashes, hash=hash, gradient=gradient, normalize=normalize, window=window,
                         seed=seed, implementation=implementation, param_dtype=options.get("param_dtype", jnp.float32), rngs=rngs)
        super().__init__(features, num_heads, mechanism=mechanism, rngs=rngs, **options)
