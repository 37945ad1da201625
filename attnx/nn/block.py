"""The transformer block: attention, optionally cross-attention, and a feed-forward network, each behind a norm and a residual."""

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.nn.common import check_sequence, constrain, dropout
from attnx.nn.norms import make_norm


class TransformerBlock(nnx.Module):
    """A residual block around modules that it is handed.

        pre-norm:    x <- x + dropout(f(norm(x)))
        post-norm:   x <- norm(x + dropout(f(x)))        for f = attention, cross-attention (if any), mlp

    The residual stream keeps the dtype it came with.

    Args:
      features: D, size of the residual stream.
      attention: a module called like :class:`attnx.nn.Attention`, attending within the sequence.
      mlp: a module [B, T, D] -> [B, T, D], or None for a block of attention alone.
      cross_attention: a module like ``attention`` that reads a context, or None.
      norm: 'rms', 'layer' or a constructor, see :func:`attnx.nn.make_norm`.
      norm_position: 'pre' or 'post'.
      dropout_rate: of what each f adds to the residual stream.
      dtype, param_dtype: of the norms.
      rngs: the generator of initial values.

    Raises:
      ValueError: for a norm or norm position that is not known, or a dropout rate outside [0, 1).
    """

    def __init__(self, features, *, attention, mlp=None, cross_attention=None, norm="rms", norm_position="pre", dropout_rate=0.0,
                 dtype=None, param_dtype=jnp.float32, rngs):
        if norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position: expected 'pre' or 'post', got {norm_position!r}")
        if not 0.0 <= dropout_rate < 1.0:
            raise ValueError(f"dropout_rate: expected a probability below 1, got {dropout_rate}")
        self.features, self.norm_position, self.dropout_rate = features, norm_position, dropout_rate

        def norm_of(part):
            return nnx.data(None) if part is None else make_norm(norm, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.attention, self.attention_norm = attention, norm_of(attention)
        self.cross_attention, self.cross_norm = nnx.data(cross_attention), norm_of(cross_attention)
        self.mlp, self.mlp_norm = nnx.data(mlp), norm_of(mlp)

    def __call__(self, x, context=None, *, positions=None, context_positions=None, segment_ids=None, dropout_key=None,
                 hooks=None, layer=0):
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
        hooks, cross_hooks = _split_hooks(hooks)
        inner, cross, *outer = (None,) * 5 if dropout_key is None else jax.random.split(dropout_key, 5)
        x = self._add(x, self.attention_norm, outer[0], lambda y: self.attention(
            y, positions=positions, segment_ids=segment_ids, dropout_key=inner, hooks=hooks, layer=layer))
        if self.cross_attention is not None:
            x = self._add(x, self.cross_norm, outer[1], lambda y: self.cross_attention(
                y, context, positions=positions, context_positions=context_positions, dropout_key=cross, hooks=cross_hooks,
                layer=layer))
        return x if self.mlp is None else self._add(x, self.mlp_norm, outer[2], self.mlp)

    def init_state(self, batch, max_length, *, context=None, context_positions=None, dtype=None):
        """The state of a block that has seen nothing: ``(attention state, cross-attention state or None)``."""
        cross = None
        if self.cross_attention is not None:
            cross = self.cross_attention.init_state(batch, max_length, context=context, context_positions=context_positions,
                                                    dtype=dtype)
        return self.attention.init_state(batch, max_length, dtype=dtype), cross

    def step(self, state, x, *, hooks=None, layer=0):
        """One block over the next tokens x [B, t, D]: ``(state, [B, t, D])``."""
        check_sequence("x", x, self.features)
        hooks, cross_hooks = _split_hooks(hooks)
        own, cross = state

        def attend(y):
            nonlocal own
            own, y = self.attention.step(own, y, hooks=hooks, layer=layer)
            return y

        def attend_context(y):
            nonlocal cross
            cross, y = self.cross_attention.step(cross, y, hooks=cross_hooks, layer=layer)
            return y

        x = self._add(x, self.attention_norm, None, attend)
        if self.cross_attention is not None:
            x = self._add(x, self.cross_norm, None, attend_context)
        return (own, cross), x if self.mlp is None else self._add(x, self.mlp_norm, None, self.mlp)

    def _add(self, x, norm, key, f):
        pre = self.norm_position == "pre"
        y = x + dropout(f(norm(x) if pre else x).astype(x.dtype), self.dropout_rate, key)
        return constrain(y if pre else norm(y).astype(x.dtype), "batch", "sequence", None)

    def _check(self, x, context):
        check_sequence("x", x, self.features)
        if (context is None) != (self.cross_attention is None):
            given, wants = ("nothing", "one") if context is None else ("one", "none: it has no cross_attention")
            raise ValueError(f"context: the block expects {wants}, got {given}")


def _split_hooks(hooks):
    """The hooks of the attention, and those of the cross-attention without their prefix."""
    own = {stage: hook for stage, hook in (hooks or {}).items() if not stage.startswith("cross_")}
    cross = {stage.removeprefix("cross_"): hook for stage, hook in (hooks or {}).items() if stage.startswith("cross_")}
    return own, cross
