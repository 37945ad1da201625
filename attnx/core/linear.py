"""The recurrent engine: attention through a state of constant size.

    S_t = exp(g_t) * S_(t-1) + phi(k_t) v_t^T,        o_t = scale * phi(q_t) S_t

with no decay g, a constant one, or one that depends on the data, per head or per channel of the key. The executions are in
:mod:`attnx.core.linear_forms` and :mod:`attnx.core.linear_fused`; the mathematics of a chunk is in :mod:`pallas_kernels.linear_tile`.
"""

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnx.core import linear_forms as forms
from attnx.core import linear_fused
from attnx.core.checks import as_array, check_function, check_integer, check_integers, check_query_key_value, check_scale, describe
from attnx.core.fused import prefer
from pallas_kernels.linear_tile import divide
from pallas_kernels.tile import accumulator_dtype

IMPLEMENTATIONS = ("parallel", "chunked", "recurrent", "pallas", "triton")


class LinearState(NamedTuple):
    """All that later tokens need of earlier ones: S [B, M, H, Hv] and, with a normaliser, the decayed sum z of keys [B, M, H]; M is the
    number of heads of the decay, K without one."""

    memory: Float[Array, "B M H Hv"]
    normalizer: Float[Array, "B M H"] | None = None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    implementation: str
    is_causal: bool
    features: Callable
    normalize: bool
    floor: float | None
    scale: float
    chunk_size: int | None
    axis_name: Hashable | None
    kernels: Any = None  # how they are to be run, and where

    @property
    def fused(self):
        """Whether a form takes features, and scales and divides by itself."""
        return self.implementation in ("pallas", "triton")

    @property
    def form(self):
        if self.fused:
            return partial(linear_fused.attend, normalize=self.normalize, scale=self.scale, floor=self.floor, chunk_size=self.chunk_size,
                           kernels=self.kernels, language=self.implementation)
        form = partial(getattr(forms, self.implementation), features=self.features)
        return partial(form, chunk_size=self.chunk_size) if self.implementation == "chunked" else form


def _identity(x):
    return x


