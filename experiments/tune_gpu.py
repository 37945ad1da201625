"""Times candidate tile sizes of the fused kernels on the present GPU."""

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

import attnx
from attnx import masks
from attnx.cli import UsageError
from attnx.core import fused
from experiments import tune
from experiments.gpu_bench import PASSES, TOLERANCE, difference
from experiments.gpu_contests import Work, by_definition, of_jax
from experiments.progress import Meter
from pallas_kernels import tiles, tuned

KERNEL = "flash, gpu"
LENGTH, TOKENS, WIDTH, CHECKED = 4096, 16384, 2048, 512  # of a sequence, of a batch, head size times heads; length where results are held against the definition
ROUNDS, SECONDS = 9, 0.05  # how often each is timed, in turns, and how long at least
TOGETHER = 4  # candidates that take turns with the default
COMPONENTS = {"rows": "forward", "queries": "backward", "keys": "backward"}  # of the sizes, and the pass that tells


def run(options, out: Path, console: Console) -> int:
    """Times what was not timed before, and writes the winners."""
    if fused.target()[1] != "gpu":
        raise UsageError(f"--by time: needs an NVIDIA GPU that JAX can use (pip install 'jax[cuda12]'); the backend here is {jax.default_backend()!r}. "
                         "TPUs are tuned with --by schedule, with no device")
    if others := [name for name in options.kernels if name != "flash"]:
        raise UsageError(f"--kernels: on a GPU the sizes of flash alone are in the table, got {' '.join(others)}")
    device = jax.devices()[0].device_kind
    ledger = tune.Ledger(out, {"device": device, "jax": jax.__version__, "code": tune.fingerprint()})
    shapes = [(size, dtype) for size in options.head_sizes for dtype in options.dtypes]
    shapes = shapes[:1] if options.smoke else shapes
    entries = []
    with Meter(len(shapes), console) as meter:
        for n, (size, dtype) in enumerate(shapes):
            default = tiles.default(KERNEL, device, size, jnp.dtype(dtype).itemsize)
            candidates = [default, *list(neighbours(default))[:1 if options.smoke else None]]
            bench = partial(measure, size, dtype, default, ledger, lambda share, n=n: meter.at(n + share, f"flash, head size {size}, {dtype}"), options.smoke)
            found = bench(candidates)
            best = combine(default, found)
            found |= bench([best])
            if not improves(found[best]):
                best = default
            console.print(_table(size, dtype, device, default, best, found))
            entries.append({"kernel": KERNEL, "device": device, "size": tuned.size_class(size), "bytes": jnp.dtype(dtype).itemsize, "length": 0,
                            "sizes": as_json(best), "by": "time", "jax": jax.__version__})
    if not options.smoke:
        tune.save(out, entries)
        console.print(f"The best sizes are in {out}.", highlight=False)
    return 0


def as_json(sizes: tiles.Tiles) -> dict[str, dict[str, int]]:
    """As they stand in a table."""
    return {name: tile._asdict() for name, tile in sizes._asdict().items()}


# Candidates ---------------------------------------------------------------------------------------------------------


