"""The training loop: resumes, watches, records and saves; what a step does is :mod:`attnx.training.step`'s."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from attnx.training.checkpoints import Checkpoints
from attnx.training.errors import TrainingError
from attnx.training.metrics import Metrics
from attnx.training.step import TrainState


def fit(step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]], state: TrainState, batches, *, steps: int,
        checkpoints: Checkpoints, save_every: int, metrics: Metrics, extra: Any = None,
        report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
        notify: Callable[[str], None] = print, place: Callable[[Any], Any] = lambda batch: batch) -> TrainState:
    """Trains up to step ``steps``, from the last checkpoint if there is one.

    A run that was stopped at any moment, called again, takes the same steps on the same batches as one that was not: its losses
    are the same bit for bit. Checkpoints are of finite losses only.

    Args:
      step: from :func:`attnx.training.make_train_step`.
      state: the state before the first step; donated.
      batches: an iterator with ``get_state()`` and ``set_state(state)``, from :func:`attnx.training.batches`.
      steps: how many steps the whole run has.
      checkpoints: where to resume from and save to.
      save_every: steps from one checkpoint to the next; the last step has one too.
      metrics: where each step's metrics and the seconds spent so far are recorded.
      extra: what to save beside the state (JSON-able).
      report: called with the step from which training goes on and no metrics, then after each step with its number and its metrics.
      notify: called with a message where a checkpoint is damaged or resumed from.
      place: puts a batch on the devices.

    Returns:
      The state after the last step.

    Raises:
      TrainingError: for a loss or gradient that is not finite, or a checkpoint that cannot be written or read.
    """
    first, seconds = 0, 0.0
    if checkpoints.steps():
        restored = checkpoints.restore(state)
        for message in restored.damaged:
            notify(message)
        first, state, seconds = restored.step, restored.state, restored.extra["seconds"]
        batches.set_state(restored.extra["data"])
        notify(f"resuming from step {first}")
    metrics.truncate(first)
    report(first, {})
    started = time.perf_counter() - seconds

    def settle(number, values):
        """Waits for a step; meanwhile the devices are busy with the next."""
        values = {name: float(value) for name, value in values.items()}
        if not all(map(math.isfinite, values.values())):
            checkpoints.wait()
            last = [f"the last good checkpoint is {checkpoints.path / str(step)}" for step in checkpoints.steps()[-1:]]
            raise TrainingError(f"{', '.join(f'{name} = {value}' for name, value in values.items())} at step {number}; "
                                + (last or ["there is no checkpoint yet"])[0])
        metrics.write(number, {**values, "seconds": time.perf_counter() - started})
        report(number, values)
        return values["loss"]

    running = None
    for number in range(first + 1, steps + 1):
        state, values = step(state, place(next(batches)))
        if running is not None:
            settle(*running)
        running = number, values
        if number % save_every == 0 or number == steps:
            loss, running = settle(*running), None
            checkpoints.save(number, state, {"data": batches.get_state(), "seconds": time.perf_counter() - started, "run": extra}, loss=loss)
    checkpoints.wait()
    metrics.close()
    return state