def linear_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], *,
                     log_decay: Float[Array, "..."] | None = None, is_causal: bool = True, normalize: bool = False,
                     normalizer_floor: float | None = None, feature_map: Callable | None = None, initial_state: LinearState | None = None,
                     return_state: bool = False, segment_ids: Int[Array, "B T"] | None = None, key_mask: Bool[Array, "B S"] | None = None,
                     scale: float | None = None, chunk_size: int | None = None, implementation: str | None = None, axis_name: Hashable | None = None):
    """Linear attention: S_t = exp(g_t) * S_(t-1) + phi(k_t) v_t^T and o_t = scale * phi(q_t) S_t.

    With ``normalize``, o_t = phi(q_t) S_t / (phi(q_t) . z_t) where z is the same recurrence with v = 1. Without ``is_causal`` every query
    reads the sum over all keys, S_T, as an encoder or cross-attention does.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] and [B, S, K, Hv], N a multiple of K; S = T where causal.
      log_decay: g, at most 0 (-inf forgets everything): None, [M] (constant), [B, T, M] (for each token) or [B, T, M, H]
        (for each token and channel of the key), for M heads, a multiple of K that divides N. M = K has the queries of a group share
        a state. Where causal only.
      is_causal: token t reads the keys up to and including its own.
      normalize: divide by phi(q_t) . z_t. Where that is 0 the output and its gradient are 0; a negative one divides like any other
        number, which only features of both signs can produce.
      normalizer_floor: divide by max(abs(scale * phi(q_t) . z_t), normalizer_floor) instead, bounded whatever the features are.
      feature_map: phi, applied along the last axis to the queries and keys ([..., H] -> [..., H'], in at least float32). The chunked form
        makes features of a slab of tokens at a time, so wide maps cost no memory; the kernels take them rounded to the query's dtype. Maps that
        differ or see several heads the caller applies.
      initial_state: the state before the first token, whose document it belongs to.
      return_state: also return the state after the last token.
      segment_ids: int [B, T], T = S. The state starts anew wherever the id differs from that of the token before, and without
        ``is_causal`` a token reads its own run of equal ids. Tokens with a negative id are padding: skipped, and zero in the output.
      key_mask: booleans [B, S], the keys that count, all by default; others add nothing (time passes for them), whatever they hold.
      scale: a factor of phi(q), 1 by default.
      chunk_size: tokens of a chunk in 'chunked', 'pallas' and 'triton' (there at least 128 on a TPU, 16 on a GPU), a power of two.
      implementation: 'parallel' (the definition, all pairs: O(T^2)), 'chunked' (matrix products over chunks: O(T) time and memory,
        forward and backward), 'recurrent' (token by token; for decoding), 'pallas' (the chunks in fused kernels for TPU or GPU, the state on chip; where
        causal, first derivatives only), 'triton' (likewise, for an NVIDIA GPU, the forward pass in Triton itself, of ``pip install attnx[cuda]``), or None for the best
        that serves the call.
      axis_name: the mesh axis over which the sequence is sharded, inside ``jax.shard_map``: all arrays with an axis T or S are this
        device's shard, in order; states are the whole sequence's, the same on every device. Devices work at once and exchange only states.

    Returns:
      [B, T, N, Hv] in the query's dtype; with ``return_state`` a pair with the :class:`LinearState`, in at least float32.

    Raises:
      ValueError, TypeError: arguments that do not fit. NotImplementedError: a named implementation that cannot serve.

    Costs O(T (C (H + Hv) + H Hv)) per head with chunks of C tokens. The gradient keeps one state per slab of at least min(H, Hv) tokens
    and recomputes the rest, so its memory is O(T (H + Hv)). Derivatives of any order exist, in both modes; 'pallas' and 'triton' have first ones in reverse mode.

    Sources: Katharopoulos et al., Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, 2020, arXiv 2006.16236 (no
    decay, normaliser); Sun et al., Retentive Network: A Successor to Transformer for Large Language Models, 2023, arXiv 2307.08621 (constant
    decay); Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, 2023, arXiv 2312.06635 (decay per channel,
    chunks); Dao and Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality, 2024,
    arXiv 2405.21060 (per head and token); Sun et al., Linear Attention Sequence Parallelism, 2024, arXiv 2404.02882 (sharded).

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 4, 1, 1))
    >>> linear_attention(x, x, x)[0, :, 0, 0]
    Array([1., 2., 3., 4.], dtype=float32)
    >>> linear_attention(x, x, x, log_decay=jnp.log(jnp.array([0.5])))[0, :, 0, 0]
    Array([1.   , 1.5  , 1.75 , 1.875], dtype=float32)
    >>> linear_attention(x, x, x, segment_ids=jnp.array([[0, 0, 1, -1]]))[0, :, 0, 0]
    Array([1., 2., 1., 0.], dtype=float32)
    """
    check_query_key_value(query, key, value)
    (b, t, n, h), (_, s, k, _) = query.shape, key.shape
    if axis_name is not None:
        _check_axis(axis_name)
    if is_causal and s != t:
        raise ValueError(f"key: expected the query's length {t} with is_causal=True, got {describe(key)}; is_causal=False lets them differ")
    if feature_map is not None:
        check_function("feature_map", feature_map)
        h = _feature_size(feature_map, h, accumulator_dtype(query.dtype))
    heads = k
    if log_decay is not None:
        if not is_causal:
            raise ValueError("log_decay: expected None with is_causal=False, where tokens have no order")
        log_decay, heads = _check_log_decay(log_decay, b, t, n, k, h)
    if segment_ids is not None:
        segment_ids = check_integers("segment_ids", segment_ids, ranks=(2,))
        if s != t or segment_ids.shape != (b, t):
            raise ValueError(f"segment_ids: expected shape {[b, t]} and as many keys as queries, got {describe(segment_ids)} and {s} keys")
    if key_mask is not None:
        key_mask = as_array("key_mask", key_mask, "booleans")
        if key_mask.shape != (b, s) or key_mask.dtype != bool:
            raise ValueError(f"key_mask: expected booleans {[b, s]}, got {describe(key_mask)}")
    if normalizer_floor is not None and not (normalize and isinstance(normalizer_floor, (int, float)) and normalizer_floor > 0):
        raise ValueError(f"normalizer_floor: expected None or, with normalize=True, a positive number, got {normalizer_floor!r}")
    if chunk_size is not None and check_integer("chunk_size", chunk_size, least=1) & (chunk_size - 1):
        raise ValueError(f"chunk_size: expected a power of two, got {chunk_size}")
    state = init(b, heads, h, value.shape[3], normalize=normalize, dtype=accumulator_dtype(query.dtype))
    if initial_state is not None:
        state = _check_state(initial_state, state)
    if implementation is None and t == 1 and is_causal and axis_name is None:
        implementation = "recurrent"
    _check_implementation(implementation, is_causal, axis_name)
    served = lambda: linear_fused.choose_kernel(implementation, query, value, log_decay, h, is_causal, chunk_size)
    implementation, kernels = prefer(implementation, served, lambda: (implementation or "chunked", None))
    plan = _Plan(implementation, is_causal, feature_map or _identity, normalize, normalizer_floor,
                 1.0 if scale is None else check_scale(scale, 1), chunk_size, axis_name, kernels)
    out, state = _attend(plan, query, key, value, log_decay, segment_ids, key_mask, state)
    return (out, state) if return_state else out


