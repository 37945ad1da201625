"""Agent attention: a few pooled queries attend to all keys, and all queries to what these found.

Han, Ye, Han, Xia, Pan, Wan, Song, Huang: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024, arXiv 2312.08874):

    U   = softmax(scale A K^T + b_in) V                 M agents A = pooled queries; a softmax over all keys
    out = softmax(scale Q A^T + b_out) U + DWC(V)       a softmax over the agents; and a depthwise convolution of the values

Both are softmax attention, together O(T M) instead of O(T^2): linear attention whose feature maps are softmaxes. The weights between tokens are of rank M at most,
which the convolution makes up for. Biases are factorised: a small map a head and agent, resized to the image, and one number a row and column. Made for images;
every agent sees all of them, so it is not causal. Pretrained softmax attention can run this way without training, :func:`agent_patch`.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks
from attnx.core.attention import attention
from attnx.core.pooling import adaptive_average_pool, pool_bins
from attnx.nn.common import check_sequence, logical_axes
from attnx.scores.bias import bias
from pallas_kernels.parts import part, static
from pallas_kernels.tile import accumulator_dtype

MAP = 7  # side of the small maps that biases are resized from


def agent_attention(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K Hv"], agents: Float[Array, "B M N H"], *,
                    bias_in: Float[Array, "N M S"] | None = None, bias_out: Float[Array, "N T M"] | None = None, key_positions: Int[Array, "*B S"] | None = None,
                    agent_mask: Bool[Array, "B M"] | None = None, scale: float | None = None, scale_out: float | None = None, implementation: str | None = None,
                    block_sizes=None) -> Float[Array, "B T N Hv"]:
    """Attention of agents to keys, and of queries to agents.

    ::

        out_t = sum over m of softmax_m(scale_out q_t . a_m + bias_out_tm)  sum over s of softmax_s(scale a_m . k_s + bias_in_ms) v_s

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] and [B, S, K, Hv], N a multiple of K.
      agents: [B, M, N, H], as a rule pooled queries, see :func:`pool_agents`.
      bias_in: real [N, M, S], added to the scores of agents and keys; sizes of 1 broadcast.
      bias_out: real [N, T, M], added to those of queries and agents.
      key_positions: int32 [S] or [B, S]; -1 is padding, unseen. Where all is padding the output is zero.
      agent_mask: booleans [B, M], which agents there are; all by default.
      scale: of the dot products, 1 / sqrt(H) by default.
      scale_out: of those of queries and agents; ``scale`` by default.
      implementation, block_sizes: as in :func:`attnx.attention`.

    Returns:
      [B, T, N, Hv] in the query's dtype.

    Raises:
      ValueError, TypeError: an argument of a wrong shape or dtype, named. NotImplementedError: a named implementation that cannot serve.

    Cost: O((T + S) M (H + Hv)) time a head, O(T + S + M) memory beyond the biases.

    Source: Dongchen Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2024, arXiv 2312.08874.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> agent_attention(x, 0 * x, x, x[:, :1])[0, :, 0, 0]  # one agent that looks everywhere
    Array([1.5, 1.5, 1.5, 1.5], dtype=float32)
    """
    query, agents = checks.check_query_key_value(query, agents)[:2]
    if agents.shape[2] != query.shape[2]:
        raise ValueError(f"agents: expected the {query.shape[2]} heads of query, got {checks.describe(agents)}")
    common = dict(implementation=implementation, block_sizes=block_sizes)
    scores = lambda array: () if array is None else bias(array)
    found = attention(agents, key, value, scores=scores(bias_in), scale=scale, key_positions=key_positions, **common)
    places = None
    if agent_mask is not None:
        if jnp.shape(agent_mask) != agents.shape[:2]:
            raise ValueError(f"agent_mask: expected booleans {list(agents.shape[:2])}, got {checks.describe(agent_mask)}")
        places = jnp.where(agent_mask, 0, -1).astype(jnp.int32)
    return attention(query, agents, found, scores=scores(bias_out), scale=scale if scale_out is None else scale_out, key_positions=places, **common)


def pool_agents(query: Float[Array, "B T N H"], agents: int, *, grid: tuple[int, int] | None = None, seen: Bool[Array, "B T"] | None = None):
    """Agents as averages of queries: of contiguous bins of a sequence, or of an image's.

    Args:
      query: [B, T, N, H].
      agents: M, a square number for images.
      grid: (h, w) with h w = T for images, whose rows and columns are cut into sqrt(M) bins each; None for sequences.
      seen: booleans [B, T] for sequences, which tokens count.

    Returns:
      [B, M, N, H]; with ``seen`` a pair with booleans [B, M], the bins of which something is seen.

    Raises:
      ValueError: numbers that do not fit.

    >>> import jax.numpy as jnp
    >>> pool_agents(jnp.arange(4.0).reshape(1, 4, 1, 1), 2)[0, :, 0, 0]
    Array([0.5, 2.5], dtype=float32)
    """
    b, t, *rest = query.shape
    checks.check_integer("agents", agents, least=1)
    if grid is not None:
        side = math.isqrt(agents)
        if side**2 != agents or math.prod(grid) != t or seen is not None:
            raise ValueError(f"grid: expected (h, w) with h w = {t}, a square number of agents and no seen, got {grid} and {agents} agents")
        return adaptive_average_pool(query.reshape(b, *grid, *rest), (side, side)).reshape(b, agents, *rest)
    if seen is None:
        return adaptive_average_pool(query, (agents,))
    dtype = accumulator_dtype(query.dtype)
    shares = jnp.asarray(pool_bins(t, agents), dtype) * seen[:, None].astype(dtype)
    count = shares.sum(-1)
    pooled = jnp.einsum("bmt,btnh->bmnh", shares / jnp.maximum(count, 1)[..., None], jnp.where(seen[..., None, None], query.astype(dtype), 0))
    return pooled.astype(query.dtype), count > 0


@part
class AgentPatch:
    """See :func:`agent_patch`."""

    agents: int | float = static(default=0.25)
    k_scale2: float = static(default=0.3)
    k_shortcut: float = static(default=0.075)
    implementation: str | None = static(default=None)

    def __call__(self, query, key, value, *, query_positions=None, key_positions=None, segment_ids=None, dropout_key=None):
        if segment_ids is not None:
            raise NotImplementedError("segment_ids: agents see all tokens of a row; give each document a row of its own")
        b, length, heads, size = query.shape
        agents = max(int(self.agents * length), 1) if isinstance(self.agents, float) else self.agents
        if 2 * agents >= length:
            return attention(query, key, value, query_positions=query_positions, key_positions=key_positions, implementation=self.implementation)
        if value.shape[1] != length:
            raise ValueError(f"value: expected the {length} tokens of query for the shortcut, got {checks.describe(value)}")
        seen = jnp.ones((b, length), bool) if query_positions is None else jnp.broadcast_to(query_positions, (b, length)) >= 0
        pooled, mask = pool_agents(query, agents, seen=seen)
        out = agent_attention(query, key, value, pooled, agent_mask=mask, key_positions=key_positions, scale_out=size ** (-0.5 * self.k_scale2),
                              implementation=self.implementation)
        return out + jnp.asarray(self.k_shortcut, out.dtype) * jnp.repeat(value, heads // value.shape[2], axis=2)

    def init(self, batch, max_length, kv_heads, key_size, value_size, dtype):
        """There is no causal form: refused."""
        raise NotImplementedError("init: agents see the whole sequence, so there is no streaming form")

    step = init


def agent_patch(agents: int | float = 0.25, *, k_scale2: float = 0.3, k_shortcut: float = 0.075, implementation: str | None = None) -> AgentPatch:
    """Agent attention for self-attention that was trained without it, as an :class:`attnx.Mechanism` for :func:`attnx.nn.set_mechanism`.

    ::

        out = softmax(H^(-k_scale2 / 2) Q A^T) softmax(H^(-1/2) A K^T) V + k_shortcut V

    The larger second scale makes queries choose among agents more sharply, and the shortcut gives back what is of full rank. Agents are means of contiguous
    queries, which is what merging the tokens and projecting these gives.

    Args:
      agents: M, or a share of the tokens. Where 2 M >= T the attention is the full one.
      k_scale2, k_shortcut: the constants above; the paper's are those for Stable Diffusion.
      implementation: as in :func:`attnx.attention`.

    Raises:
      ValueError: agents that are neither a number of at least 1 nor a share. In calls, cross-attention that would need a shortcut.

    >>> import attnx, jax.numpy as jnp
    >>> from attnx.nn import Attention, set_mechanism
    >>> layer = Attention(16, 2, mechanism=attnx.pairs(), rngs=nnx.Rngs(0))
    >>> set_mechanism(layer, agent_patch(0.25))
    1
    >>> layer(jnp.ones((1, 20, 16))).shape
    (1, 20, 16)
    """
    if isinstance(agents, float) and not 0 < agents < 1 or not isinstance(agents, float) and checks.check_integer("agents", agents, least=1) < 1:
        raise ValueError(f"agents: expected a share between 0 and 1 or a number, got {agents}")
    return AgentPatch(agents, float(k_scale2), float(k_shortcut), implementation)


class AgentAttention(nnx.Module):
    """Multi-head :func:`agent_attention` of an image's tokens, with factorised biases and a depthwise convolution of the values.

    ::

        out = (agent_attention(x W_q, x W_k, x W_v, pool(x W_q), b_in, b_out) + DWC(x W_v)) W_o
        b_in = resize(map) + row + column  [M, h w],        b_out likewise [h w, M]

    Args:
      features, num_heads: D and N.
      grid: (h, w), so many tokens in rows; a class token comes before them.
      agents: M, a square number.
      cls_token: whether there is a class token, which is neither pooled nor convolved and has a bias of its own for each agent.
      kernel_size: of the convolution; None for none.
      use_bias: of the projections of queries, keys and values (the output has one).
      biased: whether there are biases of agents.
      implementation: as in :func:`attnx.attention`.
      dtype, param_dtype: of the computation and of the parameters.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> layer = AgentAttention(32, 4, grid=(6, 5), agents=4, cls_token=True, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 31, 32))).shape
    (1, 31, 32)
    """

    def __init__(self, features: int, num_heads: int, *, grid: tuple[int, int], agents: int = 49, cls_token: bool = False, kernel_size: int | None = 3,
                 use_bias: bool = False, biased: bool = True, implementation: str | None = None, dtype: Any = None, param_dtype: Any = jnp.float32,
                 rngs: nnx.Rngs):
        if features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        if math.isqrt(checks.check_integer("agents", agents, least=1)) ** 2 != agents:
            raise ValueError(f"agents: expected a square number, got {agents}")
        self.features, self.num_heads, self.grid, self.agents = features, num_heads, tuple(grid), agents
        self.cls_token, self.implementation = cls_token, implementation
        size = features // num_heads
        dense = partial(nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        project = lambda: dense(features, (num_heads, size), use_bias=use_bias, kernel_metadata=logical_axes("embed", "heads", "head_size"),
                                bias_metadata=logical_axes("heads", "head_size"))
        self.query, self.key, self.value = project(), project(), project()
        self.out = dense((num_heads, size), features, axis=(-2, -1), kernel_metadata=logical_axes("heads", "head_size", "embed"),
                         bias_metadata=logical_axes("embed"))
        self.convolution = nnx.data(None)
        if kernel_size is not None:
            self.convolution = nnx.Conv(features, features, (kernel_size, kernel_size), feature_group_count=features, dtype=dtype, param_dtype=param_dtype,
                                        rngs=rngs)
        self.bias_in = AgentBias(num_heads, agents, self.grid, cls_token, param_dtype=param_dtype, rngs=rngs) if biased else nnx.data(None)
        self.bias_out = AgentBias(num_heads, agents, self.grid, cls_token, param_dtype=param_dtype, rngs=rngs) if biased else nnx.data(None)

    def __call__(self, x: Float[Array, "B T D"], *, positions=None, segment_ids=None, dropout_key=None, hooks=None, layer=0) -> Float[Array, "B T D"]:
        """[B, T, features] -> [B, T, features], T = h w and one more with a class token.

        Called like :class:`attnx.nn.Attention`; images have neither padding nor documents nor dropout nor hooks here.

        Raises:
          ValueError: another number of tokens. NotImplementedError: positions, segment_ids or hooks.
        """
        check_sequence("x", x, self.features)
        for name, given in (("positions", positions), ("segment_ids", segment_ids), ("hooks", hooks or None)):
            if given is not None:
                raise NotImplementedError(f"{name}: expected None, an image has neither padding nor documents")
        first = int(self.cls_token)
        if x.shape[1] != math.prod(self.grid) + first:
            raise ValueError(f"x: expected {math.prod(self.grid) + first} tokens for the grid {self.grid}, got {checks.describe(x)}")
        query, key, value = self.query(x), self.key(x), self.value(x)
        pooled = pool_agents(query[:, first:], self.agents, grid=self.grid)
        bias_in, bias_out = (None, None) if self.bias_in is None else (self.bias_in(), jnp.swapaxes(self.bias_out(), 1, 2))
        out = agent_attention(query, key, value, pooled, bias_in=bias_in, bias_out=bias_out, implementation=self.implementation)
        if self.convolution is not None:
            image = value[:, first:].reshape(x.shape[0], *self.grid, self.features)
            out = out.at[:, first:].add(self.convolution(image).reshape(value[:, first:].shape).astype(out.dtype))
        return self.out(out)


class AgentBias(nnx.Module):
    """A bias for each pair of an agent and a token, [N, M, T]: a small map resized to the image, and numbers for rows, columns and the class token.

    Args:
      num_heads, agents, grid, cls_token: as in :class:`AgentAttention`.
      param_dtype, rngs: of the parameters, truncated normal numbers of deviation 0.02.

    >>> AgentBias(2, 4, (5, 6), True, rngs=nnx.Rngs(0))().shape
    (2, 4, 31)
    """

    def __init__(self, num_heads: int, agents: int, grid: tuple[int, int], cls_token: bool, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        draw = lambda *shape: nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (num_heads, agents, *shape), param_dtype))
        self.grid = grid
        self.map, self.row, self.column = draw(MAP, MAP), draw(grid[0], 1), draw(1, grid[1])
        self.token = draw(1) if cls_token else nnx.data(None)

    def __call__(self) -> Float[Array, "N M T"]:
        """[N, M, T], the class token first."""
        shape = self.map.shape[:2]
        resized = jax.image.resize(self.map[...], (*shape, *self.grid), "bilinear", antialias=False)
        image = (resized + self.row[...] + self.column[...]).reshape(*shape, -1)
        return image if self.token is None else jnp.concatenate([self.token[...], image], axis=2)
