"""A progress bar with the time left; where the output is no terminal, a line now and then."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

_LINE_EVERY = 15.0  # seconds


class Meter:
    """Progress through a job of known size.

    Args:
      total: the size of the job, in any unit.
      console: where to show it.
    """

    def __init__(self, total: float, console: Console):
        self.total, self.console = total, console
        self._done = self._skipped = 0.0
        self._started = self._shown = time.monotonic()
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"),
                             console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, left="")

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def skip(self, done: float) -> None:
        """Goes to ``done`` without having worked for it: that part was done before."""
        self._skipped += done - self._done
        self.at(done, "")

    def at(self, done: float, text: str) -> None:
        """Shows how much of the job is done and what is going on."""
        self._done = done
        left = self._left()
        self._bar.update(self._task, completed=done, description=text, left=left)
        now = time.monotonic()
        if text and not self.console.is_terminal and now - self._shown > _LINE_EVERY:
            self._shown = now
            self.console.print(f"{done / self.total:4.0%}  {text}  {left}", highlight=False)

    def _left(self):
        worked = self._done - self._skipped
        if worked <= 0:
            return ""
        seconds = round((time.monotonic() - self._started) * (self.total - self._done) / worked)
        return f"{seconds // 60}:{seconds % 60:02} left"
