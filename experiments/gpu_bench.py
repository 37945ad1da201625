"""Times fused attention on an NVIDIA GPU beside cuDNN, tokamax and PyTorch in one run, after holding every contestant against the definition."""

import dataclasses
import importlib.util
import json
import os
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
from attnx import masks, scores, weights
from attnx.cli import UsageError
from experiments.options import parse
from experiments.progress import Meter

OURS = "attnx pallas"
PASSES = ("forward", "backward")
TOLERANCE = 3e-2  # of the larger of 1 and the largest entry: what bfloat16 inputs allow
FLOPS = {"forward": 4, "backward": 10}  # per pair, head and unit of head size: two and five matrix products


@dataclasses.dataclass(frozen=True)
class Options:
    """Times fused attention in bfloat16 on an NVIDIA GPU: the causal and the full softmax beside other libraries, then masks, scores and weights beside our own
    causal softmax at equal work. Every contestant is first held against the definition in float32. Libraries that are not installed are left out.
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
    rounds: int = 9
    """How often each contestant is timed, in turns."""
    seconds: float = 0.05
    """Least time of a sample, in which a contestant runs as often as it takes."""
    out: Path = Path("runs/gpu_bench")
    """Folder of the results."""


class Shape(NamedTuple):
    """The arrays of a contest."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int


class Entry(NamedTuple):
    """A contestant: ``passes(q, k, v, cotangent) -> {pass: Work}``, and the parts of the attention that it computes."""

    passes: Callable
    parts: dict[str, Any]


class Contest(NamedTuple):
    """Contestants that take turns at one shape: ``entries(length)`` by name, and for each the share of pairs that it allows."""

    name: str
    shape: Shape
    entries: Callable[[int], dict[str, Entry]]
    density: Callable[[str], float]
    base: str


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
    contests, results = [*_libraries(options), _parts(options)], []
    with Meter(len(contests), console) as meter:
        for n, contest in enumerate(contests):
            meter.at(n, contest.name)
            results += _run(contest, options)
    summary = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "attnx": attnx.__version__,
               "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)), "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_bench.json").write_text(json.dumps(summary, indent=2))
    console.print(_table(summary))
    console.print(f"Numbers are in {options.out}.", highlight=False)
    return summary


# Contests -----------------------------------------------------------------------------------------------------------


