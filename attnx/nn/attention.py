"""Multi-head attention around any mechanism: projections, positions, norms, gate, caches and hooks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.mechanism import Mechanism
from attnx.nn.common import check_sequence, constrain, logical_axes, rows
from attnx.nn.frozen import hold, release
from attnx.nn.hooks import Hooks, at_heads, bind_hooks, pair_hooks
from attnx.nn.norms import make_norm


class SelfState(NamedTuple):
    """What a self-attention layer remembers between steps; constant in shape."""

    position: jax.Array  # int32 [], the position of the next token
    mechanism: Any  # the mechanism's own state


class CrossState(NamedTuple):
    """What a cross-attention layer remembers between steps: its context, projected once."""

    position: jax.Array  # int32 [], the position of the next query
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, Hv]
    key_positions: jax.Array | None  # [S] or [B, S]


class Attention(nnx.Module):
    """Multi-head attention that is handed its mechanism.

    ::

        q, k, v = x W_q, c W_k, c W_v                                      c: the context, or x itself
        out     = sum over heads n of  (gate(x) * norm(mechanism(position(norm(q), norm(k)), v)))_n W_o,n

    Self-attention where the call is given no context, cross-attention where it is; causal or not as the mechanism is. Costs
    O(T D (N + K) H) and what the mechanism costs.

    Sources: multi-head attention, Ashish Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; shared key-value heads, Joshua
    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023, arXiv:2305.13245; query-key
    norm, Mostafa Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023, arXiv:2302.05442; output gates, Zihan Qiu
    et al., "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", 2025, arXiv:2505.06708.

    Args:
      features: D, size of the input.
      num_heads: N, query heads.
      mechanism: how queries, keys and values become outputs: an :class:`attnx.Mechanism` of any engine, or a constructor
        ``(rngs=...) -> Mechanism`` for one that owns parameters (an ``nnx.Module`` whose methods build their parts from them). Arrays
        inside a mechanism that is no module are kept, but not trained.
      head_size: H of queries and keys; by default ``features // num_heads``.
      value_size: Hv of values; by default H.
      num_kv_heads: K, key and value heads; a divisor of N, by default N. Grouped (K < N) or multi-query (K = 1) attention.
      context_features: size of the context in cross-attention; by default D.
      out_features: size of the output; by default D.
      position: a transform ``(query, key, query_positions, key_positions) -> (query, key)``, e.g. ``attnx.positions.Rotary()``.
      qk_norm: norm of each head's queries and keys, before the positions: 'rms', 'layer', a constructor, or None.
      output_norm: norm of what each head found, before the gate: as ``qk_norm``.
      output_gate: 'head' or 'channel': the outputs are multiplied by ``sigmoid(x W_g)``, one gate a head or a channel.
      use_bias: whether the projections have biases.
      dtype: of the computation; by default inferred from inputs and parameters.
      param_dtype: of the parameters.
      precision: of the matrix products, see ``jax.lax.Precision``.
      kernel_init, bias_init: initialisers of the projections.
      out_kernel_init: initialiser of the output projection; by default ``kernel_init``.
      rngs: the generator of initial values.

    Raises:
      ValueError, TypeError: an option of a wrong kind, named.

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.positions import Rotary
      >>> causal = attnx.pairs(mask=attnx.masks.causal())
      >>> layer = Attention(64, num_heads=8, num_kv_heads=2, mechanism=causal, position=Rotary(), rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 10, 64))
      >>> y = layer(x)
      >>> state = layer.init_state(batch=1, max_length=10)
      >>> state, first = layer.step(state, x[:, :9])  # prefill
      >>> state, last = layer.step(state, x[:, 9:])  # decode
      >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), y, atol=1e-5))
      True
    """

    def __init__(self, features: int, num_heads: int, *, mechanism: Mechanism | Callable[..., Mechanism], head_size: int | None = None,
                 value_size: int | None = None, num_kv_heads: int | None = None, context_features: int | None = None,
                 out_features: int | None = None, position: Callable | None = None, qk_norm: str | Callable[..., nnx.Module] | None = None,
                 output_norm: str | Callable[..., nnx.Module] | None = None, output_gate: str | None = None, use_bias: bool = False,
                 dtype=None, param_dtype=jnp.float32, precision=None,
                 kernel_init=nnx.initializers.lecun_normal(), bias_init=nnx.initializers.zeros_init(), out_kernel_init=None,
                 rngs: nnx.Rngs):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        if head_size is None:
            if features % num_heads:
                raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}; or state head_size")
            head_size = features // num_heads
        value_size = value_size or head_size
        self.features, self.num_heads, self.num_kv_heads = features, num_heads, num_kv_heads
        self.head_size, self.value_size = head_size, value_size
        self.context_features = context_features or features
        self.dtype = dtype

        def project(inputs, outputs, axes, bias_axes, init=kernel_init, bias=use_bias, contract=-1):
            return nnx.LinearGeneral(inputs, outputs, axis=contract, use_bias=bias, dtype=dtype, param_dtype=param_dtype,
                                     precision=precision, kernel_init=init, bias_init=bias_init,
                                     kernel_metadata=logical_axes(*axes), bias_metadata=logical_axes(*bias_axes), rngs=rngs)

        kv = ("kv_heads", "head_size")
        self.query = project(features, (num_heads, head_size), ("embed", "heads", "head_size"), ("heads", "head_size"))
        self.key = project(self.context_features, (num_kv_heads, head_size), ("embed", *kv), kv)
        self.value = project(self.context_features, (num_kv_heads, value_size), ("embed", *kv), kv)
        self.out = project((num_heads, value_size), out_features or features, ("heads", "head_size", "embed"), ("embed",),
                           init=out_kernel_init or kernel_init, contract=(-2, -1))
        self.query_norm = self.key_norm = self.output_norm = self.gate = nnx.data(None)
        norm = dict(axis="head_size", dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if qk_norm is not None:
            self.query_norm, self.key_norm = make_norm(qk_norm, head_size, **norm), make_norm(qk_norm, head_size, **norm)
        if output_norm is not None:
            self.output_norm = make_norm(output_norm, value_size, **norm)
        if output_gate is not None:
            if output_gate not in ("head", "channel"):
                raise ValueError(f"output_gate: expected 'head', 'channel' or None, got {output_gate!r}")
            width = 1 if output_gate == "head" else value_size
            self.gate = project(features, (num_heads, width), ("embed", "heads", None), ("heads", None))
        if isinstance(mechanism, type) or not hasattr(mechanism, "step"):
            if not callable(mechanism):
                raise TypeError("mechanism: expected a Mechanism (see attnx.mechanism) or a constructor (rngs=...) -> Mechanism, "
                                f"got {type(mechanism).__name__} {mechanism!r}")
            mechanism = mechanism(rngs=rngs)
        self.mechanism, self.position = hold(mechanism), hold(position)

    def extras(self, x: Float[Array, "B T D"]) -> dict[str, Array]:
        """What else the mechanism is handed, by name, made of the input: nothing here. Subclasses say (gates, decays, ...)."""
        return {}

    def __call__(self, x: Float[Array, "B T D"], context: Float[Array, "B S E"] | None = None, *, positions: Int[Array, "*B T"] | None = None,
                 context_positions: Int[Array, "*B S"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                 dropout_key: Array | None = None, hooks: Hooks | None = None, layer=0) -> Float[Array, "B T E"]:
        """Attends from ``x`` to ``context``, or to itself.

        Args:
          x: [B, T, D].
          context: [B, S, context_features], the keys and values of cross-attention; None for self-attention.
          positions: int32 [T] or [B, T], logical positions of x (-1 marks padding); None for 0 .. T-1.
          context_positions: the same for the context.
          segment_ids: int32 [B, T], documents that do not see each other (self-attention).
          dropout_key: the key of the mechanism's dropout; None for none.
          hooks: ``{stage: hook}``, see :mod:`attnx.nn.hooks`.
          layer: the index that hooks see.

        Returns:
          [B, T, out_features].

        Raises:
          ValueError: shapes that do not fit, hooks that do not exist, segment_ids with a context.
          NotImplementedError: a hook on a stage that the mechanism does not have.
        """
        if context is None:
            context, context_positions = x, positions
        elif segment_ids is not None:
            raise ValueError("segment_ids: expected None with a context; mark padding by context_positions of -1")
        hooks = bind_hooks(hooks, layer)
        projected = self._projected(x, context, positions, context_positions, segment_ids)
        query, key, value, at = self._prepare(hooks, *projected, positions, context_positions)
        mechanism = release(self.mechanism)
        out = mechanism(query, key, value, query_positions=positions, key_positions=context_positions,
                        segment_ids=segment_ids, dropout_key=dropout_key, **self.extras(x), **pair_hooks(mechanism, hooks))
        return self._finish(hooks, out, at, x, positions)

    def init_state(self, batch: int, max_length: int, *, context: Float[Array, "B S E"] | None = None,
                   context_positions: Int[Array, "*B S"] | None = None, dtype=None) -> SelfState | CrossState:
        """The state of a layer that has seen nothing, for :meth:`step`.

        Args:
          batch: B.
          max_length: the most tokens that will be seen.
          context: [B, S, context_features] for cross-attention: projected here, once.
          context_positions: int32 [S] or [B, S], logical positions of the context.
          dtype: of the cached keys and values; by default that of the computation.

        Returns:
          A pytree of constant shape.
        """
        start = jnp.zeros((), jnp.int32)
        if context is not None:
            return CrossState(start, *self._key_value(context), context_positions)
        dtype = dtype or self.dtype or self.query.kernel.dtype
        return SelfState(start, release(self.mechanism).init(batch, max_length, self.num_kv_heads, self.head_size,
                                                             self.value_size, dtype))

    def step(self, state, x: Float[Array, "B t D"], *, hooks: Hooks | None = None, layer=0) -> tuple[Any, Float[Array, "B t E"]]:
        """Attends from the next tokens to all tokens so far, which it remembers, or to the context.

        Args:
          state: from :meth:`init_state` or the step before.
          x: [B, t, D], the next t tokens; t = 1 decodes, t > 1 prefills.
          hooks, layer: as in the call.

        Returns:
          ``(state, [B, t, out_features])``.
        """
        hooks, mechanism = bind_hooks(hooks, layer), release(self.mechanism)
        handed = self.extras(x) | pair_hooks(mechanism, hooks)
        positions = state.position + jnp.arange(x.shape[1], dtype=jnp.int32)
        if isinstance(state, CrossState):
            query, key, value, at = self._prepare(hooks, self._query(x), state.key, state.value, positions, state.key_positions)
            out = mechanism(query, key, value, query_positions=positions, key_positions=state.key_positions, **handed)
        else:
            state, query, key, value = self._next_projected(state, x)
            query, key, value, at = self._prepare(hooks, query, key, value, positions, positions)
            inner, out = mechanism.step(state.mechanism, query, key, value, **handed)
            state = state._replace(mechanism=inner)
        return state._replace(position=state.position + x.shape[1]), self._finish(hooks, out, at, x, positions)

    def _query(self, x):
        check_sequence("x", x, self.features)
        query = self._heads(self.query, x, "heads")
        return query if self.query_norm is None else self.query_norm(query)

    def _key_value(self, context) -> tuple[Array, Array]:
        check_sequence("context", context, self.context_features)
        key, value = self._heads(self.key, context, "kv_heads"), self._heads(self.value, context, "kv_heads")
        return key if self.key_norm is None else self.key_norm(key), value

    def _projected(self, x, context, positions, context_positions, segment_ids) -> tuple[Array, Array, Array]:
        """Queries, keys and values of a call, which may depend on where tokens are."""
        del positions, context_positions, segment_ids
        return self._query(x), *self._key_value(context)

    def _next_projected(self, state, x):
        """The state, and queries, keys and values of the next tokens of self-attention."""
        state, key, value = self._next_key_value(state, x)
        return state, self._query(x), key, value

    def _next_key_value(self, state, x):
        """Keys and values of the next tokens of self-attention, which may depend on what the state remembers."""
        return state, *self._key_value(x)

    def _heads(self, project, x, axis):
        heads = project(rows(x))
        return constrain(heads.reshape(*x.shape[:2], *heads.shape[-2:]), "batch", "sequence", axis, None)

    def _prepare(self, hooks, query, key, value, positions, key_positions):
        if self.position is not None:
            query, key = release(self.position)(query, key, positions, key_positions)
        at = at_heads(self.num_heads, query, key, positions, key_positions) if hooks else None
        if "qkv" in hooks:
            query, key, value = hooks["qkv"]((query, key, value), at)
        return query, key, value, at

    def _gated(self, out, x, positions):
        """What heads found, [B, T, N, Hv], as the output projection is given it."""
        del positions  # of x, as the call was given them
        return out if self.gate is None else out * jax.nn.sigmoid(self._heads(self.gate, x, "heads"))

    def _finish(self, hooks, out, at, x, positions):
        if "output" in hooks:
            out = hooks["output"](out, at)
        if self.output_norm is not None:
            out = self.output_norm(out)
        out = self.out(rows(self._gated(out, x, positions)))
        return out.reshape(*x.shape[:2], out.shape[-1])
