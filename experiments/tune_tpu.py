"""What a TPU's compiler makes of candidate tile sizes, and what a call costs by its schedule."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tpu import ENVIRONMENT, TOPOLOGIES, gradient, like

LENGTH, HEADS = 16384, 64  # arrays too large for the chip, as in earnest: what a kernel copies is then part of its schedule
BATCH, QUERY_HEADS, KV_HEADS = 8, 32, 8  # of decoding
PATIENCE = 600  # seconds for a candidate

DEVICES = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
"""How JAX names the chips."""
COPIED = {"v5e": 819 / 1.5, "v5p": 2765 / 2 / 1.75, "v6e": 1640 / 1.75}
"""Bytes that a core copies from memory in a cycle: the published gigabytes a second over the gigahertz that make the published peak."""


class Plan(NamedTuple):
    """How a kernel is tuned.

    Attributes:
      build: ``build(size, dtype)`` gives a function and its abstract arguments.
      passes: what is in the names of the kernels that it launches, by pass.
      cost: ``cost(passes, sizes, size, itemsize, copied, length)``: bundles of each pass for what ``unit`` says, waiting for memory included.
      unit: what is counted.
      lengths: of the calls whose cost is asked for, by the least length from which the sizes are to serve.
      candidates: sizes to be tried, in the form of the table's JSON.
    """

    build: Callable
    passes: dict[str, str]
    cost: Callable
    unit: str
    lengths: dict[int, int]
    candidates: tuple[dict[str, int], ...]


# The kernels ----------------------------------------------------------------------------------------------------------


def _flash(size, dtype):
    """The causal softmax and its gradient."""
    import attnx

    x = like(1, LENGTH, HEADS, size, dtype=dtype)
    return gradient(lambda *qkv: attnx.attention(*qkv, mask=attnx.masks.causal(), implementation="pallas"), x, x, x)


def tiles_of_causal(bq: int, bk: int, length: int) -> tuple[int, int]:
    """How many tiles of a causal call have all pairs allowed, and how many some.

    >>> tiles_of_causal(512, 512, 2048), tiles_of_causal(512, 1024, 2048)
    ((6, 4), (2, 4))
    """
    rows = range(0, length, bq)
    full = sum((start + 1) // bk for start in rows)
    return full, sum(-(-(start + bq) // bk) for start in rows) - full


def _flash_cost(passes, sizes, size, itemsize, copied, length):
    """Per thousand allowed pairs: full and partial tiles with what every step adds, and what starts and finishes a block."""
    (bq, bk), pairs = (sizes["bq"], sizes["bk"]), length * (length + 1) / 2e3
    numbers, found = tiles_of_causal(bq, bk, length), {}
    for name, sweep in passes.items():
        outer, inner = (bk, bq) if name == "dk, dv" else (bq, bk)
        waiting = 2 * inner * size * itemsize / copied
        tiles = [piece["bundles"] for piece in sweep["pieces"]]
        steps = sum(n * max(tile + sweep["every"], waiting) for n, tile in zip(numbers, (tiles[0], tiles[-1])))
        found[name] = (steps + -(-length // outer) * sweep["once"]) / pairs
    return found


def _linear(size, dtype):
    """The recurrence with a decay for each head, and its gradient."""
    from attnx.core.linear import linear_attention

    x = like(1, LENGTH, HEADS, size, dtype=dtype)
    attend = lambda query, key, value, log_decay: linear_attention(query, key, value, log_decay=log_decay, implementation="pallas")
    return gradient(attend, x, x, x, like(1, LENGTH, HEADS, dtype="float32"))


def _linear_cost(passes, sizes, size, itemsize, copied, length):
    """Per token of a head: the chunks of a slab, and what surrounds them."""
    slab, together, found = sizes["chunk"] * sizes["chunks"], min(2, sizes["chunks"]), {}
    for name, sweep in passes.items():
        arrays = 4 if name == "forward" else 7
        chunks = sum(piece["bundles"] for piece in sweep["pieces"]) * sizes["chunks"] / together
        found[name] = max(chunks + sweep["every"] + sweep["once"], slab * arrays * size * itemsize / copied) / slab
    return found


def _decode(size, dtype):
    """A token a sequence against a cache."""
    import attnx

    cache = like(BATCH, LENGTH, KV_HEADS, size, dtype=dtype)
    attend = lambda query, key, value, lengths: attnx.decode(query, key, value, lengths, implementation="pallas")
    return attend, (like(BATCH, 1, QUERY_HEADS, size, dtype=dtype), cache, cache, like(BATCH, dtype="int32"))


def _decode_cost(passes, sizes, size, itemsize, copied, length):
    """Per key of a key-value head."""
    columns = min(sizes["most"], max(sizes["least"], sizes["pairs"] // QUERY_HEADS), sizes["memory"] // (size * itemsize))
    step = passes["step"]
    tile = max(piece["bundles"] for piece in step["pieces"]) + step["every"]
    return {"step": max(tile, 2 * columns * size * itemsize / copied) / columns + step["once"] / (length * KV_HEADS)}


KERNELS = {
    "flash": Plan(_flash, {"forward": "fold_rows", "dq": "query_side", "dk, dv": "key_side"}, _flash_cost, "1,000 allowed pairs", {0: 1024, 2048: 2048, 4096: 8192},
                  tuple({"bq": bq, "bk": bk} for bq, bk in ((512, 512), (256, 512), (512, 1024), (1024, 512), (1024, 1024)))),
    "linear": Plan(_linear, {"forward": "linear_forward", "backward": "linear_backward"}, _linear_cost, "token", {0: LENGTH},
                   tuple({"chunk": chunk, "chunks": chunks, "memory": 2**24} for chunk, chunks in ((128, 8), (128, 4), (128, 16), (256, 4), (256, 8)))),
    "decode": Plan(_decode, {"step": "decode"}, _decode_cost, "key", {0: LENGTH},
                   tuple({"least": 2**n // 4, "most": 2**n, "pairs": 2**n * QUERY_HEADS, "memory": 2**n * 512} for n in (11, 9, 10, 12, 13))),
}
"""The kernels that can be tuned; the first candidate of each is the one that ships."""


def costs(chip: str, kernel: str, size: int, dtype: str, sizes: dict[str, int], passes: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Bundles of each pass, by the least length from which sizes serve."""
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    plan = KERNELS[kernel]
    return {least: plan.cost(passes, sizes, size, itemsize, COPIED[chip], length) for least, length in plan.lengths.items()}


