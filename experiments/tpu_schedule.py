"""Compiles the TPU kernels on any machine and counts what the compiler schedules: instruction bundles of a tile, and what fills them."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from attnx.cli import UsageError
from experiments import markdown
from experiments.options import parse
from experiments.tpu import ENVIRONMENT, TOPOLOGIES
from experiments.tpu import gradient as _gradient
from experiments.tpu import like as _like

TILE, SIZE, CHUNK = 512, 128, 128  # queries and keys of a tile, size of a head, tokens of a chunk
BATCH, ROWS, KV_HEADS, PAGE, COLUMNS = 8, 32, 8, 64, 2048  # of decoding: query heads, key-value heads, tokens of a page, keys of a tile (one for each head and token)
WINDOWS, TOKENS, WINDOW_HEADS, WINDOW_SIZE = 1024, 49, 4, 32  # windows of 7 x 7 and the heads that fill a register's lanes
GRID, GRID_TILE = (32, 64), (16, 32)
LENGTH, HEADS = 2048, 2  # the schedules do not depend on them, and what surrounds the kernels compiles quickly


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles the fused kernels for TPUs that need not be there, in bfloat16, and reads the compiler's schedules: for the innermost code of each kernel that
    uses the matrix unit, its VLIW bundles (cycles, but for waiting), those that feed the matrix unit, and the share of each unit's slots that is filled.
    Beside them stand the kernels that come with JAX, at the same tile sizes. Needs libtpu (pip install libtpu).
    """

    chips: tuple[Literal["v5e", "v5p", "v6e"], ...] = ("v5e", "v5p", "v6e")
    """For which chips."""
    kernels: tuple[str, ...] = ()
    """Words: only kernels whose name contains one of them."""
    smoke: bool = False
    """Only the kernels whose counts are recorded, for the first chip."""
    out: Path = Path("runs/tpu_schedule")
    """Folder of the results."""
    write: Path | None = None
    """A Markdown file whose part between the marks of this command is replaced by the results."""
    record: Path | None = None
    """A JSON file that a test reads: the counts of this version of libtpu are replaced. Implies --smoke."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``tpu_schedule``."""
    options = parse(Options, program, arguments)
    names = RECORDED if options.smoke or options.record else [n for n in CASES if not options.kernels or any(word in n for word in options.kernels)]
    if not names:
        raise UsageError(f"--kernels: expected words from {', '.join(CASES)}, got {' '.join(options.kernels)}")
    if not options.chips:
        raise UsageError(f"--chips: expected some of {', '.join(TOPOLOGIES)}, got none")
    console, rows = Console(), []
    for chip in ("v5e",) if options.record else options.chips[:1] if options.smoke else options.chips:
        with console.status(f"compiling for {chip}"):
            rows += measure(chip, names)
    summary = {**_versions(), "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tpu_schedule.json").write_text(json.dumps(summary, indent=2))
    console.print(_table(summary))
    console.print(f"Numbers are in {options.out}.", highlight=False)
    if options.write:
        _write(summary, options)
    if options.record:
        known = json.loads(options.record.read_text()) if options.record.exists() else {}
        options.record.write_text(json.dumps({**known, summary["libtpu"]: counts(rows)}, indent=2) + "\n")
    return 0


