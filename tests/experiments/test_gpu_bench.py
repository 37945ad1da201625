"""The benchmark of GPU kernels where there is no GPU: it says so, and its contests run on emulated kernels."""

import io

import pytest
from rich.console import Console

from attnx.cli import UsageError
from attnx.core import fused
from experiments.gpu_bench import TOLERANCE, Options, bench, difference, main
from experiments.gpu_contests import OURS, contests


def test_refuses_without_a_gpu():
    with pytest.raises(UsageError, match="needs an NVIDIA GPU.*backend here is 'cpu'"):
        main("gpu_bench", [])


def test_checks_and_times_every_contestant_that_can_serve(tmp_path):
    options = Options(lengths=(64,), sizes=(16,), tokens=64, width=32, group=1, parts_length=64, selected_lengths=(), windows=(2,), eight_bit_lengths=(),
                      linear_lengths=(), decode_batches=(1,), decode_lengths=(64,), copied=1, rounds=1, seconds=0.0, out=tmp_path)
    with fused.forced(platform="gpu"):
        rows = bench(options, Console(file=io.StringIO()))["results"]
    assert (tmp_path / "gpu_bench.json").exists()
    problems = {row["name"] for row in rows if "problem" in row}
    assert problems == {"cuDNN"}  # which a CPU has not
    timed = [row for row in rows if "problem" not in row]
    assert {(row["name"], row["pass"]) for row in timed} >= {(OURS, "forward"), (OURS, "backward"), ("16 documents", "backward"), ("softpick", "forward")}
    assert {row["name"] for row in timed if "windows" in row["contest"]} == {OURS, "XLA", "flash, a window a sequence"}
    plain = [row for row in timed if row["name"] == "causal softmax"]
    assert [row["speed"] for row in plain] == [1.0, 1.0]
    assert [row["name"] for row in timed if row["floor"] is not None] == [OURS, "XLA"]  # that decode


def test_other_engines_agree_with_their_definitions():
    """The first contest of each, forward."""
    options = Options(sizes=(16,), width=16, selected_lengths=(64,), chosen=1, eight_bit_lengths=(64,), linear_lengths=(16,), tokens=16)
    found = {contest.name.split()[0]: contest for contest in reversed(contests(options))}
    for name in ("1", "eight", "recurrent,"):
        contest = found[name]
        arrays = contest.arrays(contest.small)
        entry = contest.entries(contest.small.length)[{"1": "any blocks", "eight": f"{OURS}, values int8"}.get(name, OURS)]
        with fused.forced(platform="gpu"):
            got = entry.passes(*arrays)
            assert difference({"forward": got["forward"]}, entry.expected(*arrays)[:1]) < TOLERANCE
