"""Times the fused kernels on an NVIDIA GPU beside cuDNN, tokamax and PyTorch in one run, after holding every contestant against the definition."""

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import attnx
from attnx.cli import UsageError
from experiments.gpu_contests import Contest, Work, contests
from experiments.options import parse
from experiments.progress import Meter

PASSES = ("forward", "backward")
TOLERANCE = 3e-2  # of the larger of 1 and the largest entry: what bfloat16 inputs allow
FLOPS = {"forward": 4, "backward": 10}  # per pair, head and unit of head size: two and five matrix products


@dataclasses.dataclass(frozen=True)
class Options:
    """Times the fused kernels in bfloat16 on an NVIDIA GPU: the causal and the full softmax beside other libraries; masks, scores, weights and chosen blocks beside
    our own causal softmax at equal work; many small windows beside XLA; eight-bit codes beside 16 bits; the recurrent engine and decoding beside other libraries and
    the time that reading and writing the arrays once takes. Every contestant is first held against the definition in float32. Libraries that are not installed are
    left out.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    """Sequence lengths where libraries are compared."""
    sizes: tuple[int, ...] = (64, 128)
    """Head sizes where libraries are compared."""
    tokens: int = 16384
    """Tokens of a batch, at least one sequence."""
    width: int = 2048
    """Head size times number of query heads."""
    group: int = 4
    """Query heads to a key-value head in the grouped case."""
    parts_length: int = 16384
    """Sequence length where masks, scores and weights are compared, at the largest head size."""
    selected_lengths: tuple[int, ...] = (65536,)
    """Sequence lengths where blocks are chosen."""
    chosen: int = 16
    """Blocks that each block of queries chooses."""
    windows: tuple[int, ...] = (1024, 4096, 16384)
    """Numbers of windows of 7 x 7 tokens."""
    eight_bit_lengths: tuple[int, ...] = (4096, 16384)
    """Sequence lengths of attention on eight-bit codes, at the largest head size."""
    linear_lengths: tuple[int, ...] = (16384, 131072, 1048576)
    """Sequence lengths of the recurrent engine."""
    decode_batches: tuple[int, ...] = (1, 8, 64)
    """Sequences that are decoded at a time."""
    decode_lengths: tuple[int, ...] = (8192, 65536, 524288)
    """Tokens that each of them has in its cache."""
    decode_gib: float = 40.0
    """Caches larger than this are left out."""
    rounds: int = 9
    """How often each contestant is timed, in turns."""
    seconds: float = 0.05
    """Least time of a sample, in which a contestant runs as often as it takes."""
    copied: int = 1024
    """Mebibytes whose copying says how fast memory is."""
    out: Path = Path("runs/gpu_bench")
    """Folder of the results."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``gpu_bench``."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other libraries want memory as well
    options = parse(Options, program, arguments)
    if jax.default_backend() != "gpu":
        raise UsageError(f"needs an NVIDIA GPU that JAX can use (pip install 'jax[cuda12]'); the backend here is {jax.default_backend()!r}")
    bench(options, Console())
    return 0


def bench(options: Options, console: Console) -> dict[str, Any]:
    """Checks and times everything; returns what it also writes to ``gpu_bench.json``."""
    todo, results, bandwidth = contests(options), [], _bandwidth(options)
    with Meter(len(todo), console) as meter:
        for n, contest in enumerate(todo):
            meter.at(n, contest.name)
            results += _run(contest, options, bandwidth)
    summary = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "attnx": attnx.__version__, "bandwidth": bandwidth,
               "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)), "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_bench.json").write_text(json.dumps(summary, indent=2))
    console.print(_table(summary))
    console.print(f"Numbers are in {options.out}.", highlight=False)
    return summary


# Checking and timing ------------------------------------------------------------------------------------------------


def _bandwidth(options: Options) -> float:
    """Bytes a second that a copy of a large array reads and writes: what traffic is held against."""
    x = jnp.zeros(2**20 * options.copied, jnp.uint8)
    copy = Work(partial(jax.jit(lambda x: x + jnp.uint8(1)), x), jax.block_until_ready, list)
    copy.seconds(1)
    return 2 * x.size / min(copy.seconds(5) for _ in range(options.rounds))


def _run(contest: Contest, options: Options, bandwidth: float) -> list[dict[str, Any]]:
    """The rows of a contest: who cannot serve it or is wrong, and how fast the others are."""
    rows, able = [], {}
    checked = contest.entries(contest.small.length)
    for name, entry in contest.entries(contest.shape.length).items():
        try:
            arrays = contest.arrays(contest.small)
            works = checked[name].passes(*arrays)
            error = difference(works, checked[name].expected(*arrays))
            if not error <= TOLERANCE:
                raise ArithmeticError(f"differs from the definition by {error:.1e}")
            works = works if contest.small == contest.shape else entry.passes(*contest.arrays(contest.shape))
            for work in works.values():
                work.seconds(1)
            able[name] = works
        except Exception as problem:  # that a library cannot serve a shape is a result
            rows.append({"contest": contest.name, "name": name, "problem": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]})
    for which in PASSES:
        running = {name: works[which] for name, works in able.items() if which in works}
        times = {name: max(1, round(options.seconds / work.seconds(1))) for name, work in running.items()}
        samples = {name: [] for name in running}
        for _ in range(options.rounds):
            for name, work in running.items():
                samples[name].append(work.seconds(times[name]))
        rows += [_row(contest, name, which, samples, bandwidth) for name in running]
    return rows


def difference(works, expected) -> float:
    """The largest, relative to the larger of 1 and the largest entry."""
    found = [x for work in works.values() for x in work.arrays(work.run())]
    return max(float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in zip(found, expected, strict=True))


def _row(contest, name, which, samples, bandwidth):
    """Median time, useful arithmetic a second or the share of the memory's speed, and the speed relative to the base's at equal work, round by round."""
    b, t, n, _, h = contest.shape
    work = {entry: 1.0 if contest.density is None else FLOPS[which] * b * n * t * t * h * contest.density(entry) for entry in samples}
    seconds = statistics.median(samples[name])
    speed = None
    if contest.base in samples:
        speed = statistics.median((work[name] / mine) / (work[contest.base] / base) for mine, base in zip(samples[name], samples[contest.base]))
    return {"contest": contest.name, "name": name, "pass": which, "seconds": seconds, "base": contest.base, "speed": speed,
            "tflops": None if contest.density is None else work[name] / seconds / 1e12,
            "floor": None if contest.traffic is None else contest.traffic(which) / bandwidth / seconds}


def _table(summary):
    table = Table(title=f"{summary['device']}, jax {summary['jax']}, bfloat16, memory {summary['bandwidth'] / 1e12:.2f} TB/s")
    for column in ("contestant", "pass", "median time", "TFLOP/s", "memory's speed", "speed / base's"):
        table.add_column(column, justify="left" if column in ("contestant", "pass") else "right")
    for contest in dict.fromkeys(row["contest"] for row in summary["results"]):
        table.add_section()
        table.add_row(f"[bold]{contest}[/]")
        for row in summary["results"]:
            if row["contest"] == contest:
                if "problem" in row:
                    table.add_row(row["name"], row["problem"], style="dim")
                else:
                    table.add_row(row["name"], row["pass"], f"{1e3 * row['seconds']:.3f} ms",
                                  *("" if row[n] is None else f"{row[n]:{f}}" for n, f in (("tflops", ".0f"), ("floor", ".2f"), ("speed", ".2f"))))
    return table