def neighbours(sizes: tiles.Tiles) -> Iterator[tiles.Tiles]:
    """Sizes of which one number of one kernel is halved, doubled or, the stages, one more or less."""
    for component in COMPONENTS:
        tile = getattr(sizes, component)
        for field in ("bq", "bk", "warps"):
            for number in (getattr(tile, field) // 2, getattr(tile, field) * 2):
                if (4 <= number <= 8) if field == "warps" else 16 <= number <= 256:
                    yield sizes._replace(**{component: tile._replace(**{field: number})})
        for stages in (tile.stages - 1, tile.stages + 1):
            if stages >= 1:
                yield sizes._replace(**{component: tile._replace(stages=stages)})


def combine(default: tiles.Tiles, found: dict[tiles.Tiles, dict[str, Any]]) -> tiles.Tiles:
    """The best of each kernel's tiles, if it is better than the default's by the margin."""
    best = default
    for component, which in COMPONENTS.items():
        mine = {sizes: result["ratios"][which] for sizes, result in found.items()
                if "ratios" in result and sizes._replace(**{component: getattr(default, component)}) == default}
        if mine and min(mine.values()) < 1 - tune.MARGIN:
            best = best._replace(**{component: getattr(min(mine, key=mine.get), component)})
    return best


def improves(result: dict[str, Any]) -> bool:
    """Whether a candidate beats the default over both passes."""
    ratios, seconds = result.get("ratios"), result.get("seconds")
    return bool(ratios) and sum(seconds.values()) < (1 - tune.MARGIN) * sum(seconds[which] / ratios[which] for which in PASSES)


# Timing -------------------------------------------------------------------------------------------------------------


def measure(size: int, dtype: str, default: tiles.Tiles, ledger: tune.Ledger, at, smoke: bool, candidates: list[tiles.Tiles]) -> dict[tiles.Tiles, dict[str, Any]]:
    """Medians of the seconds of each candidate and of their ratios to the default's, round by round; or why it cannot serve."""
    of = lambda sizes: {"kernel": KERNEL, "size": size, "dtype": dtype, "sizes": as_json(sizes), "smoke": smoke}
    new = [sizes for sizes in candidates if ledger.find(**of(sizes)) is None]
    length, checked, tokens = (32, 32, 32) if smoke else (LENGTH, CHECKED, TOKENS)
    heads = 1 if smoke else max(1, WIDTH // size)
    attend = partial(attnx.attention, mask=masks.causal())
    if new:
        arrays, small = _arrays(max(1, tokens // length), length, heads, size, dtype), _arrays(1, checked, min(2, heads), size, dtype)
        expected = by_definition(partial(attend, implementation="reference"))(*small)
    for start in range(0, len(new), TOGETHER):
        at(start / max(1, len(new)))
        able = {}
        for sizes in dict.fromkeys([default, *new[start: start + TOGETHER]]):
            try:
                able[sizes] = _prepare(attend, sizes, arrays, small, expected)
            except Exception as problem:  # that a GPU cannot hold a tile is a result
                ledger.add({"problem": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]}, **of(sizes))
        for sizes, result in _times(default, able).items():
            if sizes in new:
                ledger.add(result, **of(sizes))
    return {sizes: ledger.find(**of(sizes)) for sizes in candidates}


def _arrays(batch, length, heads, size, dtype):
    return list(jax.random.normal(jax.random.key(0), (4, batch, length, heads, size), jnp.dtype(dtype)))


def _prepare(attend, sizes, arrays, small, expected) -> dict[str, Work]:
    """The passes with these sizes, compiled, after they were found right."""
    with tiles.using(**{KERNEL: sizes}):
        passes = of_jax(partial(attend, implementation="pallas"))
        error = difference(passes(*small), expected)
        if not error <= TOLERANCE:
            raise ArithmeticError(f"differs from the definition by {error:.1e}")
        works = of_jax(partial(attend, implementation="pallas"))(*arrays)
        for work in works.values():
            seconds(work, 1)
    return works


def seconds(work: Work, times: int) -> float:
    """The mean time of a run."""
    return work.seconds(times)


def _times(default, able):
    if default not in able:
        return {sizes: {"problem": "the default cannot be timed here"} for sizes in able}
    results = {sizes: {"seconds": {}, "ratios": {}} for sizes in able}
    for which in PASSES:
        times = {sizes: max(1, round(SECONDS / max(seconds(works[which], 1), 1e-9))) for sizes, works in able.items()}
        samples = {sizes: [] for sizes in able}
        for _ in range(ROUNDS):
            for sizes, works in able.items():
                samples[sizes].append(seconds(works[which], times[sizes]))
        for sizes, taken in samples.items():
            results[sizes]["seconds"][which] = statistics.median(taken)
            results[sizes]["ratios"][which] = statistics.median(mine / base for mine, base in zip(taken, samples[default]))
    return results


def _table(size, dtype, device, default, best, found):
    table = Table(title=f"{device}, flash, head size {size}, {dtype}: causal, {LENGTH} tokens", box=box.SIMPLE, padding=0)
    for name in ("sizes", *PASSES, "/ default", ""):
        table.add_column(name, justify="left" if name in ("sizes", "") else "right")
    for sizes, result in found.items():
        changed = [f"{name} {tune.show(tile._asdict())}" for name, tile, usual in zip(sizes._fields, sizes, default) if tile != usual]
        mark = ", ".join(word for word, chosen in (("default", default), ("best", best)) if sizes == chosen)
        if "problem" in result:
            table.add_row("; ".join(changed), result["problem"], "", "", mark, style="dim")
        else:
            ratio = " ".join(f"{result['ratios'][which]:.2f}" for which in PASSES)
            table.add_row("; ".join(changed) or "as they are", *(f"{1e3 * result['seconds'][which]:.3f} ms" for which in PASSES), ratio, mark,
                          style="bold" if sizes == best else None)
    return table
