"""Finds the best tile sizes of the fused kernels for a chip and keeps them in a table that the kernels read."""

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from attnx.cli import UsageError
from experiments import markdown, tune_tpu
from experiments.options import parse
from experiments.progress import Meter
from pallas_kernels import tiles, tuned

MARGIN = 0.02  # by which the best has to be better than the default, or that stays
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """Tries tile sizes of the fused kernels and writes the best to a table, which the kernels read before their defaults.

    For a TPU, which need not be there, the compiler's schedule tells them apart: the bundles (cycles) of a kernel's whole loop over its grid for each allowed pair of
    query and key, or token, or key of a cache, waiting for memory included. On a GPU the present one is timed: medians of interleaved runs, after each candidate was
    held against the definition.

    What was measured is remembered beside the table, so that a run that was interrupted goes on where it ended; a new version of the compiler or of the
    kernels is measured anew. The table is $ATTNX_TILES, or tiles.json in $ATTNX_CACHE (~/.cache/attnx); remove it to return to the defaults, and give all
    hosts of a job the same one.

    Examples: `attnx tune --chips v6e --kernels flash --head-sizes 128 --dtypes bfloat16` takes minutes, `attnx tune --chips v5e` most of an hour on one core, and
    so does `attnx tune` on a machine with a GPU.
    """

    kernels: tuple[Literal["flash", "linear", "decode"], ...] = ()
    """Which kernels: flash (attention over pairs), linear (recurrences), decode (a cache). By default all that have sizes to choose."""
    chips: Annotated[tuple[Literal["v5e", "v5p", "v6e"], ...], tyro.conf.arg(aliases=["--chip"])] = ("v5e", "v5p", "v6e")
    """For which TPUs, by schedule."""
    head_sizes: tuple[int, ...] = (64, 128, 256)
    """Sizes of a head, each for its class: up to 64, 128, 256 and so on."""
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    """Dtypes; those of equal width share an entry."""
    by: Literal["schedule", "time"] | None = None
    """What decides: the TPU compiler's schedule (needs libtpu), or time on the present GPU. By default time where there is a GPU."""
    out: Path | None = None
    """The table to write, by default the one that the kernels read."""
    write: Path | None = None
    """A Markdown file whose part between the marks of this command is replaced by the results."""
    smoke: bool = False
    """Two cheap candidates for the first chip, or the smallest call on a GPU, to see that it works."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``tune``."""
    options = parse(Options, program, arguments)
    for name in ("chips", "head_sizes", "dtypes"):
        if not getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')}: expected one or more, got none")
    if min(options.head_sizes) < 2:
        raise UsageError(f"--head-sizes: expected 2 or more, got {min(options.head_sizes)}")
    out = options.out or tuned.location()
    if out is None:
        raise UsageError("ATTNX_TILES is empty, so there is no table to write: name one with --out")
    try:
        tuned.entries(out)
    except tuned.TableError as error:
        raise UsageError(f"{error}; remove it, or choose another with --out") from error
    if (options.by or _preferred()) == "time":
        from experiments import tune_gpu

        return tune_gpu.run(options, out, Console())
    by_schedule(options, out, Console())
    return 0


def _preferred() -> str:
    import jax

    return "time" if jax.default_backend() == "gpu" else "schedule"


# By schedule ----------------------------------------------------------------------------------------------------------


