"""Lightning attention: linear attention that forgets at a constant rate, in tiles.

Qin, Sun, Li, Shen, Sun, Zhong: "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models" (2024, arXiv 2401.04658):

    out_t = sum over s <= t of  e^(-slope (t - s)) (q_t . k_s) v_s

without softmax, scale or denominator. In tiles of C tokens: pairs within a tile by their masked product, all earlier tokens by the state

    out_i = sum over j <= i of e^(-slope (i - j)) (q_i . k_j) v_j  +  e^(-slope (i + 1)) q_i S          i, j = 0 .. C - 1 in the tile
    S    <- e^(-slope C) S + sum over j of e^(-slope (C - 1 - j)) k_j v_j^T

whose exponents never exceed 0, so nothing overflows, and no cumulative sum of outer products is ever stored. The time a token is the same at any length.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks, linear
from attnx.mechanism import recurrent
from attnx.nn.attention import Attention
from attnx.nn.common import logical_axes
from attnx.nn.norms import make_norm
from attnx.scores.alibi import alibi_slopes


def lightning_slopes(num_heads: int, layer: int = 0, num_layers: int = 1) -> np.ndarray:
    """The slopes of a layer's heads: ``alibi_slopes(num_heads) * (1 - layer / (num_layers - 1) + 1e-5)``, so the last layer hardly forgets.

    Args:
      num_heads: N.
      layer: its index, from 0.
      num_layers: of the model.

    Returns:
      float32 [N], at least 0, nats a token.

    >>> [f"{slope:.4f}" for slope in lightning_slopes(2, layer=1, num_layers=3)]
    ['0.0313', '0.0020']
    """
    checks.check_integer("num_layers", num_layers, least=1)
    if not 0 <= checks.check_integer("layer", layer, least=0) < num_layers:
        raise ValueError(f"layer: expected an index below num_layers = {num_layers}, got {layer}")
    return alibi_slopes(num_heads) * np.float32(1 - layer / max(num_layers - 1, 1) + 1e-5)


def lightning_attention(query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"], slopes: Float[Array, " M"] | None = None, *,
                        initial_state: linear.LinearState | None = None, return_state: bool = False, segment_ids: Int[Array, "B T"] | None = None,
                        scale: float | None = None, chunk_size: int | None = None, implementation: str | None = None, axis_name=None):
    """Causal linear attention with a constant decay a head.

    ::

        out_t = scale * sum over s <= t of  e^(-slope (t - s)) (q_t . k_s) v_s

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H], N a multiple of K.
      value: [B, T, K, Hv].
      slopes: real [M], at least 0, for M = N heads or, with M = K, one for the heads of a group; None: nothing is forgotten. See :func:`lightning_slopes`.
      initial_state, return_state: what came before, and what is to come after, as in :func:`attnx.linear_attention`.
      segment_ids: int32 [B, T], documents that do not see each other; tokens of negative ids are padding, skipped.
      scale: 1 by default.
      chunk_size: C, tokens of a tile, a power of two.
      implementation: "parallel" (the masked product, all pairs), "chunked" (tiles), "recurrent" (token by token), "pallas" (tiles in TPU kernels) or None.
      axis_name: the mesh axis over which the sequence is sharded, inside ``jax.shard_map``.

    Returns:
      [B, T, N, Hv] in the query's dtype; with ``return_state`` a pair with the :class:`attnx.core.linear.LinearState`, M heads of [H, Hv].

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O(T (C (H + Hv) + H Hv)) time a head and O(T (H + Hv)) memory, forward and backward.

    Source: Zhen Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models", 2024, arXiv 2401.04658.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 4, 1, 1))
    >>> lightning_attention(x, x, x, jnp.log(jnp.array([2.0])))[0, :, 0, 0]
    Array([1.   , 1.5  , 1.75 , 1.875], dtype=float32)
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    return linear.linear_attention(query, key, value, log_decay=_log_decay(slopes, query, key), initial_state=initial_state, return_state=return_state,
                                   segment_ids=segment_ids, scale=scale, chunk_size=chunk_size, implementation=implementation, axis_name=axis_name)


