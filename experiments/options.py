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
    """The message of an error that is drawn as a box, or where the terminal has no such characters as text between rules under a title."""
    lines = box.splitlines()
    if any(line.startswith("│") for line in lines):
        lines = [line.strip("│ ") for line in lines if line.startswith("│")]
    else:
        rules = [index for index, line in enumerate(lines) if _is_rule(line)]
        lines = lines[rules[0] + 1:] if rules else lines
    end = next((index for index, line in enumerate(lines) if _is_rule(line)), len(lines))
    return " ".join(" ".join(lines[:end]).split()) or "wrong options"


def _is_rule(line):
    return bool(line.strip()) and not line.strip("─- ")
