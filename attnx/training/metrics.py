"""Metrics of a run, one JSON object a line."""

import json
import os
from pathlib import Path
from typing import Any

import jax

from attnx.training.errors import TrainingError


class Metrics:
    """A file of records ``{"step": 3, "loss": 1.5, ...}``, in the order of their steps. Of several processes the first alone writes it.

    Args:
      path: the file.
      tensorboard: whether to write event files for TensorBoard too, in a folder of that name beside it (needs the package tensorboardX).

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   metrics = Metrics(f'{folder}/metrics.jsonl')
      ...   for step in range(1, 5):
      ...     metrics.write(step, {'loss': 1 / step})
      ...   metrics.truncate(2)
      ...   metrics.read()
      [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike, *, tensorboard: bool = False):
        self.path = Path(path)
        self._events: Any = None
        self._writer = _tensorboard_writer() if tensorboard and jax.process_index() == 0 else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends the record of a step.

        Raises:
          TrainingError: where the file cannot be written.
        """
        if jax.process_index() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error
        if self._writer is not None:
            if self._events is None:
                self._begin(step)
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def read(self) -> list[dict[str, float]]:
        """All records; a last line that was cut short is not one."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def truncate(self, step: int) -> None:
        """Forgets what comes after ``step``, to be written again."""
        if jax.process_index() == 0 and self.path.exists():
            records = [record for record in self.read() if record["step"] <= step]
            shorter = self.path.with_suffix(".tmp")
            shorter.write_text("".join(json.dumps(record) + "\n" for record in records))
            shorter.replace(self.path)
        if self._writer is not None:
            self.close()
            self._begin(step + 1)

    def _begin(self, step):
        """Opens an event file of its own; TensorBoard forgets what earlier ones say of this step and later ones."""
        self._events = self._writer(str(self.path.parent / "tensorboard"), purge_step=step, filename_suffix=f".{step}")

    def close(self) -> None:
        """Writes what is still buffered."""
        if self._events is not None:
            self._events.close()
            self._events = None


def _tensorboard_writer():
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise TrainingError("TensorBoard files need the package tensorboardX: pip install tensorboardX") from error
    return SummaryWriter
