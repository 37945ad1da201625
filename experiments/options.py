"""Typed options of a command line."""

import contextlib
import io
from collections.abc import Sequence
from typing import TypeVar

import tyro

from attnx.cli import UsageError

T = TypeVar("T")


def parse(options: type[T], program: str, arguments: Sequence[str]) -> T:
    """The dataclass ``options`` from a command line; its docstrings are the help.

    Raises:
      UsageError: for a wrong option, in one line.
      SystemExit: after ``--help``.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(options, prog=program, args=list(arguments), config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_first_paragraph(errors.getvalue())} (see {program} --help)") from stop


def _first_paragraph(box: str) -> str:
    """The message of an error that is drawn as a box: its lines down to the first rule."""
    lines = []
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if text and not text.strip("─"):
            break
        if line.startswith("│"):
            lines.append(text)
    return " ".join(lines) or " ".join(box.split()) or "wrong options"
