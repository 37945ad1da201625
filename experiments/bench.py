"""Times the engines on this machine: medians and ratios of one run, as a table, a figure and JSON."""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import attnx
from attnx import masks, weights
from attnx.cli import UsageError
from attnx.core.linear import linear_attention
from attnx.core.selected import selected_attention
from experiments import markdown
from experiments.options import parse
from experiments.progress import Meter


@dataclasses.dataclass(frozen=True)
class Options:
    """Times attention on this machine, every contestant once a round, and reports medians and the ratios within rounds.

    The causal softmax against other libraries; masks and weights against the plain causal softmax of the same engine; and the recurrent and the
    selected engine against the softmax of the pairs engine.
    """

    length: int = 8192
    """Tokens where libraries are compared."""
    long: int = 32768
    """Tokens where masks and weights are compared."""
    heads: int = 4
    """Heads."""
    size: int = 64
    """Size of a head."""
    rounds: int = 7
    """How often each contestant is timed, where libraries are compared."""
    long_rounds: int = 3
    """How often each contestant is timed, where masks and weights are compared."""
    peers: bool = False
    """Compare with PyTorch as well, which has to be installed."""
    out: Path = Path("runs/bench")
    """Folder of the results."""
    write: Path | None = None
    """A Markdown file whose part between the marks of this command is replaced by the results."""


