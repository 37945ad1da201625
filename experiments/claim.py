"""Puts what a paper claims to the test: a table, a figure and a verdict."""

import dataclasses
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnx import catalogue
from attnx.cli import UsageError
from experiments import evidence
from experiments.options import parse
from experiments.progress import Meter

_STYLES = {"held": "green", "refuted": "red", "inconclusive": "yellow"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Runs the experiment of a paper with several seeds and says whether its claim held, by the rule that experiments/evidence.py states.

    Ends with a table, a figure and the verdict, recorded in --out. Stopped and called again, it goes on with the next seed.
    """

    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """The paper, see `attnx list`."""
    smoke: bool = False
    """The same code in seconds; what it finds means nothing, and is recorded in runs/smoke-claims unless --out says otherwise."""
    seeds: int | None = None
    """Number of seeds; by default what the claim asks for."""
    out: Path | None = None
    """Folder of the results; by default that of the repository, experiments/results."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``claim``."""
    options = parse(Options, program, arguments)
    claim = evidence.load(options.id)
    if options.seeds is not None and options.seeds < 2:
        raise UsageError(f"--seeds: expected 2 or more, got {options.seeds}: one seed tells nothing about spread")
    out = options.out or (Path("runs/smoke-claims") if options.smoke else evidence.RESULTS)
    console = Console()
    console.print(f"[bold]{escape(catalogue.paper(claim.id).reference)}[/]\n\n{escape(claim.statement)}\n", highlight=False)
    show(claim, test(claim, out, console, smoke=options.smoke, seeds=options.seeds or (1 if options.smoke else claim.seeds)), console)
    console.print(f"Numbers and figure are in {out / claim.id}.json and .png", highlight=False)
    return 0


def test(claim: evidence.Claim, out: Path, console: Console, *, smoke: bool = False, seeds: int = 3) -> dict[str, Any]:
    """Runs what has not been run of a claim, draws it and returns its record."""
    fingerprint = evidence.fingerprint(claim)
    record = evidence.read(claim.id, out)
    if record is None or record["fingerprint"] != fingerprint or record["smoke"] != smoke:
        record = {"id": claim.id, "fingerprint": fingerprint, "smoke": smoke, "seconds": 0.0, "seeds": []}
    jax.config.update("jax_disable_most_optimizations", smoke)  # a smoke spends its time in the compiler
    with Meter(seeds, console) as meter:
        for seed in range(len(record["seeds"]), seeds):
            began = time.monotonic()
            meter.at(seed, f"{claim.id}: seed {seed}")
            trial = evidence.Trial(seed, smoke, lambda share, text, seed=seed: meter.at(seed + share, f"{claim.id}: seed {seed}, {text}"))
            measured = jax.tree.map(_plain, dict(claim.run(trial)))
            jax.clear_caches()  # another seed may have closed over other arrays
            seconds = record["seconds"] + time.monotonic() - began
            record |= {"seeds": [*record["seeds"], measured], "seconds": round(seconds, 1), "environment": _environment()}
            evidence.write(claim.id, record, out)
    found = evidence.findings(claim, record["seeds"][:seeds])
    record |= {"verdict": evidence.verdict(found), "findings": [finding._asdict() for finding in found]}
    evidence.write(claim.id, record, out)
    draw(claim, record, out / f"{claim.id}.png")
    return record


def show(claim: evidence.Claim, record: dict[str, Any], console: Console) -> None:
    """Prints the table, the criteria and the verdict."""
    titles, rows = claim.table
    table = Table(title=f"Mean ± standard deviation over {len(record['seeds'])} seeds, {record['seconds']:.0f} s", title_justify="left")
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left")
    for title, cells in cells_of(claim, record):
        table.add_row(title, *cells)
    console.print(table)
    for finding in record["findings"]:
        style = _STYLES[finding["verdict"]]
        console.print(f"[{style}]{finding['verdict']:>12}[/]  {escape(finding['text'])}: margin {finding['mean']:.3g}, "
                      f"{finding['low']:.3g} to {finding['high']:.3g}", highlight=False)
    smoke = " (a smoke: it means nothing)" if record["smoke"] else ""
    console.print(f"[bold {_STYLES[record['verdict']]}]{record['verdict']}[/]{smoke}")


def cells_of(claim: evidence.Claim, record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The rows of the claim's table."""
    return [(title, [_cell([seed[name] for seed in record["seeds"]]) if name else "" for name in names]) for title, names in claim.table[1].items()]


def draw(claim: evidence.Claim, record: dict[str, Any], file: Path) -> None:
    """Writes the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    claim.draw(figure, record["seeds"])
    figure.suptitle(f"{claim.id}: {record['verdict']}{' (smoke)' if record['smoke'] else ''}")
    figure.savefig(file, dpi=100)


def _cell(values):
    mean, spread = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    digits = max(0, 3 - int(np.floor(np.log10(max(abs(mean), spread, 1e-9)))) - 1) if np.isfinite(mean) else 3
    return f"{mean:.{min(digits, 6)}f} ± {spread:.{min(digits, 6)}f}" if spread else f"{mean:.{min(digits, 6)}f}"


def _plain(x):
    return np.asarray(x).tolist()


def _environment():
    return {"jax": jax.__version__, "python": platform.python_version(), "backend": jax.default_backend(), "cores": os.cpu_count()}
