"""The benchmark of GPU kernels where there is no GPU: it says so, and its contests run on emulated kernels."""

import io

import pytest
from rich.console import Console

from attnx.cli import UsageError
from attnx.core import fused
from experiments.gpu_bench import OURS, Options, bench, main


def test_refuses_without_a_gpu():
    with pytest.raises(UsageError, match="needs an NVIDIA GPU.*backend here is 'cpu'"):
        main("gpu_bench", [])


def test_checks_and_times_every_contestant_that_can_serve(tmp_path):
    options = Options(lengths=(64,), sizes=(16,), tokens=64, width=32, group=1, parts_length=64, rounds=1, seconds=0.0, out=tmp_path)
    with fused.forced(platform="gpu"):
        rows = bench(options, Console(file=io.StringIO()))["results"]
    assert (tmp_path / "gpu_bench.json").exists()
    problems = {row["name"] for row in rows if "problem" in row}
    assert problems == {"cuDNN"}  # which a CPU has not
    timed = [row for row in rows if "problem" not in row]
    assert {(row["name"], row["pass"]) for row in timed} >= {(OURS, "forward"), (OURS, "backward"), ("16 documents", "backward"), ("softpick", "forward")}
    plain = [row for row in timed if row["name"] == "causal softmax"]
    assert [row["speed"] for row in plain] == [1.0, 1.0]
