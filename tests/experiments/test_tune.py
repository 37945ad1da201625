"""Tuning: what is asked for, what is remembered, what wins and where it is written; the TPU compiler for real, a GPU by a clock of our own."""

import importlib.util
import io
import json
import re

import jax
import pytest
from rich.console import Console

from attnx.cli import UsageError
from attnx.core import fused
from experiments import tune, tune_gpu, tune_tpu
from pallas_kernels import tiles, tuned
from pallas_kernels.tiles import Tile, Tiles, default


def sweep(bundles, every=100, once=50):
    return {"pieces": [{"bundles": bundles, "matrix": bundles // 2, "spills": 7}] * 2, "once": once, "every": every}


class Compiler:
    """In the place of the TPU compiler: tiles of 1,024 take half the time a pair, and others' memory is never enough."""

    asked = []

    def __init__(self, chip):
        self.chip = chip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, job):
        self.asked.append((self.chip, json.dumps(job)))
        bq, bk = job["sizes"]["bq"], job["sizes"]["bk"]
        if bq * bk < 512 * 512:
            return {"problem": "needs more memory on chip than a kernel may have"}
        return {"passes": {name: sweep(bq * bk // (500 if bq * bk == 2**20 else 250)) for name in ("forward", "dq", "dk, dv")}}


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(tune_tpu, "Compiler", Compiler)
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tune.metadata, "version", lambda name: "1")
    monkeypatch.setattr(Compiler, "asked", [])
    return Compiler


def run(out, console=None, **options):
    options = tune.Options(kernels=("flash",), chips=("v5e",), head_sizes=(128,), dtypes=("bfloat16",), out=out, **options)
    return tune.by_schedule(options, out, console or Console(file=io.StringIO(), width=200))


@pytest.mark.parametrize("line, message", [
    (["--kernels", "sparse"], "kernels.*flash.*linear.*decode"),
    (["--chip", "v4"], "chips.*v5e.*v5p.*v6e"),
    (["--chips"], "chips"),
    (["--head-sizes", "1"], "--head-sizes: expected 2 or more, got 1"),
    (["--by", "schedule", "--dtypes", "float16"], "--dtypes: TPU kernels compute in float32 and bfloat16, got float16"),
    (["--by", "time"], "--by time: needs an NVIDIA GPU.*backend here is 'cpu'.*--by schedule"),
    ([], "ATTNX_TILES is empty.*--out"),
])
def test_refuses_wrong_lines(line, message, tmp_path, compiler):
    with pytest.raises(UsageError, match=re.compile(message, re.DOTALL)) as error:
        tune.main("attnx tune", [*line, *(["--out", str(tmp_path / "tiles.json")] if line else [])])
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_refuses_a_table_that_is_none(tmp_path):
    (tmp_path / "tiles.json").write_text("{}")
    with pytest.raises(UsageError, match="tiles.json is no table of tile sizes.*remove it"):
        tune.main("attnx tune", ["--out", str(tmp_path / "tiles.json")])


def test_refuses_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install libtpu"):
        run(tmp_path / "tiles.json")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        tune.main("attnx tune", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("schedule", "medians of interleaved runs", "--head-sizes", "--chip", "which the kernels read before their defaults"):
        assert words in text


def test_writes_what_the_kernels_then_read(tmp_path, compiler):
    out, console = tmp_path / "deep" / "tiles.json", Console(file=io.StringIO(), width=200)
    (group,) = run(out, console)
    assert tuned.read(out) == {("flash, tpu", "TPU v5 lite", 128, 2): dict.fromkeys((0, 2048, 4096), Tile(1024, 1024))}
    text = console.file.getvalue()
    assert "v5e, flash, head size 128, bfloat16: bundles per 1,000 allowed pairs" in text
    assert re.search(r"512 x 512 .* [\d.]+\+ +[\d.]+\+ +[\d.]+ +", text) and re.search(r"1024 x 1024 .* [\d.]+\* +[\d.]+\* +[\d.]+\*\+ +1\.00", text)
    assert "256 x 512: needs more memory on chip" in text


def test_measures_nothing_twice(tmp_path, compiler, monkeypatch):
    out = tmp_path / "tiles.json"
    run(out)
    count, before = len(compiler.asked), tuned.read(out)
    assert count == len(set(compiler.asked)) == len(tune_tpu.KERNELS["flash"].candidates)
    ledger = out.with_suffix(".measured.jsonl")
    ledger.write_text(ledger.read_text()[:-40])  # interrupted while it wrote the last
    run(out)
    assert len(compiler.asked) == count + 1 and compiler.asked[-1] == compiler.asked[count - 1] and tuned.read(out) == before
    monkeypatch.setattr(tune, "fingerprint", lambda: "other code")
    run(out)
    assert len(compiler.asked) == 2 * count + 1


def test_keeps_the_entries_of_others(tmp_path, compiler):
    out = tmp_path / "tiles.json"
    entry = {"kernel": "flash, tpu", "device": "TPU v5", "size": 64, "bytes": 4, "length": 0, "sizes": {"bq": 256, "bk": 256}}
    tune.save(out, [entry, {**entry, "device": "TPU v5 lite", "size": 128, "bytes": 2}])
    run(out)
    table = tuned.read(out)
    assert table["flash, tpu", "TPU v5", 64, 4] == {0: Tile(256, 256)} and table["flash, tpu", "TPU v5 lite", 128, 2][0] == Tile(1024, 1024)


def test_the_default_stays_unless_it_is_beaten_clearly(tmp_path, compiler, monkeypatch):
    even = lambda self, job: {"passes": {name: sweep(job["sizes"]["bq"] * job["sizes"]["bk"] // 250, every=0, once=0) for name in ("forward", "dq", "dk, dv")}}
    monkeypatch.setattr(Compiler, "measure", even)
    monkeypatch.setattr(tune_tpu, "tiles_of_causal", lambda bq, bk, length: (length**2 / bq / bk, 0))
    run(tmp_path / "tiles.json")
    assert tuned.read(tmp_path / "tiles.json")["flash, tpu", "TPU v5 lite", 128, 2] == {0: Tile(512, 512), 2048: Tile(512, 512), 4096: Tile(1024, 1024)}


def test_results_in_a_document(tmp_path, compiler):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: attnx tune -->\n<!-- end: attnx tune -->\nafter\n")
    run(tmp_path / "tiles.json", write=page)
    assert "| 512 x 512 |" in page.read_text() and page.read_text().endswith("after\n")


# Costs by schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bq, bk", [(512, 512), (256, 1024), (1024, 128)])
def test_counts_the_tiles_of_a_causal_call(bq, bk):
    kinds = [("full" if j + bk - 1 <= i else "empty" if j > i + bq - 1 else "some") for i in range(0, 4096, bq) for j in range(0, 4096, bk)]
    assert tune_tpu.tiles_of_causal(bq, bk, 4096) == (kinds.count("full"), kinds.count("some"))


def test_costs_count_steps_blocks_and_waiting():
    passes = {"forward": {**sweep(1000), "pieces": [{"bundles": 1000}, {"bundles": 1200}]}}
    sizes, pairs = {"bq": 512, "bk": 512}, 1024 * 1025 / 2000
    found = tune_tpu.costs("v5e", "flash", 128, "bfloat16", sizes, passes)[0]
    assert found == {"forward": pytest.approx((1 * 1100 + 2 * 1300 + 2 * 50) / pairs)}
    slow = tune_tpu.costs("v5e", "flash", 128, "bfloat16", sizes, {"forward": {**passes["forward"], "pieces": [{"bundles": 1}]}})[0]["forward"]
    assert slow == pytest.approx((3 * 2 * 512 * 128 * 2 / (819 / 1.5) + 2 * 50) / pairs)
    linear = tune_tpu.costs("v5e", "linear", 128, "float32", {"chunk": 128, "chunks": 4}, {"forward": sweep(400), "backward": sweep(4000)})[0]
    assert linear["backward"] == pytest.approx((2 * 4000 * 4 / 2 + 150) / 512)
    decode = {"least": 512, "most": 2048, "pairs": 2**15, "memory": 2**20}
    assert tune_tpu.costs("v5e", "decode", 128, "bfloat16", decode, {"step": sweep(10**6)})[0]["step"] == pytest.approx((10**6 + 100) / 1024, rel=1e-4)


def test_says_in_short_why_a_candidate_cannot_be():
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack.\n Scoped allocation with size 17M exceeded limit")
    assert tune_tpu.reason(error) == "needs more memory on chip than a kernel may have"
    assert tune_tpu.reason(ValueError("a\nb")) == "ValueError: a b"


def test_compiles_for_a_tpu(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler (pip install libtpu) is not installed")
    out, console = tmp_path / "tiles.json", Console(file=io.StringIO(), width=200)
    options = tune.Options(chips=("v5e",), head_sizes=(128,), dtypes=("bfloat16",), smoke=True)
    (group,) = tune.by_schedule(options, out, console)
    assert [row.get("problem") for row in group["rows"]] == [None, None] and not out.exists()
    first, second = group["rows"]
    assert first["feed"] > 0.3 and second["spills"] == 0 and re.search(r"up to 2048 keys.*\*\+", console.file.getvalue())


def test_a_compiler_that_dies_is_a_result(monkeypatch):
    monkeypatch.setattr(tune_tpu.sys, "executable", "false")
    with tune_tpu.Compiler("v5e") as compiler:
        assert compiler.measure({}) == compiler.measure({}) == {"problem": "the compiler ended"}


# By time --------------------------------------------------------------------------------------------------------------


def test_neighbours_change_one_number_of_one_kernel():
    sizes = default("flash, gpu", "", 64, 2)
    found = list(tune_gpu.neighbours(sizes))
    assert len(found) == len(set(found)) > 12 and sizes not in found
    for other in found:
        (changed,) = [(a, b) for a, b in zip(sizes, other) if a != b]
        assert sum(a != b for a, b in zip(*changed)) == 1
        tuned.check("flash, gpu", tune_gpu.as_json(other))


def test_combines_the_best_of_each_kernel():
    sizes = default("flash, gpu", "", 64, 2)
    rows, keys = sizes._replace(rows=Tile(64, 64, 8, 3)), sizes._replace(keys=Tile(32, 128, 8, 3))
    result = lambda forward, backward: {"ratios": {"forward": forward, "backward": backward}, "seconds": {"forward": forward, "backward": 2 * backward}}
    found = {sizes: result(1, 1), rows: result(0.9, 1), keys: result(0.5, 0.99), sizes._replace(rows=Tile(32, 64, 8, 3)): {"problem": "spills"}}
    assert tune_gpu.combine(sizes, found) == rows
    assert tune_gpu.improves(result(0.9, 1)) and not tune_gpu.improves(result(0.9, 1.05)) and not tune_gpu.improves({"problem": ""})


def test_times_candidates_that_are_right(tmp_path, monkeypatch):
    """On emulated kernels, by a clock that likes small tiles in the forward pass; one candidate computes something else."""
    for name, number in (("LENGTH", 32), ("TOKENS", 32), ("WIDTH", 16), ("CHECKED", 32), ("ROUNDS", 2)):
        monkeypatch.setattr(tune_gpu, name, number)
    usual = Tiles(*[Tile(32, 32, 4, 1)] * 4)
    small, wrong = usual._replace(rows=Tile(16, 32, 4, 1)), usual._replace(rows=Tile(32, 16, 4, 1))
    monkeypatch.setattr(tiles, "default", lambda *call: usual)
    monkeypatch.setattr(tune_gpu, "neighbours", lambda sizes: iter((small, wrong)))
    prepare, clocks = tune_gpu._prepare, []

    def prepared(attend, sizes, arrays, near, expected):
        if sizes == wrong:
            expected = [x + 1 for x in expected]
        works = prepare(attend, sizes, arrays, near, expected)
        clocks.extend((work, 1.0 if sizes == small and which == "forward" else 2.0) for which, work in works.items())
        return works

    monkeypatch.setattr(tune_gpu, "_prepare", prepared)
    monkeypatch.setattr(tune_gpu, "seconds", lambda work, times: next((taken for known, taken in clocks if known is work), 0.0))
    options = tune.Options(head_sizes=(16,), dtypes=("float32",), by="time")
    console = Console(file=io.StringIO(), width=200)
    with fused.forced(platform="gpu"):
        for _ in range(2):
            assert tune_gpu.run(options, tmp_path / "tiles.json", console) == 0
    assert tuned.read(tmp_path / "tiles.json") == {("flash, gpu", jax.devices()[0].device_kind, 64, 4): {0: small}}
    text = console.file.getvalue()
    assert "differs from the definition" in text and re.search(r"rows 16 x 32, 4 warps, 1 stages.* 0\.50 1\.00 +best", text)
    assert len(clocks) == 4  # the second time nothing is timed


def test_a_gpu_has_sizes_of_one_kernel(tmp_path):
    with fused.forced(platform="gpu"), pytest.raises(UsageError, match="--kernels: on a GPU .* flash alone .* got decode"):
        tune_gpu.run(tune.Options(kernels=("decode",)), tmp_path / "tiles.json", Console(file=io.StringIO()))
