"""The rule, and the runner: what is recorded, resumed and skipped."""

import math
import types

import pytest
from rich.console import Console

from attnx import cli
from experiments import claim as runner
from experiments import evidence
from experiments.evidence import Claim, Criterion, judge, verdict


def test_rule():
    """Student's interval of three seeds, by hand; verdicts on either side; one seed says nothing, nor do numbers that are not."""
    found = judge([1.0, 2.0, 3.0])
    reach = 4.302652729911275 / math.sqrt(3)
    assert math.isclose(found.low, 2 - reach, rel_tol=1e-9) and math.isclose(found.high, 2 + reach, rel_tol=1e-9)
    assert found.verdict == "inconclusive"
    assert judge([2.0, 2.1, 1.9]).verdict == "held"
    assert judge([0.0, 0.0, 0.0]).verdict == "held"
    assert judge([-2.0, -2.1, -1.9]).verdict == "refuted"
    assert judge([5.0]).verdict == judge([1.0, math.nan, 1.0]).verdict == "inconclusive"
    held, refuted, unclear = judge([1.0, 1.0]), judge([-1.0, -1.0]), judge([-1.0, 1.0])
    assert [verdict(v) for v in ([held, held], [held, unclear], [held, unclear, refuted])] == ["held", "inconclusive", "refuted"]


def make(runs):
    def run(trial):
        runs.append(trial.seed)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return {"a": 1.0 + trial.seed, "b": [0.5, 0.25]}

    return Claim("softpick", run, (Criterion("a is positive", lambda m: m["a"]),), (("", "a"), {"row": ("a",)}),
                 lambda figure, seeds: figure.subplots().plot([seed["a"] for seed in seeds]))


def test_resume(tmp_path, monkeypatch):
    """An interrupted claim goes on with the next seed; a finished one is not run again; changed code starts over."""
    prints = iter("xxxxy")
    monkeypatch.setattr(evidence, "fingerprint", lambda claim: next(prints))
    runs, console = [], Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        runner.test(make(runs), tmp_path, console, seeds=3)
    assert runs == [0, 1, 2] and len(evidence.read("softpick", tmp_path)["seeds"]) == 2
    record = runner.test(make(runs), tmp_path, console, seeds=3)
    assert runs == [0, 1, 2, 2] and record["verdict"] == "inconclusive" and record["seeds"][2] == {"a": 3.0, "b": [0.5, 0.25]}
    assert (tmp_path / "softpick.png").exists()
    runner.test(make(runs), tmp_path, console, seeds=3)
    assert len(runs) == 4
    more = runner.test(make(runs), tmp_path, console, seeds=6)
    assert runs[4:] == [3, 4, 5] and more["verdict"] == "held"
    runner.test(make(runs), tmp_path, console, seeds=2)
    assert runs[7:] == [0, 1]


def test_fingerprint():
    """Depends on the claim's file, on what it imports of the experiments, and on the mechanism's file."""
    claim = evidence.load("forgetting-transformer")
    assert evidence.fingerprint(claim) == evidence.fingerprint(claim)
    assert evidence.fingerprint(claim) != evidence.fingerprint(make([]))


def test_errors(capsys):
    """Unknown papers and claims are told in one line."""
    entry = types.SimpleNamespace(name="claim", module="experiments.claim", load=lambda: runner.main)
    for arguments, message in ((["softpik"], "did you mean"), (["forgetting-transformer", "--seeds", "1"], "--seeds: expected 2"), ([], "ID")):
        assert cli.run("attnx", [entry], ["claim", *arguments]) == 2
        assert message in capsys.readouterr().err