def measure(chip: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Compiles cases for a chip in a process of its own, as the compiler reads its environment once.

    Returns a row for each innermost piece of code that uses the matrix unit: of which ``case``, ``pass`` and ``part`` it is, its ``bundles`` and, of those,
    ``matrix`` that feed the matrix unit, ``spills`` (registers written to memory or read back), how many slots of each unit are ``used``, and the ``share``.

    Raises:
      UsageError: if the compiler is missing, or fails.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("needs the TPU compiler: pip install libtpu")
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **ENVIRONMENT, "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"}
        done = subprocess.run([sys.executable, "-m", "experiments.tpu_schedule", chip, folder, *names], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"compiling for {chip} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Bundles by the name of the piece of code."""
    return {f"{row['case']}, {row['pass']}, {row['part']}": row["bundles"] for row in rows}


# Cases: functions of the sharding that give a function and its abstract arguments -------------------------------------


def _flash(parts: Callable[[Any], dict] = lambda attnx: {}):
    """Our fused attention; ``parts(attnx)`` besides the causal mask."""
    import attnx

    x = _like(1, LENGTH, HEADS, SIZE)
    options = {"scale": 1.0, "mask": attnx.masks.causal(), **parts(attnx)}
    return _gradient(partial(attnx.attention, implementation="pallas", block_sizes=(TILE, TILE), **options), x, x, x)


def _sage(values: str | None = None):
    """Causal attention on queries and keys that were rounded to int8 beforehand."""
    import attnx

    attend = partial(attnx.products.sage_attention, is_causal=True, values=values, scale=1.0, tile_sizes=(TILE, TILE), implementation="pallas")
    return attend, [_like(1, LENGTH, HEADS, SIZE)] * 3


def _linear(decay: tuple | None):
    from attnx.core import fused
    from pallas_kernels import linear

    x, tokens = _like(1, HEADS, LENGTH, SIZE), _like(1, LENGTH, HEADS, SIZE)
    log_decay = None if decay is None else _like(1, HEADS, *decay, dtype="float32")
    state = linear.State(_like(1, HEADS, SIZE, SIZE, dtype="float32"), None)
    plan = linear.tpu.choose_plan(tokens, tokens, HEADS, fused.default_sizes("linear", "tpu", tokens), CHUNK)
    return _gradient(partial(linear.tpu.attend, plan), linear.Tokens(_like(1, HEADS, 1, LENGTH, SIZE), x, x, log_decay), state)


def _decode(paged: bool):
    """A token a sequence against a cache."""
    import attnx

    cache = (BATCH * LENGTH // PAGE, PAGE) if paged else (BATCH, LENGTH)
    cache, table = _like(*cache, KV_HEADS, SIZE), _like(BATCH, LENGTH // PAGE, dtype="int32") if paged else None
    attend = lambda query, key, value, lengths, table: attnx.decode(query, key, value, lengths, page_table=table, scale=1.0, implementation="pallas")
    return attend, (_like(BATCH, 1, ROWS, SIZE), cache, cache, _like(BATCH, dtype="int32"), table)


def _windows(fused: bool):
    """Windows with a bias and, of shifted ones, regions: by the kernels for windows, or as sequences."""
    import jax.numpy as jnp

    import attnx
    from attnx.core.windows import window_attention

    def attend(query, key, value, bias):
        regions, options = jnp.zeros((64, TOKENS), int), {"implementation": "pallas"}
        if fused:
            return window_attention(query, key, value, bias=bias, regions=regions, **options)
        mask = attnx.masks.documents(jnp.tile(regions, (WINDOWS // 64, 1)))
        return attnx.attention(query, key, value, scores=attnx.scores.bias(bias), mask=mask, block_sizes=(128, 128), **options)

    return _gradient(attend, *[_like(WINDOWS, TOKENS, WINDOW_HEADS, WINDOW_SIZE)] * 3, _like(WINDOW_HEADS, TOKENS, TOKENS, dtype="float32"))


def _neighbourhoods(biased: bool):
    """Of 7 x 7 tokens, in tiles that a kernel takes as one."""
    from attnx import masks

    attend = partial(masks.neighborhood_attention, query_tile=GRID_TILE, key_tile=GRID_TILE, implementation="pallas", bias=_zeros(HEADS, 13, 13) if biased else None)
    return _gradient(lambda *qkv: attend(*qkv, 7), *[_like(1, *GRID, HEADS, WINDOW_SIZE)] * 3)


def _paged_attention():
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    pages, integers = _like(KV_HEADS, BATCH * LENGTH // PAGE, PAGE, SIZE), partial(_like, dtype="int32")
    attend = partial(paged_attention, pages_per_compute_block=COLUMNS // PAGE)
    return attend, (_like(BATCH, ROWS, SIZE), pages, pages, integers(BATCH), integers(BATCH, LENGTH // PAGE))


def _splash():
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    sizes = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    causal = mask.MultiHeadMask([mask.CausalMask((LENGTH, LENGTH))] * HEADS)
    attend = kernel.make_splash_mha_single_device(causal, block_sizes=kernel.BlockSizes(**dict.fromkeys(sizes.split(), TILE)))
    return _gradient(jax.vmap(attend), *[_like(1, HEADS, LENGTH, SIZE)] * 3)


def _jax_flash():
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    sizes = ("block_q block_k_major block_k block_q_major_dkv block_k_major_dkv block_k_dkv block_q_dkv block_k_major_dq block_k_dq block_q_dq")
    block_sizes = kernel.BlockSizes(block_b=1, **dict.fromkeys(sizes.split(), TILE))
    return _gradient(partial(kernel.flash_attention, causal=True, block_sizes=block_sizes), *[_like(1, HEADS, LENGTH, SIZE)] * 3)


def _tokamax():
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel  # the public function has no say in tiles
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as mask

    sizes = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute"
    attend = kernel.make_splash_mha_single_device(mask.CausalMask((LENGTH, LENGTH)), config=kernel.SplashConfig(**dict.fromkeys(sizes.split(), TILE)))
    return _gradient(lambda *qkv: attend(*qkv), *[_like(HEADS, LENGTH, SIZE)] * 3)


class Kernel(NamedTuple):
    """What is in a kernel's name, and names of its innermost pieces of code, in their order."""

    named: str
    parts: tuple[str, ...]


class Case(NamedTuple):
    """A function that gives what is compiled and its abstract arguments; the kernels by what they compute."""

    build: Callable
    kernels: dict[str, Kernel]


SOFTMAX = "flash softmax"
_TILES, _EVERY = ("full tile", "masked tile"), ("every tile",)
_FOLDS = {"forward": Kernel("fold_rows", _TILES), "dq": Kernel("query_side", _TILES), "dk, dv": Kernel("key_side", _TILES)}
_SPLASH = {"forward": Kernel("_fwd_", _EVERY), "dq": Kernel("_dq_", _EVERY), "dk, dv": Kernel("_dkv_", _EVERY)}
_CHUNKS = {"forward": Kernel("linear_forward", ("2 chunks",)), "backward": Kernel("linear_backward", ("states", "gradients"))}
_WINDOWS = {"forward": Kernel("window_forward", ("4 windows",)), "backward": Kernel("window_backward", ("4 windows",))}
_DECODING = {"step": Kernel("decode", _EVERY)}
CASES = {
    SOFTMAX: Case(_flash, _FOLDS),
    "jax splash_attention": Case(_splash, _SPLASH),
    "jax flash_attention": Case(_jax_flash, {**_SPLASH, "forward": Kernel("jit_flash_attention", _EVERY)}),
    **({"tokamax": Case(_tokamax, {"forward": Kernel("_fwd_", _TILES), "dq, dk, dv": Kernel("_dkv_", _TILES)})} if importlib.util.find_spec("tokamax") else {}),
    "flash scaled": Case(partial(_flash, lambda attnx: {"scale": None}), _FOLDS),
    "flash softpick": Case(partial(_flash, lambda attnx: {"weights": attnx.weights.softpick()}), _FOLDS),
    "flash soft cap": Case(partial(_flash, lambda attnx: {"scores": attnx.scores.soft_cap(30.0)}), _FOLDS),
    "flash ALiBi": Case(partial(_flash, lambda attnx: {"scores": attnx.scores.alibi(HEADS)}), _FOLDS),
    "flash offset table": Case(partial(_flash, lambda attnx: {"scores": attnx.scores.t5_bias(_zeros(32, HEADS))}), _FOLDS),
    "window": Case(partial(_windows, True), _WINDOWS),
    "window as flash": Case(partial(_windows, False), {**_FOLDS, "bias": Kernel("pair_side", _TILES)}),
    "neighbourhoods": Case(partial(_neighbourhoods, False), _FOLDS),
    "neighbourhoods, biases": Case(partial(_neighbourhoods, True), _FOLDS),
    "flash int8 scores": Case(partial(_flash, lambda attnx: {"products": attnx.products.int8()}), _FOLDS),
    "sage": Case(_sage, {"forward": _FOLDS["forward"]}),
    "sage, int8 values": Case(partial(_sage, "int8"), {"forward": _FOLDS["forward"]}),
    "decode": Case(partial(_decode, False), _DECODING),
    "decode, pages": Case(partial(_decode, True), _DECODING),
    "jax paged_attention": Case(_paged_attention, {"step": Kernel("paged_attention", _EVERY)}),
    "linear no decay": Case(partial(_linear, None), _CHUNKS),
    "linear decay by head": Case(partial(_linear, (1, LENGTH)), _CHUNKS),
    "linear decay by channel": Case(partial(_linear, (LENGTH, SIZE)), _CHUNKS),
}
RECORDED = SOFTMAX, "linear decay by head", "window", "sage"


def _zeros(*shape):
    import jax.numpy as jnp

    return jnp.zeros(shape)


# Compiling and reading ------------------------------------------------------------------------------------------------


def _compile(chip: str, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of some cases, in a process whose environment makes the compiler write into ``folder``."""
    import jax
    from jax.experimental import topologies

    from attnx.core import fused

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding, rows = jax.sharding.SingleDeviceSharding(device), []
    for name in names:
        with fused.forced(interpret=False):
            function, arguments = CASES[name].build()
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
            with jax.default_device(device):
                jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
        for which, kernel in CASES[name].kernels.items():
            found = list(pieces(*dumped(folder, kernel.named)))
            parts = kernel.parts if len(kernel.parts) == len(found) else [f"part {n + 1}" for n in range(len(found))]
            rows += [{"chip": chip, "case": name, "pass": which, "part": part, **piece} for part, piece in zip(parts, found)]
        for file in folder.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return rows


def dumped(folder: Path, named: str) -> tuple[str, str]:
    """The schedule of the kernel so named, and its use of slots."""
    files = [file for file in folder.iterdir() if named in file.name]
    (bundles,) = [file for file in files if re.search(r"-\d+-final_bundles\.txt$", file.name)]
    (use,) = [file for file in files if file.name.endswith("-final_hlo-static-per-bundle-utilization.txt")]
    return bundles.read_text(), use.read_text()


def pieces(bundles: str, use: str) -> Iterator[dict[str, Any]]:
    """The innermost pieces of code that use the matrix unit, in their order: the regions with such bundles of which no region inside has any.

    Args:
      bundles: a schedule, a bundle a line, whose comments say where regions start and end.
      use: for each bundle how many slots of each unit it fills, after a line of the units' names and one of their numbers of slots.
    """
    _, units, capacity, _, *table = use.splitlines()
    units, capacity = re.findall(r"[\w:]+", units), [int(n) for n in capacity.split()]
    filled = [dict(zip(units, map(int, line.split()), strict=True)) for line in table if line.strip()]
    matrix = [bool(slots["MATMUL"] + slots["MATPUSH"]) for slots in filled]
    regions = {(start, stop) for start, stop in _regions(bundles) if any(matrix[start:stop])}
    for start, stop in sorted(regions):
        if not any((a, b) != (start, stop) and start <= a and b <= stop for a, b in regions):
            used = {unit: sum(slots[unit] for slots in filled[start:stop]) for unit in units}
            yield {"start": start, "bundles": stop - start, "matrix": sum(matrix[start:stop]), "spills": used["VLOAD:FILL"] + used["VSTORE:SPILL"], "used": used,
                   "share": {unit: round(used[unit] / n / (stop - start), 4) for unit, n in zip(units, capacity)}}


def sweep(bundles: str, use: str) -> dict[str, Any]:
    """A kernel's loop over its grid: its innermost ``pieces`` that use the matrix unit, the bundles that ``every`` step runs besides, and those, free of the
    matrix unit, that a step may leap over: what starts and finishes a block, ``once`` for each."""
    inside, regions = list(pieces(bundles, use)), set(_regions(bundles))
    marks = dict(re.findall(r"^\s*(0x[0-9a-f]+|0) (LB|PF):", bundles, re.M))
    lands, loops = ({int(address, 16) for address, mark in marks.items() if mark == which} for which in ("PF", "LB"))
    busy = [(piece["start"], piece["start"] + piece["bundles"]) for piece in inside]
    holds = lambda a, b: any(start < b and a < stop for start, stop in busy)
    around = [(a, b) for a, b in regions if a in loops and all(a <= start and stop <= b for start, stop in busy)]
    start, stop = max(around, key=lambda region: region[1] - region[0]) if around else (0, len(re.findall(_BUNDLE, bundles)))
    leapt = {(a, b) for a, b in regions if b in lands and start <= a and b < stop and not holds(a, b)}
    once = sum(b - a for a, b in leapt if not any(c <= a and b <= d and (a, b) != (c, d) for c, d in leapt))
    return {"pieces": inside, "once": once, "every": stop - start - once - sum(piece["bundles"] for piece in inside)}


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0) [^:\n]*:", re.M)


def _regions(bundles: str) -> Iterator[tuple[int, int]]:
    """Where the regions of a schedule start and stop; the few that the compiler merged across others have no end of their own and are left out."""
    opened, parts = {}, _BUNDLE.split(bundles)
    for address, rest in zip(parts[1::2], parts[2::2]):
        for which, region in re.findall(r"\b(Start|End) region (\d+)", rest):
            if which == "Start":
                opened[region] = int(address, 16)
            elif region in opened:
                yield opened.pop(region), int(address, 16) + 1


# Results --------------------------------------------------------------------------------------------------------------

_UNITS = {"MXU": "MATMUL", "VALU": "VALU", "EUP": "EUP", "XLU": "XLU", "load": "VLOAD", "store": "VSTORE"}
_COLUMNS = ("", "bundles", "ratio", "feed", *_UNITS, "spills")
_CAPTION = ("ratio: to our causal softmax; feed: bundles that feed the matrix unit; MXU to store: filled slots of each unit; "
            "spills: registers written to memory and read back. Neighbourhoods: 7 x 7 tokens of a grid, in tiles of 16 x 32, heads of 32. The linear kernels take two "
            "chunks at a time. Windows: 49 tokens, four heads of 32, biases and regions, four windows and all their heads at a time; as flash, a tile of 128 x 128 for "
            "each window and head. Decoding: 2,048 keys (tokens times key-value heads) and 32 query heads; the code of jax's paged_attention also starts the copies of "
            "its pages of 64 tokens, ours lie outside.")


def _versions():
    return {name: metadata.version(name) for name in ("libtpu", "jax", "attnx")}


def _cells(summary, chip):
    """The cells of the rows of a chip, by case; bundles also in relation to those of our causal softmax, on full tiles if the others do not tell them apart."""
    mine = [row for row in summary["rows"] if row["chip"] == chip]
    base = {(row["pass"], part): row["bundles"] for row in mine if row["case"] == SOFTMAX for part in {row["part"], row["part"].replace("full", "every")}}
    base |= {("dq, dk, dv", part): base["dq", part] + base["dk, dv", part] for which, part in base if which == "dq"}
    cells = {row["case"]: [] for row in mine}
    for row in mine:
        softmax = base.get((row["pass"], row["part"]))
        cells[row["case"]].append((
            f"{row['pass']}, {row['part']}", f"{row['bundles']:,}", f"{row['bundles'] / softmax:.2f}" if softmax else "", f"{row['matrix'] / row['bundles']:.0%}",
            *(f"{row['share'][unit]:.0%}" for unit in _UNITS.values()), f"{row['spills']:,}"))
    return cells


def _chips(summary):
    return dict.fromkeys(row["chip"] for row in summary["rows"])


def _table(summary):
    title = f"Tiles of {TILE} x {TILE}, chunks of {CHUNK}, heads of {SIZE}, bfloat16; libtpu {summary['libtpu']}"
    table = Table(title=title, caption=_CAPTION, caption_justify="left", box=box.SIMPLE, padding=0)
    for n, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if n else "left", no_wrap=True)
    for chip in _chips(summary):
        table.add_section()
        table.add_row(f"[bold]{chip}[/]")
        for case, rows in _cells(summary, chip).items():
            table.add_row(f"[bold]{case}[/]")
            for row in rows:
                table.add_row(*row)
    return table


def _write(summary, options):
    """Puts the results between the command's marks in a Markdown file."""
    lines = [f"`python -m experiments tpu_schedule`, libtpu {summary['libtpu']}, jax {summary['jax']}: tiles of {TILE} x {TILE} pairs, chunks of {CHUNK} tokens, "
             f"heads of {SIZE}, bfloat16. {_CAPTION[0].upper()}{_CAPTION[1:]}", ""]
    for chip in _chips(summary):
        rows = [(f"{case}, {name}", *row) for case, rows in _cells(summary, chip).items() for name, *row in rows]
        lines += [f"**{chip}**", "", *markdown.table(_COLUMNS, rows), ""]
    markdown.replace(options.write, "attnx tpu_schedule", lines)


if __name__ == "__main__":
    chip, folder, *names = sys.argv[1:]
    print(json.dumps(_compile(chip, Path(folder), names)))