def by_schedule(options: Options, out: Path, console: Console) -> list[dict[str, Any]]:
    """Compiles what was not compiled before; returns a group for each chip, kernel, head size and dtype, whose winners it writes to ``out``."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("needs the TPU compiler: pip install libtpu")
    if "float16" in options.dtypes:
        raise UsageError("--dtypes: TPU kernels compute in float32 and bfloat16, got float16")
    groups = list(_groups(options))
    ledger = Ledger(out, {"libtpu": metadata.version("libtpu"), "jax": metadata.version("jax"), "code": fingerprint()})
    jobs = [(group["chip"], job) for group in groups for job in group["jobs"]]
    with Meter(len(jobs), console) as meter:
        for n, (chip, job) in enumerate(jobs):
            if ledger.find(chip=chip, **job) is not None:
                meter.skip(n + 1)
        done = sum(ledger.find(chip=chip, **job) is not None for chip, job in jobs)
        for chip in dict.fromkeys(chip for chip, _ in jobs):
            with tune_tpu.Compiler(chip) as compiler:
                for job in (job for own, job in jobs if own == chip and ledger.find(chip=chip, **job) is None):
                    meter.at(done, f"{chip}, {title(job)}")
                    ledger.add(compiler.measure(job), chip=chip, **job)
                    done += 1
    for group in groups:
        group["rows"] = [{"sizes": job["sizes"], **_judged(group["chip"], job, ledger.find(chip=group["chip"], **job))} for job in group["jobs"]]
        group["winners"] = dict(_winners(group))
        console.print(_table(group))
    if not options.smoke:
        save(out, [_entry(group, least, row) for group in groups for least, row in group["winners"].items()])
        console.print(f"The best sizes are in {out}.", highlight=False)
    if options.write:
        _write(groups, options)
    return groups


def _groups(options: Options) -> Iterator[dict[str, Any]]:
    for chip in options.chips[:1] if options.smoke else options.chips:
        for kernel in ("decode",) if options.smoke else options.kernels or tune_tpu.KERNELS:
            candidates = tune_tpu.KERNELS[kernel].candidates
            for size in options.head_sizes[:1] if options.smoke else options.head_sizes:
                for dtype in options.dtypes[:1] if options.smoke else options.dtypes:
                    jobs = [{"kernel": kernel, "size": size, "dtype": dtype, "sizes": sizes} for sizes in (candidates[:2] if options.smoke else candidates)]
                    yield {"chip": chip, "kernel": kernel, "size": size, "dtype": dtype, "jobs": jobs}


def _judged(chip, job, found):
    """A candidate's costs by the least length that it would serve, and the share of feeding bundles and the spills of its busiest code; or its problem."""
    if "problem" in found:
        return found
    if not all(sweep["pieces"] for sweep in found["passes"].values()):
        return {"problem": "its schedule has no code that uses the matrix unit"}
    pieces = [piece for sweep in found["passes"].values() for piece in sweep["pieces"]]
    return {"costs": tune_tpu.costs(chip, **job, passes=found["passes"]), "feed": sum(p["matrix"] for p in pieces) / sum(p["bundles"] for p in pieces),
            "spills": max(piece["spills"] for piece in pieces)}


def _winners(group):
    """The best row for each length class; the default where that is as good, and none where nothing compiles."""
    for least in tune_tpu.KERNELS[group["kernel"]].lengths:
        able = [row for row in group["rows"] if "costs" in row]
        if able:
            total = lambda row: sum(row["costs"][least].values())
            best, present = min(able, key=total), next((row for row in able if _is_default(group, least, row["sizes"])), None)
            yield least, best if present is None or total(best) < (1 - MARGIN) * total(present) else present


def _is_default(group, least, sizes):
    kernel, device = f"{group['kernel']}, tpu", tune_tpu.DEVICES[group["chip"]]
    return tuned.check(kernel, sizes) == tiles.default(kernel, device, group["size"], _bytes(group["dtype"]), least)


def _entry(group, least, row):
    """As it stands in the table."""
    return {"kernel": f"{group['kernel']}, tpu", "device": tune_tpu.DEVICES[group["chip"]], "size": tuned.size_class(group["size"]), "bytes": _bytes(group["dtype"]),
            "length": least, "sizes": row["sizes"], "by": "schedule", "bundles": round(sum(row["costs"][least].values()), 3), "libtpu": metadata.version("libtpu")}


def _bytes(dtype):
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


# What is kept ---------------------------------------------------------------------------------------------------------


def fingerprint() -> str:
    """Of the code that makes the kernels and reads their schedules; tables of sizes do not count."""
    files = [*sorted((ROOT / "pallas_kernels").rglob("*.py")), *sorted((ROOT / "attnx" / "core").glob("*.py")), ROOT / "experiments" / "tune_tpu.py"]
    read = (file.read_bytes() for file in files if file.name not in ("tiles.py", "tuned.py"))
    return hashlib.sha256(b"\0".join(read)).hexdigest()[:16]


class Ledger:
    """What was measured: lines of JSON beside a table.

    Args:
      table: the table's file.
      versions: of what a measurement depends on; those of other versions are not found.
    """

    def __init__(self, table: Path, versions: dict[str, str]):
        self.file, self.versions, self._found = table.with_suffix(".measured.jsonl"), versions, {}
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {self.file}, where measurements are kept: {error}") from error
        for line in lines:
            try:
                record = json.loads(line)
                self._found[json.dumps(record["of"], sort_keys=True)] = record["found"]
            except (ValueError, KeyError, TypeError):  # a line that an interruption cut off
                continue

    def find(self, **of) -> dict[str, Any] | None:
        """What was found of a candidate."""
        return self._found.get(self._key(of))

    def add(self, found: dict[str, Any], **of) -> None:
        """Keeps what was found."""
        self._found[self._key(of)] = found
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"of": {**self.versions, **of}, "found": found}) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {self.file}: {error.strerror}") from error

    def _key(self, of):
        return json.dumps({**self.versions, **of}, sort_keys=True)