def _libraries(options):
    for size in options.sizes:
        heads = options.width // size
        for length in options.lengths:
            for causal in (True, False):
                for kv_heads in dict.fromkeys((heads, max(1, heads // options.group))):
                    name = f"{'causal' if causal else 'full'}, T={length}, D={size}" + (f", {heads} heads on {kv_heads}" if kv_heads < heads else "")
                    share = _causal_share(length) if causal else 1.0
                    yield Contest(name, Shape(max(1, options.tokens // length), length, heads, kv_heads, size), partial(_installed, causal),
                                  lambda _, share=share: share, "cuDNN")


def _installed(causal, length):
    """Our kernels and the other libraries that there are."""
    parts = {"mask": masks.causal() if causal else None}
    attends = {OURS: partial(attnx.attention, **parts, implementation="pallas"),
               "cuDNN": partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        attends["tokamax"] = partial(tokamax.dot_product_attention, is_causal=causal)
    entries = {name: Entry(_of_jax(attend), parts) for name, attend in attends.items()}
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            entries |= {"PyTorch SDPA": Entry(_of_torch(partial(_sdpa, causal)), parts), "FlexAttention": Entry(_of_torch(_flex(causal, length)), parts)}
    return entries


def _parts(options):
    length, size = options.parts_length, max(options.sizes)
    heads, window = options.width // size, min(1024, options.parts_length)

    def calls(length):
        documents = jnp.arange(length) * 16 // length
        return {
            "causal softmax": dict(mask=masks.causal()),
            "full softmax": {},
            f"sliding window of {window}": dict(mask=masks.sliding_window(window)),
            "16 documents": dict(mask=masks.causal() & masks.documents(documents)),
            "ALiBi": dict(mask=masks.causal(), scores=scores.alibi(heads)),
            "soft cap": dict(mask=masks.causal(), scores=scores.soft_cap(30.0)),
            "softpick": dict(mask=masks.causal(), weights=weights.softpick()),
            "sigmoid": dict(mask=masks.causal(), weights=weights.sigmoid()),
        }

    def entries(length):
        return {name: Entry(_of_jax(partial(attnx.attention, **parts, implementation="pallas")), parts) for name, parts in calls(length).items()}

    density = {"full softmax": 1.0, "16 documents": _causal_share(length // 16) / 16,
               f"sliding window of {window}": window / length * (1 - (window - 1) / (2 * length))}
    return Contest(f"parts, T={length}, D={size}", Shape(max(1, options.tokens // length), length, heads, heads, size), entries,
                   lambda name: density.get(name, _causal_share(length)), "causal softmax")


def _causal_share(length):
    return (1 + 1 / length) / 2


# Contestants --------------------------------------------------------------------------------------------------------


class Work:
    """A pass to be timed: ``run()`` starts it, ``wait(result)`` ends with it, ``arrays(result)`` are its results as numpy's."""

    def __init__(self, run, wait, arrays):
        self.run, self.wait, self.arrays = run, wait, arrays

    def seconds(self, times: int) -> float:
        """The mean time of a run among so many in a row."""
        start = time.perf_counter()
        for _ in range(times):
            result = self.run()
        self.wait(result)
        return (time.perf_counter() - start) / times


def _of_jax(attend):
    def passes(q, k, v, cotangent):
        arrays = lambda results: [np.asarray(x, np.float32) for x in jax.tree.leaves(results)]
        _, pull = jax.jit(partial(jax.vjp, attend))(q, k, v)
        forward, backward = jax.jit(attend), jax.jit(lambda pull, cotangent: pull(cotangent))
        return {"forward": Work(partial(forward, q, k, v), jax.block_until_ready, arrays),
                "backward": Work(partial(backward, pull, cotangent), jax.block_until_ready, arrays)}

    return passes


def _of_torch(attend):
    def passes(*inputs):
        import torch

        q, k, v, cotangent = (torch.from_numpy(np.asarray(x, np.float32)).to("cuda", torch.bfloat16).transpose(1, 2).contiguous() for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        wait = lambda _: torch.cuda.synchronize()
        arrays = lambda results: [x.transpose(1, 2).float().detach().cpu().numpy() for x in (results if isinstance(results, tuple) else (results,))]

        def forward():
            with torch.no_grad():
                return attend(q, k, v)

        return {"forward": Work(forward, wait, arrays), "backward": Work(lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True), wait, arrays)}

    return passes


def _sdpa(causal, q, k, v):
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1])


def _flex(causal, length):
    import torch
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda") if causal else None
    attend = torch.compile(flex.flex_attention)
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=k.shape[1] < q.shape[1])


# Checking and timing ------------------------------------------------------------------------------------------------


def _arrays(shape: Shape):
    b, t, n, k, h = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (b, t, heads, h), jnp.bfloat16) for key, heads in zip(keys, (n, k, k, n))]


def _run(contest: Contest, options: Options) -> list[dict[str, Any]]:
    """The rows of a contest: who cannot serve it or is wrong, and how fast the others are."""
    rows, able = [], {}
    small = contest.shape._replace(batch=1, length=min(1024, contest.shape.length))
    checked = contest.entries(small.length)
    for name, entry in contest.entries(contest.shape.length).items():
        try:
            works = checked[name].passes(*_arrays(small))
            error = _error(works, _expected(checked[name].parts, small))
            if not error <= TOLERANCE:
                raise ArithmeticError(f"differs from the definition by {error:.1e}")
            works = works if small == contest.shape else entry.passes(*_arrays(contest.shape))
            for work in works.values():
                work.seconds(1)
            able[name] = works
        except Exception as problem:  # that a library cannot serve a shape is a result
            rows.append({"contest": contest.name, "name": name, "problem": f"{type(problem).__name__}: {problem}".splitlines()[0][:200]})
    for which in PASSES:
        times = {name: max(1, round(options.seconds / works[which].seconds(1))) for name, works in able.items()}
        samples = {name: [] for name in able}
        for _ in range(options.rounds):
            for name, works in able.items():
                samples[name].append(works[which].seconds(times[name]))
        rows += [_row(contest, name, which, samples) for name in able]
    return rows


def _expected(parts, shape):
    """Output and gradients by the definition, in float32."""
    *qkv, cotangent = (x.astype(jnp.float32) for x in _arrays(shape))
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(partial(attnx.attention, **parts, implementation="reference"), *qkv)
        return [np.asarray(x) for x in (out, *pull(cotangent))]


def _error(works, expected):
    found = [x for which in PASSES for x in works[which].arrays(works[which].run())]
    return max(float(np.abs(a - b).max() / max(1, np.abs(b).max())) for a, b in zip(found, expected, strict=True))


def _row(contest, name, which, samples):
    """Median time, useful arithmetic a second, and the speed relative to the base's at equal work, round by round."""
    b, t, n, _, h = contest.shape
    work = {entry: FLOPS[which] * b * n * t * t * h * contest.density(entry) for entry in samples}
    seconds = statistics.median(samples[name])
    speed = None
    if contest.base in samples:
        speed = statistics.median((work[name] / mine) / (work[contest.base] / base) for mine, base in zip(samples[name], samples[contest.base]))
    return {"contest": contest.name, "name": name, "pass": which, "seconds": seconds, "tflops": work[name] / seconds / 1e12, "base": contest.base, "speed": speed}


def _table(summary):
    table = Table(title=f"{summary['device']}, jax {summary['jax']}, bfloat16")
    for column in ("contestant", "pass", "median time", "TFLOP/s", "speed / base's"):
        table.add_column(column, justify="left" if column in ("contestant", "pass") else "right")
    for contest in dict.fromkeys(row["contest"] for row in summary["results"]):
        table.add_section()
        table.add_row(f"[bold]{contest}[/]")
        for row in summary["results"]:
            if row["contest"] == contest:
                if "problem" in row:
                    table.add_row(row["name"], row["problem"], style="dim")
                else:
                    table.add_row(row["name"], row["pass"], f"{1e3 * row['seconds']:.3f} ms", f"{row['tflops']:.0f}",
                                  "" if row["speed"] is None else f"{row['speed']:.2f}")
    return table