class Contest(NamedTuple):
    """Contestants that take turns.

    Attributes:
      name: of the group.
      entries: the contestants, each a function that does the work once and waits for it.
      base: the one to which the others are compared.
      rounds: how often each runs.
      bounds: for some contestants, what the ratio of their time to the base's is meant not to exceed.
    """

    name: str
    entries: dict[str, Callable[[], Any]]
    base: str
    rounds: int
    bounds: dict[str, float]


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``bench``."""
    options = parse(Options, program, arguments)
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, int) and value < 1 and not isinstance(value, bool):
            raise UsageError(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
    bench(options, Console())
    return 0


def bench(options: Options, console: Console) -> dict[str, Any]:
    """Times everything; returns what it also writes to ``bench.json``."""
    contests = [*_libraries(options), *_parts(options), *_recurrent(options), *_selected(options)]
    turns = sum((contest.rounds + 1) * len(contest.entries) for contest in contests)
    results, done = [], 0
    with Meter(turns, console) as meter:
        for contest in contests:
            times = {name: [] for name in contest.entries}
            for _ in range(contest.rounds + 1):  # the first compiles
                for name, work in contest.entries.items():
                    meter.at(done, f"{contest.name}: {name}")
                    start = time.perf_counter()
                    work()
                    times[name].append(time.perf_counter() - start)
                    done += 1
            results += _rows(contest, {name: t[1:] for name, t in times.items()})
    summary = {"machine": _machine(), "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)), "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(summary, indent=2))
    _draw(summary, options.out / "bench.png")
    console.print(_table(summary))
    console.print(f"Figure and numbers are in {options.out}.", highlight=False)
    if options.write:
        _write(summary, options)
    return summary


# Contestants --------------------------------------------------------------------------------------------------------


def _arrays(length, options):
    return jax.random.normal(jax.random.key(0), (4, 1, length, options.heads, options.size))


def _passes(attend, arrays):
    """The forward pass, and the forward and backward pass, of ``attend(q, k, v)``, compiled."""
    *qkv, cotangent = arrays

    def both(q, k, v, cotangent):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(cotangent)

    run = lambda function, *args: jax.block_until_ready(function(*args))
    return {"forward": partial(run, jax.jit(attend), *qkv), "forward and backward": partial(run, jax.jit(both), *qkv, cotangent)}


def _contests(title, attends, arrays, base, rounds, bounds, extra=None):
    """A contest for each pass; ``bounds`` by pass, then contestant."""
    passes = {name: _passes(attend, arrays) for name, attend in attends.items()} | (extra or {})
    return [Contest(f"{title}, {which}", {name: each[which] for name, each in passes.items()}, base, rounds, bounds[which])
            for which in ("forward", "forward and backward")]


def _libraries(options):
    arrays = _arrays(options.length, options)
    attends = {"attnx blockwise": partial(attnx.attention, mask=masks.causal(), implementation="blockwise"),
               "jax.nn": partial(jax.nn.dot_product_attention, is_causal=True)}
    extra = {"PyTorch": _torch(arrays)} if options.peers else {}
    bounds = {"forward": {"jax.nn": 1 / 5, "PyTorch": 1.0}, "forward and backward": {"jax.nn": 1 / 5, "PyTorch": 1.3}}
    return _contests(f"causal softmax, T={options.length}", attends, arrays, "attnx blockwise", options.rounds, bounds, extra)


def _torch(arrays):
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UsageError("--peers needs PyTorch: pip install torch") from error
    query, key, value, cotangent = (torch.from_numpy(np.array(x)).transpose(1, 2).contiguous() for x in arrays)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)

    def forward():
        with torch.no_grad():
            attend(query, key, value)

    def both():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        attend(*leaves).backward(cotangent)

    return {"forward": forward, "forward and backward": both}


def _parts(options):
    arrays = _arrays(options.long, options)
    attend = partial(attnx.attention, implementation="blockwise")
    documents = masks.documents(jnp.arange(options.long) * 16 // options.long)
    entries = {"causal softmax": partial(attend, mask=masks.causal()),
               "sliding window of 512": partial(attend, mask=masks.sliding_window(512)),
               "16 documents": partial(attend, mask=masks.causal() & documents),
               "softpick": partial(attend, mask=masks.causal(), weights=weights.softpick()),
               "sigmoid": partial(attend, mask=masks.causal(), weights=weights.sigmoid())}
    bounds = {"sliding window of 512": 1 / 12, "16 documents": 1 / 8, "softpick": 1.3, "sigmoid": 1.3}
    return _contests(f"masks and weights, T={options.long}", entries, arrays, "causal softmax", options.long_rounds,
                     {"forward": bounds, "forward and backward": bounds})


def _recurrent(options):
    """A linear mechanism against softmax, and against itself at other lengths."""
    decay = jnp.log1p(-jnp.geomspace(1 / 4, 1 / 4096, options.heads))
    linear, length = partial(linear_attention, log_decay=decay), options.long // 2
    entries = {"causal softmax": partial(attnx.attention, mask=masks.causal(), implementation="blockwise"), "linear, a decay a head": linear}
    bounds = dict.fromkeys(("forward", "forward and backward"), {"linear, a decay a head": 1 / 8})
    contests = _contests(f"recurrent engine, T={length}", entries, _arrays(length, options), "causal softmax", options.long_rounds, bounds)
    short, long = options.length // 4, 2 * options.long
    passes = {f"T={n}": _passes(linear, _arrays(n, options)) for n in (short, long)}
    growth = {f"T={long}": 1.5 * long / short}  # time a token within 1.5x
    return contests + [Contest(f"recurrent engine, two lengths, {which}", {name: each[which] for name, each in passes.items()}, f"T={short}", options.rounds, growth)
                       for which in ("forward", "forward and backward")]


def _selected(options):
    """Each query block of 64 attends to a sixteenth of the key blocks."""
    blocks = -(-options.long // 64)
    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(blocks), (1, options.heads, blocks, 1)), axis=3)[..., :max(blocks // 16, 1)]

    def select(query, key, value):
        indices = jax.lax.optimization_barrier(jnp.asarray(chosen, jnp.int32))  # no constant, as in a mechanism that chooses
        return selected_attention(query, key, value, indices, block_sizes=(64, 64))

    entries = {"softmax over all pairs": partial(attnx.attention, implementation="blockwise"), "1/16 of the blocks": select}
    bounds = dict.fromkeys(("forward", "forward and backward"), {"1/16 of the blocks": 1 / 8})
    return _contests(f"selected engine, T={options.long}", entries, _arrays(options.long, options), "softmax over all pairs", options.long_rounds, bounds)


# Results ------------------------------------------------------------------------------------------------------------


def _rows(contest, times):
    """Median time of each contestant, and the median over rounds of its ratio to the base."""
    rows = []
    for name, seconds in times.items():
        ratio = statistics.median(t / b for t, b in zip(seconds, times[contest.base]))
        bound, ours = contest.bounds.get(name), contest.base.startswith("attnx")
        if bound is not None and ours:  # against another library the bound is on our time over theirs
            met = 1 / ratio <= bound
        else:
            met = None if bound is None else ratio <= bound
        rows.append({"contest": contest.name, "name": name, "seconds": statistics.median(seconds), "fastest": min(seconds), "ratio": ratio,
                     "goal": None if bound is None else 1 / bound if ours else bound, "met": met, "base": contest.base})
    return rows


def _machine():
    return {"processor": platform.processor() or platform.machine(), "cores": len(jax.devices()) and _cores(), "platform": jax.default_backend(),
            "device": jax.devices()[0].device_kind, "python": platform.python_version(), "jax": jax.__version__, "attnx": attnx.__version__}


def _cores():
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cells(row):
    ours = row["base"].startswith("attnx")
    goal = "" if row["goal"] is None else f"{'at least' if ours else 'at most'} {row['goal']:.2g}"
    return row["name"], f"{row['seconds']:.3f} s", f"{row['ratio']:.3g}", goal, {None: "", True: "yes", False: "no"}[row["met"]]


_COLUMNS = ("contestant", "median time", "time / base", "goal", "met")


def _table(summary):
    table = Table(title=f"{summary['machine']['device']}, {summary['machine']['cores']} cores, jax {summary['machine']['jax']}")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "contestant" else "right")
    for contest in dict.fromkeys(row["contest"] for row in summary["results"]):
        table.add_section()
        table.add_row(f"[bold]{contest}[/]")
        for row in summary["results"]:
            if row["contest"] == contest:
                table.add_row(*_cells(row))
    return table


def _draw(summary, path):
    from matplotlib.figure import Figure

    contests = list(dict.fromkeys(row["contest"] for row in summary["results"]))
    figure = Figure(figsize=(9, 2.2 * len(contests)), layout="constrained")
    for axes, contest in zip(figure.subplots(len(contests), 1, squeeze=False)[:, 0], contests):
        rows = [row for row in summary["results"] if row["contest"] == contest][::-1]
        bars = axes.barh([row["name"] for row in rows], [row["seconds"] for row in rows], color="tab:blue")
        axes.bar_label(bars, [f" {row['ratio']:.3g}" for row in rows])
        axes.set_title(contest, loc="left", fontsize="medium")
        axes.set_xlabel("seconds; at the bars: ratio to " + rows[0]["base"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    figure.savefig(path, dpi=120)


def _write(summary, options):
    """Puts the results between the command's marks in a Markdown file."""
    machine = summary["machine"]
    command = "attnx bench" + (" --peers" if options.peers else "")
    lines = [f"`{command}` on {machine['cores']} cores ({machine['device']}), Python {machine['python']}, jax {machine['jax']}; "
             f"medians, ratios within rounds; 1 x T x {options.heads} x {options.size}, float32.", ""]
    for contest in dict.fromkeys(row["contest"] for row in summary["results"]):
        rows = [_cells(row) for row in summary["results"] if row["contest"] == contest]
        lines += [f"**{contest}**", "", *markdown.table(_COLUMNS, rows), ""]
    markdown.replace(options.write, "attnx bench", lines)