def save(file: Path, entries: list[dict[str, Any]]) -> None:
    """Puts entries into a table in the places of those for the same kernel, device and shapes, all at once."""
    place = lambda entry: tuple(entry.get(name, 0) for name in ("kernel", "device", "size", "bytes", "length"))
    merged = {place(entry): entry for entry in [*tuned.entries(file), *entries]}
    content = json.dumps({"version": tuned.VERSION, "entries": [merged[key] for key in sorted(merged)]}, indent=1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.{os.getpid()}")
        draft.write_text(content, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error


# Tables ---------------------------------------------------------------------------------------------------------------


def title(job: dict[str, Any]) -> str:
    """A candidate in words."""
    return f"{job['kernel']}, head size {job['size']}, {job['dtype']}: {show(job['sizes'])}"


def show(sizes: dict[str, Any]) -> str:
    """Sizes in short.

    >>> show({"bq": 512, "bk": 256}), show({"chunk": 128, "chunks": 8, "memory": 1})
    ('512 x 256', '8 chunks of 128')
    """
    if "bq" in sizes:
        return f"{sizes['bq']} x {sizes['bk']}" + (f", {sizes['warps']} warps, {sizes['stages']} stages" if "warps" in sizes else "")
    return f"{sizes['chunks']} chunks of {sizes['chunk']}" if "chunk" in sizes else f"up to {sizes['most']} keys"


_MARKS = "* the best, + the default"


def _columns(group):
    plan = tune_tpu.KERNELS[group["kernel"]]
    lengths = [f"T={length}" for length in plan.lengths.values()] if len(plan.lengths) > 1 else ["all"]
    return ["sizes", *plan.passes, *lengths, "ratio", "feed", "spills"]


def _cells(group):
    """A row of cells for each candidate; passes and the ratio to the default at the longest calls."""
    plan = tune_tpu.KERNELS[group["kernel"]]
    last = max(plan.lengths)
    base = next((row for row in group["rows"] if "costs" in row and _is_default(group, last, row["sizes"])), None)
    for row in group["rows"]:
        if "problem" in row:
            yield [show(row["sizes"]), row["problem"]] + [""] * (len(_columns(group)) - 2)
            continue
        totals = {least: sum(row["costs"][least].values()) for least in plan.lengths}
        marked = [f"{total:.2f}" + "*" * (group["winners"].get(least) is row) + "+" * _is_default(group, least, row["sizes"]) for least, total in totals.items()]
        ratio = f"{totals[last] / sum(base['costs'][last].values()):.2f}" if base else ""
        yield [show(row["sizes"]), *(f"{n:.2f}" for n in row["costs"][last].values()), *marked, ratio, f"{row['feed']:.0%}", f"{row['spills']:,}"]


def _heading(group):
    return f"{group['chip']}, {group['kernel']}, head size {group['size']}, {group['dtype']}"


def _table(group):
    problems = [f"{show(row['sizes'])}: {row['problem']}" for row in group["rows"] if "problem" in row]
    table = Table(title=f"{_heading(group)}: bundles per {tune_tpu.KERNELS[group['kernel']].unit}", caption="\n".join([*problems, _MARKS]), box=box.SIMPLE, padding=0)
    for n, name in enumerate(_columns(group)):
        table.add_column(name, justify="right" if n else "left", no_wrap=n == 0)
    for row, cells in zip(group["rows"], _cells(group)):
        if "problem" not in row:
            table.add_row(*cells, style="bold" if row in group["winners"].values() else None)
    return table


def _write(groups, options):
    asked = [(name, getattr(options, name)) for name in ("kernels", "chips", "head_sizes", "dtypes")]
    words = [f"--{name.replace('_', '-')} {' '.join(map(str, values))}" for name, values in asked if values != getattr(Options, name)]
    command, versions = " ".join(["attnx tune --by schedule", *words]), ", ".join(f"{name} {metadata.version(name)}" for name in ("libtpu", "jax"))
    lines = [f"`{command}`, {versions}. Bundles per unit, waiting for memory included; the passes at the longest calls, then their sum by length: {_MARKS}. "
             "Ratio: to the default. Feed: bundles of the inner code that feed the matrix unit; spills: registers written to memory and read back, of the code that "
             "has most.", ""]
    for group in groups:
        lines += [f"**{_heading(group)}**, per {tune_tpu.KERNELS[group['kernel']].unit}", "", *markdown.table(_columns(group), list(_cells(group))), ""]
    markdown.replace(options.write, "attnx tune", lines)
