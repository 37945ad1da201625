"""Writes docs/PAPERS.md: every paper of the catalogue, what is here of it, and what became of its claim."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path

from attnx import catalogue
from experiments import evidence
from experiments.options import parse

PAGE = Path(__file__).parent.parent / "docs" / "PAPERS.md"
ROOMS = {"scores": "what is added to, or done to, dot products", "positions": "where tokens are", "masks": "who may see whom", "weights": "how scores become weights",
         "linear": "states instead of pairs", "sparse": "pairs that the data choose", "memory": "caches and what is kept of the past",
         "mixers": "mixing without queries and keys", "vision": "attention in images", "graph": "attention over edges", "geometry": "attention in space",
         "alignment": "between a source and what is made of it", "fusion": "many inputs into few", "steering": "changing what a given model attends to",
         "objectives": "losses and training", "analysis": "reading attention", "models": "whole architectures", "kernels": "fused kernels and schedules"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes docs/PAPERS.md from the catalogue and the recorded results."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``papers``."""
    parse(Options, program, arguments)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """The page."""
    papers, entries = catalogue.papers(), catalogue.entries()
    lines = ["# The papers", "", f"Written by `python -m experiments papers`. {len(entries)} of {len(papers)} are done: their mechanisms are here, "
             "satisfy the contracts of `tests/contracts.py`, and their claims have a test in `experiments/claims` (verdicts in [RESULTS.md](../experiments/RESULTS.md)). "
             "The others are not here yet.", ""]
    for room, about in ROOMS.items():
        inside = sorted((paper for paper in papers.values() if paper.room == room), key=lambda paper: (paper.id not in entries, paper.number))
        lines += [f"## {room}: {about}", ""]
        lines += [_line(paper, entries.get(paper.id)) for paper in inside]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _line(paper, entry):
    reference = f"{paper.title} ({paper.source})"
    if entry is None:
        return f"- `{paper.id}`: {reference}. Not yet."
    record = evidence.read(paper.id)
    verdict = f"[{record['verdict']}](../experiments/RESULTS.md#{paper.id})" if record and "verdict" in record else "not yet tested"
    main = entry.objects[0]
    module = main.__module__ if inspect.isfunction(main) or inspect.isclass(main) else type(main).__module__
    return f"- **`{paper.id}`**: {reference}. `{module}.{main.__name__}`; claim {verdict}."