def init(batch: int, heads: int, key_size: int, value_size: int, *, normalize: bool = False, dtype=jnp.float32) -> LinearState:
    """The state before the first token: all zero, and of the same size after any number of tokens.

    Args:
      batch: B.
      heads: M, those of the decay; without decay those of the keys.
      key_size: the size of the keys' features.
      value_size: the size of the values.
      normalize: keep the normaliser too.
      dtype: float32, or float64 for such inputs.

    >>> init(2, 4, 64, 32).memory.shape
    (2, 4, 64, 32)
    """
    memory = jnp.zeros((batch, heads, key_size, value_size), dtype)
    return LinearState(memory, jnp.zeros((batch, heads, key_size), dtype) if normalize else None)


def step(state: LinearState, query: Float[Array, "B t N H"], key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"], *,
         log_decay: Float[Array, "..."] | None = None, normalizer_floor: float | None = None, feature_map: Callable | None = None,
         scale: float | None = None, chunk_size: int | None = None, implementation: str | None = None):
    """The next t tokens: ``(state, out [B, t, N, Hv])``, equal to :func:`linear_attention` over everything so far.

    Args: as for :func:`linear_attention`; ``state`` is that of :func:`init` or of the step before, and says whether to normalise.
    One token costs O(H Hv) per head, whatever came before.

    >>> import jax.numpy as jnp
    >>> state, x = init(1, 1, 1, 1), jnp.ones((1, 1, 1, 1))
    >>> state, first = step(state, x, x, x)
    >>> state, second = step(state, x, x, x)
    >>> first.item(), second.item()
    (1.0, 2.0)
    """
    out, state = linear_attention(query, key, value, log_decay=log_decay, normalize=state.normalizer is not None,
                                  normalizer_floor=normalizer_floor, feature_map=feature_map, initial_state=state, return_state=True,
                                  scale=scale, chunk_size=chunk_size, implementation=implementation)
    return state, out


def elu_plus_one(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """``elu(x) + 1``: x + 1 where x > 0 and e^x elsewhere, so positive everywhere.

    Source: Angelos Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020, arXiv 2006.16236.

    >>> import jax.numpy as jnp
    >>> elu_plus_one(jnp.array([-100.0, 0.0, 2.0]))[1:]
    Array([1., 3.], dtype=float32)
    """
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


# Checks -------------------------------------------------------------------------------------------------------------


def _check_axis(axis_name):
    try:
        lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(f"axis_name: expected a mesh axis of an enclosing jax.shard_map, got {axis_name!r}") from error


def _feature_size(feature_map, size, dtype):
    out = jax.eval_shape(feature_map, jax.ShapeDtypeStruct((1, size), dtype))
    if getattr(out, "shape", ())[:-1] != (1,) or out.dtype != dtype:
        raise ValueError(f"feature_map: expected to map {dtype}[..., {size}] to {dtype}[..., H'], got {out} from {dtype}[1, {size}]")
    return out.shape[-1]


def _check_log_decay(log_decay, b, t, n, k, h):
    log_decay = as_array("log_decay", log_decay)
    if not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise TypeError(f"log_decay: expected real numbers, got {describe(log_decay)}")
    heads = log_decay.shape[2 if log_decay.ndim > 2 else 0] if log_decay.ndim in (1, 3, 4) else 0
    if not heads or n % heads or heads % k or log_decay.shape not in ((heads,), (b, t, heads), (b, t, heads, h)):
        some = f"M = {n}" if n == k else f"M a multiple of {k} that divides {n}"
        raise ValueError(f"log_decay: expected shape [M], [{b}, {t}, M] or [{b}, {t}, M, {h}] with {some}, got {describe(log_decay)}")
    return log_decay, heads


def _check_state(given, expected):
    if not isinstance(given, LinearState):
        raise TypeError(f"initial_state: expected a LinearState, got {describe(given)}")
    for name, x, like in zip(LinearState._fields, given, expected):
        if (x is None) != (like is None):
            what = "None with normalize=False" if like is None else "an array with normalize=True"
            raise ValueError(f"initial_state.{name}: expected {what}, got {describe(x)}")
        if x is not None and as_array(f"initial_state.{name}", x).shape != like.shape:
            raise ValueError(f"initial_state.{name}: expected shape {list(like.shape)}, got {describe(x)}")
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), given, expected)


def _check_implementation(implementation, is_causal, axis_name):
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation: expected None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if not is_causal and implementation == "recurrent":
        raise NotImplementedError("implementation: 'recurrent' reads tokens in order and needs is_causal=True; 'chunked' serves")
    if not is_causal and implementation == "parallel" and axis_name is not None:
        raise NotImplementedError("implementation: 'parallel' with is_causal=False needs all keys on one device; 'chunked' serves")