def lightning_step(state: linear.LinearState, query: Float[Array, "B t N H"], key: Float[Array, "B t K H"], value: Float[Array, "B t K Hv"],
                   slopes: Float[Array, " M"] | None = None, **options) -> tuple[linear.LinearState, Array]:
    """The next t tokens of :func:`lightning_attention`: ``(state, out [B, t, N, Hv])``.

    Args:
      state: of the step before or, at first, ``attnx.core.linear.init(B, M, H, Hv)``, M the number of slopes (K without).
      query, key, value, slopes: as there, of t tokens: one to decode, many to prefill.
      **options: scale, chunk_size, implementation as there.

    Cost: O(H Hv) a token and head, whatever came before.

    >>> import jax.numpy as jnp
    >>> state, x = linear.init(1, 1, 1, 1), jnp.ones((1, 1, 1, 1))
    >>> for _ in range(3):
    ...     state, out = lightning_step(state, x, x, x, jnp.log(jnp.array([2.0])))
    >>> out.item()
    1.75
    """
    query, key, value = checks.check_query_key_value(query, key, value)
    return linear.step(state, query, key, value, log_decay=_log_decay(slopes, query, key), **options)


def _log_decay(slopes, query, key):
    if slopes is None:
        return None
    slopes, (n, k) = checks.check_real("slopes", slopes, ranks=(1,)), (query.shape[2], key.shape[2])
    if not slopes.size or n % slopes.size or slopes.size % k:
        raise ValueError(f"slopes: expected shape [M] with M a multiple of the {k} key heads that divides the {n} query heads, got {checks.describe(slopes)}")
    return -slopes


class AcrossHeads(nnx.Module):
    """A norm over what all heads found together: [..., N, Hv] as vectors of N Hv."""

    def __init__(self, features: int, *, kind: str, heads: int, **options):
        self.norm = make_norm(kind, heads * features, **options)

    def __call__(self, x):
        """[..., N, Hv] to the same."""
        return self.norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


class LowRankGate(nnx.Module):
    """Logits of an output gate through a narrow layer: [..., D] to [..., N, Hv]."""

    def __init__(self, features: int, rank: int, heads: int, size: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        common = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = nnx.Linear(features, rank, kernel_metadata=logical_axes("embed", None), **common)
        self.up = nnx.LinearGeneral(rank, (heads, size), kernel_metadata=logical_axes(None, "heads", "head_size"), **common)

    def __call__(self, x):
        """[..., D] to [..., N, Hv]."""
        return self.up(self.down(x))


class TNLAttention(Attention):
    """The attention layer of TransNormerLLM around :func:`lightning_attention`.

    ::

        q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)
        out     = (norm(lightning_attention(q, k, v, slopes)) * sigmoid(x W_down W_up)) W_o

    The norm is over what all heads found together. It needs no positions; ``position`` puts in those of the paper's first layer.

    Source: Zhen Qin et al., "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer", 2023, arXiv 2307.14995, and Lightning Attention-2.

    Args:
      features: D, size of the input.
      num_heads: N.
      layer, num_layers: which layer of how many this is: says how fast its heads forget, see :func:`lightning_slopes`.
      slopes: real [N] in their place; kept, not trained.
      gate_rank: width of the gate's narrow layer, the head size by default.
      norm: 'layer', 'rms' or a constructor.
      **options: as for :class:`attnx.nn.Attention`.

    >>> layer = TNLAttention(32, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, layer: int = 0, num_layers: int = 1, slopes=None, gate_rank: int | None = None, norm="layer",
                 scale: float | None = None, rngs: nnx.Rngs, **options):
        slopes = lightning_slopes(num_heads, layer, num_layers) if slopes is None else checks.check_real("slopes", slopes, ranks=(1,))
        options = {"output_norm": partial(AcrossHeads, kind=norm, heads=num_heads)} | options
        super().__init__(features, num_heads, mechanism=recurrent(log_decay=-slopes, scale=scale), rngs=rngs, **options)
        self.gate = LowRankGate(features, gate_rank or self.head_size, num_heads, self.value_size, dtype=self.dtype,
                                param_dtype=options.get("param_dtype", jnp.float32), rngs=rngs)

    def _query(self, x):
        return jax.nn.silu(super()._query(x))

    def _key_value(self, context):
        return tuple(map(jax.nn.silu, super()._key_value(context)))
