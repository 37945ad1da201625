"""Causal reduction: attention replaced by the minimum, maximum or mean of a token and the one before it, without parameters.

Hilsenbek: "Breaking the Attention Bottleneck" (2024, arXiv 2406.10906). For each channel,

    g_t = min(x_t, x_(t-1)),  or max,  or the mean                 y_t = g_t,      or (g_t + c_t) / 2 with the running mean c_t = 1/t sum over s <= t of x_s,
                                                                                   or min(g_t, the running minimum)

A layer looks one token back (with a context, at a summary of all), so depth makes the reach. What is certain of the paper is the comparison with the previous token, the
optional average context and the absence of queries and keys; halves for pair and context, the linear maps around, and the *running* mean are this library's
choices. A mean of the whole window, which the code is said to have, lets a language model see what it is to predict: it is there for other uses, and refused where
causality is asked for.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.nn.common import check_sequence, refuse

PAIRS: dict[str, Callable] = {"min_prev": jnp.minimum, "max_prev": jnp.maximum, "mean_prev": lambda x, y: (x + y) / 2}
MODES = ("min_prev", "max_prev", "mean_prev", "min_prev+mean", "max_prev+mean", "min_prev+min")
CONTEXTS = ("running_mean", "running_min", "global_mean")


class CausalReduceState(NamedTuple):
    """What a reduction remembers: the last token, the running sum or minimum [B, D], and how many tokens there were; constant in size."""

    previous: Float[Array, "B D"]
    memory: Float[Array, "B D"]
    count: Int[Array, ""]


def causal_reduce(x: Float[Array, "B T D"], mode: str = "min_prev", *, first: Literal["self", "zero"] = "self", positions: Int[Array, "*B T"] | None = None,
                  segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
    """Reduces each token with the one before it, and with a running context.

    ::

        min_prev, max_prev, mean_prev     g_t = min(x_t, x_(t-1)), max(..), (x_t + x_(t-1)) / 2
        min_prev+mean, max_prev+mean      (g_t + mean of x_1 .. x_t) / 2
        min_prev+min                      min(g_t, x_1, .., x_t)

    Args:
      x: [B, T, D].
      mode: one of the above.
      first: what precedes the first token: 'self', itself, so that g_1 = x_1, or 'zero'.
      positions: int32 [T] or [B, T]; -1 is padding, which is no predecessor, enters no context and whose output is zero. Else only the order matters.
      segment_ids: int32 [B, T], documents, each with a first token of its own.

    Returns:
      [B, T, D] in the dtype of x; sums in at least float32. At a tie both tokens have half of the gradient.

    Raises:
      ValueError: shapes that do not fit, or a name that does not exist.

    Cost: O(T D).

    >>> x = jnp.array([3.0, 1.0, 2.0]).reshape(1, 3, 1)
    >>> causal_reduce(x)[0, :, 0], causal_reduce(x, "max_prev+mean")[0, :, 0]
    (Array([3., 1., 1.], dtype=float32), Array([3. , 2.5, 2. ], dtype=float32))
    """
    _check(x, mode, first)
    real, alone, _ = _runs(x, positions, segment_ids)
    earlier = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    context = None if mode in PAIRS else context_vector(x, _context(mode), positions=positions, segment_ids=segment_ids, dtype=_wide(x))
    return jnp.where(real, _reduce(mode, x, jnp.where(alone, x if first == "self" else 0, earlier), context), 0)


def context_vector(x: Float[Array, "B T D"], kind: Literal["running_mean", "running_min", "global_mean"] = "running_mean", *, causal: bool = True,
                   positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None, dtype=None) -> Float[Array, "B T D"]:
    """A summary of tokens at each of them.

    Args:
      x: [B, T, D].
      kind: 'running_mean' and 'running_min' of the tokens so far, or 'global_mean' of all.
      causal: whether the summary may hold nothing later.
      positions, segment_ids: as in :func:`causal_reduce`.
      dtype: of the result; that of x by default.

    Returns:
      [B, T, D]; zeros at padding.

    Raises:
      ValueError: for 'global_mean' with ``causal``: as a context of a language model it would show what is to be predicted.

    Cost: O(T D) time, O(log T) steps.

    >>> x = jnp.array([3.0, 1.0, 2.0]).reshape(1, 3, 1)
    >>> context_vector(x)[0, :, 0], context_vector(x, "global_mean", causal=False)[0, :, 0]
    (Array([3., 2., 2.], dtype=float32), Array([2., 2., 2.], dtype=float32))
    """
    if kind not in CONTEXTS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, CONTEXTS))}, got {kind!r}")
    if kind == "global_mean" and causal:
        raise ValueError("kind: expected 'running_mean' or 'running_min' with causal=True, got 'global_mean', which sees the future")
    _check(x, "min_prev", "self")
    real, _, starts = _runs(x, positions, segment_ids)
    wide = _wide(x)
    if kind == "running_min":
        out = _running(jnp.minimum, jnp.where(real, x, jnp.inf), starts)
    else:
        terms = jnp.concatenate([jnp.where(real, x, 0), real], axis=-1, dtype=wide)
        sums = _running(jnp.add, terms, starts)
        if kind == "global_mean":  # the sum so far and the sum from here on hold this token twice
            ends = jnp.pad(starts, ((0, 0), (0, 1), (0, 0)), constant_values=True)[:, 1:]
            sums = sums + jnp.flip(_running(jnp.add, jnp.flip(terms, 1), jnp.flip(ends, 1)), 1) - terms
        out = sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)
    return jnp.where(real, out, 0).astype(dtype or x.dtype)


def causal_reduce_init(batch: int, features: int, mode: str = "min_prev", *, dtype=jnp.float32) -> CausalReduceState:
    """The state before the first token.

    >>> causal_reduce_init(2, 8).previous.shape
    (2, 8)
    """
    empty = jnp.full((batch, features), jnp.inf if mode == "min_prev+min" else 0, jnp.promote_types(dtype, jnp.float32))
    return CausalReduceState(jnp.zeros((batch, features), dtype), empty, jnp.zeros((), jnp.int32))


def causal_reduce_step(state: CausalReduceState, x: Float[Array, "B t D"], mode: str = "min_prev", *, first: Literal["self", "zero"] = "self"
                       ) -> tuple[CausalReduceState, Float[Array, "B t D"]]:
    """The next t tokens: ``(state, [B, t, D])``, equal to :func:`causal_reduce` of everything so far.

    >>> state, out = causal_reduce_step(causal_reduce_init(1, 1), jnp.array([[[3.0], [1.0]]]))
    >>> state, out = causal_reduce_step(state, jnp.array([[[2.0]]]))
    >>> out[0, 0, 0]
    Array(1., dtype=float32)
    """
    _check(x, mode, first)
    before = jnp.where(state.count > 0, state.previous.astype(x.dtype), x[:, 0] if first == "self" else 0)
    earlier = jnp.concatenate([before[:, None], x[:, :-1]], axis=1)
    count = state.count + 1 + jnp.arange(x.shape[1], dtype=jnp.int32)
    wide, context, memory = x.astype(state.memory.dtype), None, state.memory
    if _context(mode) == "running_min":
        context = jnp.minimum(state.memory[:, None], jax.lax.cummin(wide, axis=1))
        memory = context[:, -1]
    elif _context(mode) == "running_mean":
        total = state.memory[:, None] + jnp.cumsum(wide, axis=1)
        context, memory = total / count[:, None], total[:, -1]
    return CausalReduceState(x[:, -1].astype(state.previous.dtype), memory, count[-1]), _reduce(mode, x, earlier, context)


def _context(mode):
    """The context of a mode, or None."""
    return {"mean": "running_mean", "min": "running_min"}.get(mode.partition("+")[2])


def _reduce(mode, x, earlier, context):
    out = PAIRS[mode.partition("+")[0]](x, earlier)
    if context is not None:
        out = jnp.minimum(out, context) if mode == "min_prev+min" else (out + context) / 2
    return out.astype(x.dtype)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _check(x, mode, first):
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected real numbers of shape [B, T, D], got {checks.describe(x)}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if first not in ("self", "zero"):
        raise ValueError(f"first: expected 'self' or 'zero', got {first!r}")


def _runs(x, positions, segment_ids):
    """Which tokens are real, which follow no real token of their document, and which begin a document: booleans [B, T, 1]."""
    batch, length, _ = x.shape
    real = jnp.ones((batch, length), bool)
    if positions is not None:
        real = jnp.broadcast_to(checks.check_positions("positions", positions, batch, length) >= 0, (batch, length))
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else checks.check_integers("segment_ids", segment_ids, ranks=(1, 2))
    ids = jnp.broadcast_to(ids, (batch, length))
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)[:, :length]
    alone = starts | ~jnp.pad(real, ((0, 0), (1, 0)))[:, :-1]
    return real[..., None], alone[..., None], starts[..., None]


def _running(combine, x, starts):
    """``combine`` of all entries since the last start, [B, T, C]."""
    def join(earlier, later):
        return earlier[0] | later[0], jnp.where(later[0], later[1], combine(earlier[1], later[1]))

    return jax.lax.associative_scan(join, (starts, x), axis=1)[1]


class CausalReductionMixer(nnx.Module):
    """A reduction between linear maps, in place of attention or in place of the activation of an MLP. Called like :class:`attnx.nn.Attention`.

    ::

        place='attention'       out = reduce(x W_in) W_out                 D -> D -> D; both maps may be left out
        place='activation'      out = reduce(x W_up) W_down                D -> hidden -> D; nothing else bends it

    Where it takes the place of an activation, hand it to :class:`attnx.nn.TransformerBlock` as ``mlp``, beside attention; or as ``attention`` with no MLP, for a model
    without attention.

    Args:
      features: D.
      mode, first: as in :func:`causal_reduce`.
      place: 'attention' or 'activation'.
      hidden_features: of 'activation'; 4 D by default.
      project_in, project_out: whether there is W_in and W_out, in 'attention'.
      context: of the modes with a mean: 'running_mean', or 'global_mean', which needs ``causal=False``.
      causal: whether nothing later may be seen.
      dtype, param_dtype: as in ``nnx.Linear``.
      rngs: the generator of initial values.

    Raises:
      ValueError: a name that does not exist, or a context that is not causal where that is asked for.

    >>> mixer = CausalReductionMixer(8, "min_prev+mean", rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    >>> state, first = mixer.step(mixer.init_state(1, 5), x[:, :3])
    >>> state, last = mixer.step(state, x[:, 3:])
    >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), mixer(x), atol=1e-5))
    True
    """

    def __init__(self, features: int, mode: str = "min_prev", *, place: Literal["attention", "activation"] = "attention", first: Literal["self", "zero"] = "self",
                 hidden_features: int | None = None, project_in: bool = True, project_out: bool = True, context: str = "running_mean", causal: bool = True,
                 dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        _check(jnp.zeros((1, 1, 1)), mode, first)
        if place not in ("attention", "activation"):
            raise ValueError(f"place: expected 'attention' or 'activation', got {place!r}")
        if context not in ("running_mean", "global_mean"):
            raise ValueError(f"context: expected 'running_mean' or 'global_mean', got {context!r}")
        if context == "global_mean" and (causal or not mode.endswith("+mean")):
            raise ValueError(f"context: 'global_mean' sees the future and is a mean; expected it with causal=False and a mode with a mean, got {causal=}, {mode=}")
        self.features, self.mode, self.first, self.context = features, mode, first, context
        self.inner = (hidden_features or 4 * features) if place == "activation" else features
        linear: Callable[..., Any] = lambda inputs, outputs: nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        both = place == "activation"
        self.inputs = linear(features, self.inner) if both or project_in else nnx.data(None)
        self.outputs = linear(self.inner, features) if both or project_out else nnx.data(None)

    def __call__(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                 dropout_key=None, hooks=None, layer=0) -> Float[Array, "B T D"]:
        """[B, T, D] to the same; positions and segment_ids as in :func:`causal_reduce`."""
        check_sequence("x", x, self.features)
        refuse("a reduction has no queries, keys and scores", hooks=hooks)
        h = x if self.inputs is None else self.inputs(x)
        given: dict[str, Any] = dict(positions=positions, segment_ids=segment_ids)
        if self.context == "running_mean":
            h = causal_reduce(h, self.mode, first=self.first, **given)
        else:
            pair = causal_reduce(h, self.mode.removesuffix("+mean"), first=self.first, **given)
            h = ((pair + context_vector(h, "global_mean", causal=False, **given)) / 2).astype(h.dtype)
        return h if self.outputs is None else self.outputs(h)

    def init_state(self, batch: int, max_length: int, *, dtype=None) -> CausalReduceState:
        """The state before the first token, of constant size."""
        if self.context != "running_mean":
            raise NotImplementedError("context='global_mean' holds tokens that have not come yet, so it has no streaming form; use 'running_mean'")
        return causal_reduce_init(batch, self.inner, self.mode, dtype=dtype or jnp.float32)

    def step(self, state: CausalReduceState, x: Float[Array, "B t D"], *, hooks=None, layer=0) -> tuple[CausalReduceState, Float[Array, "B t D"]]:
        """The next t tokens: ``(state, [B, t, D])``."""
        check_sequence("x", x, self.features)
        refuse("a reduction has no queries, keys and scores", hooks=hooks)
        state, h = causal_reduce_step(state, x if self.inputs is None else self.inputs(x), self.mode, first=self.first)
        return state, h if self.outputs is None else self.outputs(h)
