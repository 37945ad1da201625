"""Training of small models for experiments: the data are made on the device, so many updates are one compiled loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.evidence import Trial

_PIECES = 10  # into how many compiled calls a training is cut at the most, to report between them


def functional(module: nnx.Module) -> tuple[Any, Callable]:
    """A module as its parameters and a function of them.

    Returns:
      ``(params, apply)`` with ``apply(params, *args, method=None, **kwargs)``, by default the module's call.

    >>> params, apply = functional(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> apply(params, jnp.ones((1, 2))).shape
    (1, 3)
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def apply(params, *args, method: str | None = None, **kwargs):
        merged = nnx.merge(graph, params, rest)
        return (merged if method is None else getattr(merged, method))(*args, **kwargs)

    return params, apply


def fit(loss: Callable, params: Any, sample: Callable, *, steps: int, trial: Trial, learning_rate: float = 3e-3, optimizer=None,
        name: str = "training") -> Any:
    """Trains parameters.

    ::

        params <- params + optimizer(gradient of loss(params, sample(key), key))            by default Adam with weight decay 0.01, gradients cut at norm 1,
                                                                                            the rate rising over a twentieth of the steps, then a cosine

    Args:
      loss: ``loss(params, batch, key) -> scalar``.
      params: a pytree; see :func:`functional`.
      sample: ``sample(key) -> batch``, traceable.
      steps: number of updates.
      trial: gives the seed, and is told how far it is.
      learning_rate: the highest.
      optimizer: an optax transformation in place of the default.
      name: what to report.

    Returns:
      The trained parameters.
    """
    warmup = max(steps // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1), 0.02 * learning_rate)
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def update(state, key):
        params, inner = state
        data, noise = jax.random.split(key)
        value, slopes = jax.value_and_grad(loss)(params, sample(data), noise)
        changes, inner = optimizer.update(slopes, inner, params)
        return (optax.apply_updates(params, changes), inner), value

    @functools.partial(jax.jit, donate_argnums=0)
    def piece(state, keys):
        return jax.lax.scan(update, state, keys)

    size = next(steps // pieces for pieces in range(_PIECES, 0, -1) if steps % pieces == 0)  # of one length, so that one is compiled
    keys = jax.random.split(jax.random.fold_in(jax.random.key(trial.seed), 1), steps)
    state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
    for first in range(0, steps, size):
        state, values = piece(state, keys[first:first + size])
        trial.report((first + size) / steps, f"{name}: step {first + size} of {steps}, loss {np.asarray(values).mean():.3f}")
    return state[0]


def cross_entropy(logits, labels):
    """The mean over all predictions, in nats: logits [..., V], labels [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits, labels):
    """The share of predictions whose largest logit is the label's."""
    return jnp.mean(jnp.argmax(logits, -1) == labels)
