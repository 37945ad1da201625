"""Compiled temporary memory of every mechanism against the number of tokens."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from attnx import catalogue
from attnx.catalogue import PATTERNS, Case, Entry, Example
from attnx.cli import UsageError
from experiments import markdown
from experiments.options import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles the examples of the catalogue at several lengths, forward and with gradients, and shows the bytes of temporary arrays that the compiler allots, and
    the slope of their logarithm against that of the length: 1 is linear, 2 is quadratic. Nothing is run."""

    ids: tuple[str, ...] = ()
    """Papers; all by default."""
    lengths: tuple[int, ...] = (4096, 16384)
    """Numbers of tokens."""
    out: Path = Path("runs/memory.json")
    """Where the numbers go."""
    write: Path | None = None
    """A Markdown file whose part between the marks of this command is replaced by the results."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``memory``."""
    options = parse(Options, program, arguments)
    if len(set(options.lengths)) < 2 or min(options.lengths) < 1:
        raise UsageError(f"--lengths: expected two or more different positive numbers, got {' '.join(map(str, options.lengths))}")
    known = catalogue.entries()
    for id in options.ids:
        if id not in known:
            raise UsageError(f"--ids: '{id}' is not among the finished papers (attnx list --done)")
    entries = [known[id] for id in options.ids] or list(known.values())
    console = Console()
    rows = [row for entry in track(entries, "compiling", console=console) for row in measure(entry, sorted(set(options.lengths)))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1))
    lines = table(rows)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if options.write:
        markdown.replace(options.write, "attnx memory", [f"`python -m experiments memory`, jax {jax.__version__}, {jax.default_backend()}: what is chosen where nothing "
                                                         "is asked for; slopes between the first and the last length.", "", *lines, ""])
    return 0


def measure(entry: Entry, lengths: Sequence[int]) -> Iterator[dict]:
    """A row for each example with tokens and each of causal and not causal that it serves: the bytes by length, and whether its paper calls it linear."""
    for example in entry.examples:
        if "t" not in example.output:
            continue
        chosen = {pattern.split()[0]: pattern for pattern in reversed(PATTERNS) if pattern in example.patterns}
        for pattern in chosen.values() or ("",):
            row = {"id": entry.id, "example": example.name, "pattern": pattern, "linear": "t" in example.linear, "forward": {}, "gradient": {}}
            try:
                for length in lengths:
                    row["forward"][length], row["gradient"][length] = _bytes(example, pattern, length)
            except (ValueError, TypeError):  # an example of one length
                continue
            yield row


def _bytes(example: Example, pattern: str, length: int) -> tuple[int, int]:
    arrays = example.shapes(pattern or PATTERNS[0], t=length, s=length)
    real = {name: leaf for name, leaf in arrays.items() if all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(leaf))}
    others = {name: leaf for name, leaf in arrays.items() if name not in real}

    def call(real, others):
        return example.call(Case(pattern or PATTERNS[0]), **real, **others)

    def loss(real, others):
        return jnp.sum(jnp.abs(call(real, others)) ** 2)

    return tuple(jax.jit(f).lower(real, others).compile().memory_analysis().temp_size_in_bytes for f in (call, jax.value_and_grad(loss)))


def slope(sizes: dict[int, int]) -> float:
    """Of the logarithm of bytes against that of tokens, between the ends.

    >>> slope({1024: 100, 4096: 400})
    1.0
    """
    (first, low), *_, (last, high) = sorted((int(length), count) for length, count in sizes.items())
    return math.log(max(high, 1) / max(low, 1)) / math.log(last / first)


def table(rows: Sequence[dict]) -> list[str]:
    """The lines of a Markdown table."""
    columns = ("mechanism", "pattern", "paper", "forward, kB", "slope", "with gradients, kB", "slope")
    show = lambda sizes: " / ".join(f"{count / 1e3:,.0f}" for count in sizes.values())
    return markdown.table(columns, [(row["id"] + (f", {row['example']}" if row["example"] else ""), row["pattern"], "linear" if row["linear"] else "",
                                     show(row["forward"]), f"{slope(row['forward']):.2f}", show(row["gradient"]), f"{slope(row['gradient']):.2f}") for row in rows], 3)
