"""Shows a paper: its equation, where it lives, how to try it, and the last verdict on its claim."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax

from attnx import catalogue
from attnx.cli import UsageError
from experiments import evidence
from experiments.options import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Shows what the catalogue says of a paper."""

    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """The paper, see `attnx list`."""
    bibtex: bool = False
    """Only how to cite it."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``show``."""
    options, console = parse(Options, program, arguments), Console()
    try:
        paper, entry = catalogue.paper(options.id), catalogue.entry(options.id)
    except KeyError as error:
        raise UsageError(error.args[0]) from error
    if options.bibtex:
        console.print(paper.bibtex, highlight=False, markup=False, soft_wrap=True)
        return 0
    console.print(f"[bold]{escape(paper.title)}[/]\n{escape(', '.join(paper.authors))}\n{escape(paper.source)}", highlight=False)
    if entry is None:
        console.print("\nNot here yet.")
        return 0
    console.print(f"\n{entry.equation}\n", highlight=False, markup=False)
    if entry.notes:
        console.print(f"{entry.notes}\n", highlight=False, markup=False)
    for thing in entry.objects:
        console.print(f"  {_name(thing)}{_signature(thing)}", highlight=False, markup=False, soft_wrap=True)
    example = _example(entry.objects[0])
    if example:
        console.print("\nTry it:\n")
        console.print(Syntax(example, "python", background_color="default"))
    console.print(f"\nClaim: {entry.claim}", highlight=False, markup=False)
    record = evidence.read(paper.id)
    if record is None or "verdict" not in record:
        console.print("Not yet tested here.")
        return 0
    console.print(f"Verdict: {record['verdict']}, over {len(record['seeds'])} seeds (python -m experiments claim {paper.id})", highlight=False)
    for finding in record["findings"]:
        console.print(f"  {finding['verdict']}: {finding['text']} (margin {finding['mean']:.3g}, {finding['low']:.3g} to {finding['high']:.3g})",
                      highlight=False, markup=False)
    return 0


def _name(thing):
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else repr(thing)


def _signature(thing):
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return ""
    return f"({', '.join(parameters)})"


def _example(thing):
    """The doctest of a docstring, as code."""
    lines = [line.strip() for line in (inspect.getdoc(thing) or "").splitlines()]
    return "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))