# Execution ----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _attend(plan: _Plan, query, key, value, log_decay, segment_ids, key_mask, state):
    """``(out, state)`` of checked arguments."""
    heads, dtype = state.memory.shape[1], state.memory.dtype
    memory = state.memory
    if plan.normalize:
        memory = jnp.concatenate([memory, state.normalizer[..., None]], axis=-1)
        if not plan.fused:
            value = jnp.concatenate([value, jnp.ones_like(value, shape=(*value.shape[:3], 1))], axis=-1)
    if log_decay is not None:
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        log_decay = jnp.broadcast_to(log_decay.astype(dtype), (*key.shape[:2], heads, log_decay.shape[-1]))
    counted = None if key_mask is None else key_mask[..., None, None]
    if segment_ids is not None:
        valid = (segment_ids >= 0)[..., None, None]
        query, log_decay = jnp.where(valid, query, 1), None if log_decay is None else jnp.where(valid, log_decay, 0)
        counted = valid if counted is None else valid & counted
    if counted is not None:  # features may be singular at 0, so what is skipped holds ones
        key, value = jnp.where(counted, key, 1), jnp.where(counted, value, 0)
    if plan.fused:
        query, key = (plan.features(x.astype(dtype)).astype(x.dtype) for x in (query, key))
        key = key if counted is None else jnp.where(counted, key, 0)

    attend = _causal if plan.is_causal else _unordered
    out, memory = attend(plan, query, key, value, log_decay, segment_ids, memory)
    state = LinearState(memory[..., :-1], memory[..., -1]) if plan.normalize else LinearState(memory)
    if not plan.fused:
        out = out * plan.scale
        out = divide(out[..., :-1], out[..., -1:], plan.floor) if plan.normalize else out
    return (out if segment_ids is None else jnp.where(valid, out, 0)).astype(query.dtype), state


def restarts(segment_ids: Int[Array, "B T"], axis_name: Hashable | None = None, reverse: bool = False) -> Bool[Array, "B T"]:
    """Where the state starts anew: where the id differs from that of the last token before it that is not padding.

    Args:
      segment_ids: int [B, T]; negative ids are padding.
      axis_name: the mesh axis over which T is sharded, inside ``jax.shard_map``.
      reverse: whether the sequence is read from the last device to the first.

    >>> import jax.numpy as jnp
    >>> restarts(jnp.array([[-1, 0, -1, 0, 1]]))
    Array([[False, False, False, False,  True]], dtype=bool)
    """

    def forward(earlier, later):
        return jnp.where(later >= 0, later, earlier)

    latest = lax.associative_scan(forward, segment_ids, axis=1)
    first = jnp.full_like(latest[:, -1:], -1)
    if axis_name is not None:
        first = forms.scan_devices(forward, latest[:, -1:], first, axis_name, reverse)
    before = jnp.concatenate([first, forward(first, latest)[:, :-1]], axis=1)
    return (segment_ids >= 0) & (before >= 0) & (segment_ids != before)


def _causal(plan, query, key, value, log_decay, segment_ids, memory, reverse=False):
    if not query.shape[1]:
        return jnp.zeros((*query.shape[:3], value.shape[3]), memory.dtype), memory
    if segment_ids is not None:
        anew = restarts(segment_ids, plan.axis_name, reverse)[..., None, None]
        log_decay = jnp.zeros((1, 1, key.shape[2], 1), memory.dtype) if log_decay is None else log_decay
        log_decay = jnp.where(anew, -jnp.inf, log_decay)
    if plan.axis_name is None:
        return plan.form(query, key, value, log_decay, memory)
    return forms.over_devices(plan.form, query, key, value, log_decay, memory, axis_name=plan.axis_name, reverse=reverse)


def _unordered(plan, query, key, value, log_decay, segment_ids, memory):
    """Not causal: one sum over all keys or, in runs of equal ids, the sum up to a token and that from it on."""
    if plan.implementation == "parallel":
        runs = None if segment_ids is None else jnp.cumsum(restarts(segment_ids), axis=1)
        return forms.parallel_unordered(query, key, value, memory, features=plan.features, runs=runs)
    if segment_ids is None:
        return forms.unordered(query, key, value, memory, features=plan.features, axis_name=plan.axis_name)
    flip = partial(jax.tree.map, lambda x: jnp.flip(x, axis=1))
    past, last = _causal(plan, query, key, value, None, segment_ids, memory)
    future, _ = _causal(plan, *flip((query, key, value)), None, flip(segment_ids), jnp.zeros_like(memory), reverse=True)
    return past + flip(future) - forms.own(query, key, value, memory, features=plan.features), last
