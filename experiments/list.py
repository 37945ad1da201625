"""Lists the papers: what is done, where it lives, and what became of its claim."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from attnx import catalogue
from attnx.cli import UsageError
from experiments import evidence
from experiments.options import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Lists the papers of the catalogue, by room; `attnx show ID` tells more of one."""

    room: str | None = None
    """Only those of a room, such as scores, linear or vision."""
    done: bool = False
    """Only those whose mechanisms are finished."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``list``."""
    options = parse(Options, program, arguments)
    papers, entries = catalogue.papers(), catalogue.entries()
    rooms = sorted({paper.room for paper in papers.values()})
    if options.room is not None and options.room not in rooms:
        raise UsageError(f"--room: expected one of {', '.join(rooms)}, got {options.room}")
    table = Table(title=f"{len(entries)} of {len(papers)} papers are done", title_justify="left")
    for column in ("id", "room", "year", "title", "status"):
        table.add_column(column)
    for room in rooms if options.room is None else [options.room]:
        for paper in papers.values():
            if paper.room == room and (paper.id in entries or not options.done):
                table.add_row(paper.id, room, str(paper.year), paper.title, _status(paper.id, entries))
    Console().print(table)
    return 0


def _status(id, entries):
    record = evidence.read(id)
    return "not yet" if id not in entries else record["verdict"] if record and "verdict" in record else "done"
