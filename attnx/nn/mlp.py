"""The feed-forward half of a transformer block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnx.nn.common import check_sequence, constrain, logical_axes, rows


class MLP(nnx.Module):
    """A position-wise network of one hidden layer, optionally gated.

        gated:   (activation(x W_gate) * x W_up) W_down        (SwiGLU with SiLU, GEGLU with GELU)
        plain:   activation(x W_up) W_down

    Source of the gated form: Noam Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.

    Args:
      features: size of input and output.
      hidden_features: size of the hidden layer.
      activation: elementwise function.
      gated: whether a second projection gates the first.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, rngs: as in ``nnx.Linear``.
      out_kernel_init: initialiser of W_down; by default ``kernel_init``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> MLP(8, 16, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 8))).shape
      (1, 3, 8)
    """

    def __init__(self, features: int, hidden_features: int, *, activation: Callable = jax.nn.silu, gated: bool = True,
                 use_bias: bool = False, dtype=None, param_dtype=jnp.float32, precision=None,
                 kernel_init=nnx.initializers.lecun_normal(), bias_init=nnx.initializers.zeros_init(), out_kernel_init=None,
                 rngs: nnx.Rngs):
        def project(inputs, outputs, axes, init=kernel_init):
            return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, precision=precision,
                              kernel_init=init, bias_init=bias_init, kernel_metadata=logical_axes(*axes),
                              bias_metadata=logical_axes(axes[-1]), rngs=rngs)

        self.features, self.activation = features, activation
        self.up = project(features, hidden_features, ("embed", "mlp"))
        self.gate = project(features, hidden_features, ("embed", "mlp")) if gated else nnx.data(None)
        self.down = project(hidden_features, features, ("mlp", "embed"), out_kernel_init or kernel_init)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """[B, T, features] -> [B, T, features]."""
        check_sequence("x", x, self.features)
        tokens = rows(x)
        hidden = self.up(tokens)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(tokens)) * hidden
        return self.down(constrain(hidden, "batch", "sequence", "mlp")).reshape(x.shape)
