"""Puts every claim to the test that has changed since it last was, and writes the results as one page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from attnx import catalogue
from attnx.cli import UsageError
from experiments import evidence
from experiments.claim import cells_of, show, test
from experiments.markdown import table
from experiments.options import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Tests the claims whose code has changed since they were last tested, one after another, and writes experiments/RESULTS.md.

    Stopped and called again, it goes on where it was.
    """

    ids: tuple[str, ...] = ()
    """Papers to test; by default all whose claims are tested here."""
    list: bool = False
    """Only show which claims are tested here, their verdicts, and which would be run."""
    write: bool = False
    """Only write the page, from what is recorded."""
    smoke: bool = False
    """The same code in seconds, with meaningless results, in runs/smoke-claims."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``report``."""
    options, console = parse(Options, program, arguments), Console()
    ids = options.ids or tuple(evidence.known())
    if options.list:
        for id in ids:
            console.print(f"{id:40} {status(id)}", highlight=False)
        return 0
    out = Path("runs/smoke-claims") if options.smoke else evidence.RESULTS
    failed = []
    for id in () if options.write else ids:
        claim, record = evidence.load(id), evidence.read(id, out)
        if record and "verdict" in record and record["smoke"] == options.smoke and record["fingerprint"] == evidence.fingerprint(claim):
            continue
        console.rule(escape(id), style="dim")
        try:
            show(claim, test(claim, out, console, smoke=options.smoke, seeds=1 if options.smoke else claim.seeds), console)
        except Exception:  # the other claims are to be tested all the same
            console.print_exception(show_locals=False)
            failed.append(id)
    if not options.smoke:
        page = Path(__file__).parent / "RESULTS.md"
        page.write_text(results(), encoding="utf-8")
        console.print(f"Written to {page}", highlight=False)
    if failed:
        raise UsageError(f"could not be tested: {', '.join(failed)}")
    return 0


def status(id: str) -> str:
    """The verdict on record, and whether it is still that of the code."""
    record = evidence.read(id)
    if record is None or "verdict" not in record:
        return "not yet tested"
    return record["verdict"] + ("" if record["fingerprint"] == evidence.fingerprint(evidence.load(id)) else " (of earlier code; would be run)")


def results() -> str:
    """The page."""
    recorded = {id: record for id in evidence.known() if (record := evidence.read(id)) and "verdict" in record}
    counts = {verdict: sum(record["verdict"] == verdict for record in recorded.values()) for verdict in evidence.VERDICTS}
    rule = " ".join((evidence.__doc__ or "").split("\n\n", 1)[1].split("\n\n    ")[0].split())
    lines = ["# What the papers claim, put to the test", "",
             "Written by `python -m experiments report` from the records in `experiments/results`. Each section's experiment is `python -m experiments claim ID`.", "",
             f"{rule} `mean ± t · standard error`, t the 97.5% quantile of Student's distribution. A criterion is *held* if that interval has nothing below zero, "
             "*refuted* if it lies wholly below zero, *inconclusive* otherwise; a claim is refuted if one of its criteria is, held if all are.", "",
             "These are experiments of minutes on a laptop, not the papers': a refuted claim is refuted at this size, and a held one is held at this size.", "",
             ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".", ""]
    lines += table(("paper", "verdict", "criteria", "seeds", "time"), [
        (f"[{id}](#{id})", record["verdict"], f"{sum(f['verdict'] == 'held' for f in record['findings'])} of {len(record['findings'])} held",
         str(len(record["seeds"])), f"{record['seconds']:.0f} s") for id, record in recorded.items()], left=2)
    for id, record in recorded.items():
        lines += ["", *section(evidence.load(id), record)]
    return "\n".join(lines) + "\n"


def section(claim: evidence.Claim, record: dict) -> list[str]:
    """What the page says of a claim."""
    environment = record["environment"]
    lines = [f"## {claim.id}", "", f"{catalogue.paper(claim.id).reference}: **{record['verdict']}**.", "", claim.statement, "",
             *table(claim.table[0], [(title, *cells) for title, cells in cells_of(claim, record)]), "",
             *table(("criterion", "margin", "interval", "verdict"), [
                 (f["text"], f"{f['mean']:.3g}", f"{f['low']:.3g} to {f['high']:.3g}", f["verdict"]) for f in record["findings"]])]
    return [*lines, "", f"![{claim.id}](results/{claim.id}.png)", "",
            f"{len(record['seeds'])} seeds, {record['seconds']:.0f} s on {environment['cores']} cores ({environment['backend']}), jax {environment['jax']}."]
