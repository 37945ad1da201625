"""Metrics of a run, one JSON object a line."""

import json
import os
from pathlib import Path

from attnx.training.errors import TrainingError


class Metrics:
    """A file of records ``{"step": 3, "loss": 1.5, ...}``, in the order of their steps.

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

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends the record of a step.

        Raises:
          TrainingError: where the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}") from error

    def read(self) -> list[dict[str, float]]:
        """All records; a last line that was cut short is not one."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def truncate(self, step: int) -> None:
        """Forgets what comes after ``step``, to be written again."""
        records = [record for record in self.read() if record["step"] <= step]
        if self.path.exists():
            shorter = self.path.with_suffix(".tmp")
            shorter.write_text("".join(json.dumps(record) + "\n" for record in records))
            shorter.replace(self.path)
