"""The transformer block: attention, optionally cross-attention, and a feed-forward network, each behind a norm and a residual."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.nn.common import check_sequence, constrain, dropout, rows
from attnx.nn.hooks import Hooks, split_hooks
from attnx.nn.norms import make_norm


class TransformerBlock(nnx.Module):
    """A residual block around modules that it is handed.

        pre-norm:    x <- x + dropout(f(norm(x)))
        post-norm:   x <- norm(x + dropout(f(x)))        for f = attention, cross-attention (if any), mlp

    The residual stream keeps the dtype it came with. Source of the pre-norm form: Ruibin Xiong et al., "On Layer Normalization in the
    Transformer Architecture", 2020, arXiv:2002.04745.

    Args:
      features: D, size of the residual stream.
      attention: a module called like :class:`attnx.nn.Attention`, attending within the sequence.
      mlp: a module [B, T, D] -> [B, T, D], or None for a block of attention alone. One that has a method ``step`` mixes tokens itself: it is called like ``attention``
        and has a state of its own.
      cross_attention: a module like ``attention`` that reads a context, or None.
      norm: 'rms', 'layer' or a constructor, see :func:`attnx.nn.make_norm`.
      norm_epsilon: added to the variance in 'rms' and 'layer'.
      norm_position: 'pre' or 'post'.
      dropout_rate: of what each f adds to the residual stream.
      dtype, param_dtype: of the norms.
      rngs: the generator of initial values.

    Raises:
      ValueError: for a norm or norm position that is not known, or a dropout rate outside [0, 1).

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.nn import MLP, Attention
      >>> rngs = nnx.Rngs(0)
      >>> block = TransformerBlock(16, attention=Attention(16, 4, mechanism=attnx.pairs(), rngs=rngs), mlp=MLP(16, 64, rngs=rngs), rngs=rngs)
      >>> block(jnp.ones((1, 3, 16))).shape
      (1, 3, 16)
    """

    def __init__(self, features: int, *, attention: nnx.Module, mlp: nnx.Module | None = None, cross_attention: nnx.Module | None = None,
                 norm: str | Callable[..., nnx.Module] = "rms", norm_epsilon: float = 1e-6, norm_position: str = "pre", dropout_rate: float = 0.0,
                 dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        if norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position: expected 'pre' or 'post', got {norm_position!r}")
        if not 0.0 <= dropout_rate < 1.0:
            raise ValueError(f"dropout_rate: expected a probability below 1, got {dropout_rate}")
        self.features, self.norm_position, self.dropout_rate = features, norm_position, dropout_rate

        def norm_of(part):
            return nnx.data(None) if part is None else make_norm(norm, features, epsilon=norm_epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.attention, self.attention_norm = attention, norm_of(attention)
        self.cross_attention, self.cross_norm = nnx.data(cross_attention), norm_of(cross_attention)
        self.mlp, self.mlp_norm = nnx.data(mlp), norm_of(mlp)

    def __call__(self, x: Float[Array, "B T D"], context: Float[Array, "B S E"] | None = None, *, positions: Int[Array, "*B T"] | None = None,
                 context_positions: Int[Array, "*B S"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
                 dropout_key: Array | None = None, hooks: Hooks | None = None, layer=0) -> Float[Array, "B T D"]:
        """One block over a whole sequence.

        Args:
          x: [B, T, D].
          context: [B, S, E], what cross-attention reads.
          positions, context_positions, segment_ids, layer: as for :class:`attnx.nn.Attention`.
          dropout_key: the key of all dropout in the block; None for none.
          hooks: ``{stage: hook}`` of the attention; stages named ``'cross_' + stage`` go to the cross-attention.

        Returns:
          [B, T, D] in the dtype of x.
        """
        self._check(x, context)
        hooks, cross_hooks = split_hooks(hooks)
        inner, cross, *outer = (None,) * 5 if dropout_key is None else jax.random.split(dropout_key, 5)
        x = self.attend(x, positions=positions, segment_ids=segment_ids, dropout_keys=(inner, outer[0]), hooks=hooks, layer=layer)
        if self.cross_attention is not None:
            x = self._add(x, self.cross_norm, outer[1], lambda y: self.cross_attention(
                y, context, positions=positions, context_positions=context_positions, dropout_key=cross, hooks=cross_hooks,
                layer=layer))
        if self.mlp is None:
            return x
        feed = self.mlp if not hasattr(self.mlp, "step") else lambda y: self.mlp(y, positions=positions, segment_ids=segment_ids)
        return self._add(x, self.mlp_norm, outer[2], feed)

    def attend(self, x: Float[Array, "B T D"], *, positions=None, segment_ids=None, dropout_keys=(None, None), hooks=None, layer=0) -> Float[Array, "B T D"]:
        """The first sub-layer alone: attention with its norm and its residual, [B, T, D] to the same; the keys are those inside attention and after it."""
        return self._add(x, self.attention_norm, dropout_keys[1], lambda y: self.attention(
            y, positions=positions, segment_ids=segment_ids, dropout_key=dropout_keys[0], hooks=hooks, layer=layer))

    def init_state(self, batch: int, max_length: int, *, context: Float[Array, "B S E"] | None = None,
                   context_positions: Int[Array, "*B S"] | None = None, dtype=None) -> tuple[Any, ...]:
        """The state of a block that has seen nothing: ``(attention state, cross-attention state or None)``, and that of an MLP that has one."""
        cross = None
        if self.cross_attention is not None:
            cross = self.cross_attention.init_state(batch, max_length, context=context, context_positions=context_positions,
                                                    dtype=dtype)
        mixing = () if not hasattr(self.mlp, "step") else (self.mlp.init_state(batch, max_length, dtype=dtype),)
        return self.attention.init_state(batch, max_length, dtype=dtype), cross, *mixing

    def step(self, state, x: Float[Array, "B t D"], *, hooks: Hooks | None = None, layer=0) -> tuple[tuple[Any, ...], Float[Array, "B t D"]]:
        """One block over the next tokens x [B, t, D]: ``(state, [B, t, D])``."""
        check_sequence("x", x, self.features)
        hooks, cross_hooks = split_hooks(hooks)
        own, cross, *mixing = state

        def attend(y):
            nonlocal own
            own, y = self.attention.step(own, y, hooks=hooks, layer=layer)
            return y

        def attend_context(y):
            nonlocal cross
            cross, y = self.cross_attention.step(cross, y, hooks=cross_hooks, layer=layer)
            return y

        def feed(y):
            if not mixing:
                return self.mlp(y)
            mixing[0], y = self.mlp.step(mixing[0], y)
            return y

        x = self._add(x, self.attention_norm, None, attend)
        if self.cross_attention is not None:
            x = self._add(x, self.cross_norm, None, attend_context)
        x = x if self.mlp is None else self._add(x, self.mlp_norm, None, feed)
        return (own, cross, *mixing), x

    def _add(self, x, norm, key, f):
        pre, tokens = self.norm_position == "pre", rows(x)
        change = f((norm(tokens) if pre else tokens).reshape(x.shape)).astype(x.dtype)
        y = tokens + dropout(rows(change), self.dropout_rate, key)
        return constrain((y if pre else norm(y).astype(x.dtype)).reshape(x.shape), "batch", "sequence", None)

    def _check(self, x, context):
        check_sequence("x", x, self.features)
        if (context is None) != (self.cross_attention is None):
            given, wants = ("nothing", "one") if context is None else ("one", "none: it has no cross_attention")
            raise ValueError(f"context: the block expects {wants}, got {given}")
