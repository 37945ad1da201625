"""Results in a Markdown file, between the marks of the command that found them."""

import re
from collections.abc import Sequence
from pathlib import Path

from attnx.cli import UsageError


def replace(path: Path, command: str, lines: Sequence[str]) -> None:
    """Replaces what stands between ``<!-- begin: command -->`` and ``<!-- end: command -->``.

    Raises:
      UsageError: if the file cannot be read or lacks the marks.
    """
    begin, end = f"<!-- begin: {command} -->", f"<!-- end: {command} -->"
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"--write: cannot read {path}: {error.strerror}") from error
    if begin not in text or end not in text:
        raise UsageError(f"--write: {path} has no marks '{begin}' and '{end}'")
    path.write_text(re.sub(f"{re.escape(begin)}.*?(?={re.escape(end)})", lambda _: "\n".join([begin, "", *lines]), text, flags=re.DOTALL))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a table whose first ``left`` columns are text and whose others are numbers."""
    rule = "|---" * left + "|---:" * (len(columns) - left) + "|"
    return ["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]
