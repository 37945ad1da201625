"""Recurrent layers, for mechanisms that attend from a recurrent decoder."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float


class LSTMState(NamedTuple):
    """The cells and hidden states of a stack, [layers, B, features] each, in at least float32."""

    cell: Float[Array, "L B F"]
    hidden: Float[Array, "L B F"]


class StackedLSTM(nnx.Module):
    """Layers of long short-term memory.

    ::

        i, f, g, o = x_t W + h_(t-1) U + b,     c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g),     h_t = sigmoid(o) tanh(c_t)

    Sources: Sepp Hochreiter, Jürgen Schmidhuber, "Long Short-Term Memory", 1997; Felix A. Gers, Jürgen Schmidhuber, Fred Cummins, "Learning to Forget:
    Continual Prediction with LSTM", 2000. O(T) sequential steps; the products with W are taken for all T at once.

    Args:
      in_features: size of the input.
      features: size of the states.
      num_layers: how many layers.
      kernel_init: initialiser of the matrices W and U.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> state, y = StackedLSTM(3, 8, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 3)))
    >>> y.shape, state.cell.shape
    ((1, 5, 8), (2, 1, 8))
    """

    def __init__(self, in_features: int, features: int, num_layers: int = 1, *,
                 kernel_init=nnx.initializers.glorot_uniform(), rngs: nnx.Rngs):
        self.features, self.num_layers = features, num_layers
        sizes = [in_features] + [features] * (num_layers - 1)
        self.kernels = nnx.List([nnx.Param(kernel_init(rngs.params(), (size, 4 * features))) for size in sizes])
        self.recurrent = nnx.List([nnx.Param(kernel_init(rngs.params(), (features, 4 * features))) for _ in sizes])
        self.biases = nnx.List([nnx.Param(jnp.zeros(4 * features)) for _ in sizes])

    def init_state(self, batch: int, dtype=jnp.float32) -> LSTMState:
        """The state of a stack that has read nothing."""
        zeros = jnp.zeros((self.num_layers, batch, self.features), jnp.promote_types(dtype, jnp.float32))
        return LSTMState(zeros, zeros)

    def __call__(self, x: Float[Array, "B T I"], state: LSTMState | None = None, *, mask: Bool[Array, "B T"] | None = None,
                 reverse: bool = False) -> tuple[LSTMState, Float[Array, "B T F"]]:
        """Reads x [B, T, in_features]: the state after it and the top layer's hidden states [B, T, features].

        Args:
          x: the next T inputs.
          state: of what was read before; None for nothing.
          mask: booleans [B, T]; what is not there leaves the state as it is and has outputs of zero.
          reverse: whether the last input is read first; outputs stay in the order of inputs.
        """
        state = self.init_state(x.shape[0], x.dtype) if state is None else state
        keep = jnp.ones(x.shape[:2], bool) if mask is None else mask
        y, cells, hiddens = x.astype(state.hidden.dtype), [], []
        for layer in range(self.num_layers):
            kernel, recurrent, bias = (p[layer][...].astype(y.dtype) for p in (self.kernels, self.recurrent, self.biases))
            carry, y = jax.lax.scan(partial(_lstm, recurrent), (state.cell[layer], state.hidden[layer]),
                                    (jnp.swapaxes(y @ kernel + bias, 0, 1), keep.T[..., None]), reverse=reverse)
            y = jnp.swapaxes(y, 0, 1)
            cells, hiddens = [*cells, carry[0]], [*hiddens, carry[1]]
        return LSTMState(jnp.stack(cells), jnp.stack(hiddens)), y.astype(x.dtype)


def _lstm(recurrent, carry, inputs):
    """One step of one layer."""
    (cell, hidden), (x, keep) = carry, inputs
    i, f, g, o = jnp.split(x + hidden @ recurrent, 4, axis=-1)
    after = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    out = jax.nn.sigmoid(o) * jnp.tanh(after)
    return (jnp.where(keep, after, cell), jnp.where(keep, out, hidden)), jnp.where(keep, out, 0)