# Compiling ------------------------------------------------------------------------------------------------------------


class Compiler:
    """A process that compiles candidates for a chip, one after the other: the compiler reads its environment once, and may die of a candidate."""

    def __init__(self, chip: str):
        self.chip, self._process = chip, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._folder.cleanup()
            self._process = None

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """What came of a candidate ``{kernel, size, dtype, sizes}``: ``{"passes": {pass: sweep}}``, as :func:`experiments.tpu_schedule.sweep` counts, or
        ``{"problem": why not}``."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=PATIENCE)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            line = None
        if line:
            return json.loads(line)
        self.__exit__()
        return {"problem": "the compiler ended" if line == "" else f"not compiled in {PATIENCE} s"}

    def _start(self):
        self._folder = tempfile.TemporaryDirectory()
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **ENVIRONMENT, "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={self._folder.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"}
        self._process = subprocess.Popen([sys.executable, "-m", "experiments.tune_tpu", self.chip, self._folder.name], env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._lines = queue.Queue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()


def _forward(stream, lines):
    """Hands over the lines that are answers, and an empty one at the end."""
    with stream:
        for line in stream:
            if line.startswith("{"):
                lines.put(line)
    lines.put("")


def _serve(chip: str, folder: Path):
    """Answers jobs, a line each."""
    import jax
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    for line in sys.stdin:
        try:
            found = {"passes": _schedules(device, folder, **json.loads(line))}
        except Exception as error:  # that the compiler rejects sizes is a result
            found = {"problem": reason(error)}
        jax.clear_caches()
        for file in folder.iterdir():
            file.unlink()
        print(json.dumps(found), flush=True)


def reason(error: Exception) -> str:
    """Why a candidate does not compile, in short."""
    text = " ".join(str(error).split())
    if "vmem" in text.lower() and ("exceed" in text or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()):
        return "needs more memory on chip than a kernel may have"
    return f"{type(error).__name__}: {text}"[:200]


def _schedules(device, folder: Path, kernel: str, size: int, dtype: str, sizes: dict[str, Any]):
    import jax

    from attnx.core import fused
    from experiments.tpu_schedule import dumped, sweep
    from pallas_kernels import tiles, tuned

    plan = KERNELS[kernel]
    sharding = jax.sharding.SingleDeviceSharding(device)
    with tiles.using(**{f"{kernel}, tpu": tuned.check(f"{kernel}, tpu", sizes)}), fused.forced(interpret=False):
        function, arguments = plan.build(size, dtype)
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        with jax.default_device(device):
            jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    found = {}
    for name, named in plan.passes.items():
        counts = sweep(*dumped(folder, named))
        found[name] = {**counts, "pieces": [{key: piece[key] for key in ("bundles", "matrix", "spills")} for piece in counts["pieces"]]}
    return found


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
