"""The training step: gradients, accumulated over parts of a batch if asked, and one update, compiled with donated buffers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """All that a run is, but its place in the data.

    Attributes:
      step: int32 [], updates made.
      params: the parameters.
      optimizer: the optimiser's state.
      key: the key from which each step's randomness is derived.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    key: jax.Array


def init_state(params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def make_train_step(loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1, shardings=None):
    """Compiles ``step(state, batch) -> (state, metrics)``.

        g = d/dparams [ sum over parts of total / sum over parts of count ],        params <- params + optimizer(g)

    The state is donated: its buffers are reused, so the state that was passed is gone.

    Args:
      loss: ``loss(params, batch, key) -> (total, count)``: the sum of the losses of the batch's predictions, and their number. For mixed
        precision let it compute in bfloat16 from float32 parameters, as a model with ``dtype=bfloat16`` does.
      optimizer: with clipping and schedule inside, see :mod:`attnx.training.optimizers`.
      accumulate: into how many parts along its first axis each batch is cut, to be evaluated one after another. Gradients add up in the
        parameters' dtype, weighted by count: the result is that of the whole batch.
      shardings: ``(of the state, of a batch)``, see :mod:`attnx.training.sharding`; None on one device.

    Returns:
      The jitted step. Its metrics are float32 scalars: ``loss``, the mean before the update, and ``grad_norm``, before clipping.

    Raises:
      ValueError: when called with a batch whose first axis is no multiple of ``accumulate``.
    """
    def total_and_count(params, batch, key):
        total, count = loss(params, batch, key)
        return total, jnp.asarray(count, jnp.float32)

    gradient = jax.value_and_grad(total_and_count, has_aux=True)

    def accumulated(params, batch, key):
        def part(carry, inputs):
            return jax.tree.map(jnp.add, carry, gradient(params, *inputs)), None

        parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(part, zeros, (parts, jax.random.split(key, accumulate)))[0]

    def step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        (total, count), grads = (gradient if accumulate == 1 else accumulated)(state.params, batch, key)
        grads = jax.tree.map(lambda g: (g / jnp.maximum(count, 1)).astype(g.dtype), grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {"loss": total / jnp.maximum(count, 1), "grad_norm": optax.tree.norm(grads)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state, state.key), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, in_shardings=tuple(shardings), out_shardings=(shardings[0], None))


def _parts(x, count):
    if x.shape[0] % count:
        raise ValueError(f"batch: expected a first axis that is a multiple of accumulate = {count}, got shape {x.shape}")
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])
