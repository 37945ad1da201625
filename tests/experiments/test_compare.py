"""The main job on a tiny text: it ends with numbers, resumes, and says no where it must."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from attnx.cli import UsageError
from attnx.training import DataError
from experiments import compare, train
from experiments.compare import Options
from experiments.language_model import LanguageModel, ModelOptions
from experiments.mechanisms import expand, mechanism


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = [b"alpha ", b"beta ", b"gamma\n", b"delta "]
    for i in range(30):
        chosen = np.random.default_rng(i).integers(0, 4, 60)
        (folder / f"{i}.txt").write_bytes(b"".join(words[j] for j in chosen))
    return folder


def options(text, out, **changes):
    return Options(**{**dict(data=str(text), out=out, features=16, layers=1, heads=2, length=16, batch=8, steps=30, save_every=10, windows=2,
                             attention=("softmax", "window")), **changes})


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compare"
    console = Console(record=True, width=80)
    return out, compare.compare(options(text, out), console), console.export_text()


def test_it_measures_and_reports(done):
    out, summary, shown = done
    assert [row["mechanism"] for row in summary["mechanisms"]] == ["softmax", "window"]
    for row in summary["mechanisms"]:
        assert 0 < row["bits_per_byte"] < 5 and row["spread"] > 0 and 0 < row["longer"]["bits_per_byte"] < 8
        assert row["tokens_per_second"] > 0 and row["memory_bytes"] > 1000 and len(row["by_position"]) == 64
        assert f"{row['bits_per_byte']:.3f}" in shown
    assert summary["mechanisms"][1]["state_bytes"] < summary["mechanisms"][0]["state_bytes"]
    orders = [row["bits_per_byte"] for row in summary["ngrams"]]
    assert [row["order"] for row in summary["ngrams"]] == [1, 2, 3] and orders == sorted(orders, reverse=True)
    assert json.loads((out / "compare.json").read_text()) == summary
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, shown.splitlines())) <= 80


def test_called_again_it_trains_nothing_and_says_the_same(done, text, monkeypatch):
    out, summary, shown = done
    monkeypatch.setattr("experiments.run.Run.prepare", lambda self: pytest.fail("trained again"))
    assert compare.compare(options(text, out), Console(quiet=True)) == summary


def test_killed_while_training_it_goes_on(done, text, tmp_path, monkeypatch):
    """The interrupted mechanism goes on from its checkpoint and ends where an unbroken run did."""
    class Killed(BaseException):
        pass

    def killed(self, done, text):
        if "step 25" in text:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("experiments.progress.Meter.at", killed)
        compare.compare(options(text, tmp_path, attention=("softmax",)), Console(quiet=True))
    console = Console(record=True, width=80)
    summary = compare.compare(options(text, tmp_path, attention=("softmax",)), console)
    assert "softmax: resuming from step 20" in console.export_text()
    for name in ("bits_per_byte", "longer", "sample"):
        assert summary["mechanisms"][0][name] == done[1]["mechanisms"][0][name]


def test_a_folder_of_other_options_is_refused(done, text):
    with pytest.raises(UsageError, match=r"other options \(steps 30 there, 31 here\); choose another folder with --out, or remove it"):
        compare.compare(options(text, done[0], steps=31), Console(quiet=True))


def test_a_text_too_short_is_refused(text, tmp_path):
    with pytest.raises(DataError, match="no held-out file has 4000 bytes"):
        compare.compare(options(text, tmp_path / "out", length=1000), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_train_and_generate(text, tmp_path, capfdbinary):
    """One mechanism over devices, then text from its checkpoint."""
    from experiments import generate

    arguments = ("--features 16 --layers 1 --heads 2 --length 16 --batch 4 --steps 4 --save-every 2 --separate --accumulate 2 "
                 f"--mesh-data 2 --mesh-tensor 2 --data {text} --out {tmp_path}").split()
    with pytest.raises(UsageError, match="number of devices"):
        train.main("attnx train", arguments)
    assert train.main("attnx train", [*arguments, "--mesh-fsdp", "2"]) == 0
    assert b"bits per byte" in capfdbinary.readouterr().out
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    for seed in "1", "1":
        assert generate.main("attnx generate", [str(tmp_path), "--prompt", "alpha", "--length", "9", "--seed", seed]) == 0
    out = capfdbinary.readouterr().out
    assert len(out) == 2 * (5 + 9 + 1) and out[:15] == out[15:] and out.startswith(b"alpha")


def test_a_paper_by_its_id_and_its_recall(text, tmp_path, monkeypatch):
    """And of one that cannot read more than in training."""
    console, names = Console(record=True, width=90), ("softmax", "ff-attention-replacement")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: attnx compare -->\n<!-- end: attnx compare -->\nafter")
    given = options(text, tmp_path / "runs", attention=names, length=32, steps=3, recall_steps=2, write=page)
    summary = compare.compare(given, console)
    assert all(0 <= row["recall"] < 0.5 and row["mechanism"] in names for row in summary["mechanisms"]) and names[1] in console.export_text()
    assert [(row["longer"] is None, len(row["by_position"])) for row in summary["mechanisms"]] == [(False, 128), (True, 32)]
    assert (tmp_path / "runs" / "compare.png").read_bytes().startswith(b"\x89PNG")
    lines = page.read_text().splitlines()
    ranked = sorted(summary["mechanisms"], key=lambda row: row["bits_per_byte"])
    expected = ["", *(f"n-gram order {order}" for order in (1, 2, 3)), *(row["mechanism"] for row in ranked)]
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == expected
    assert "--steps 3" in page.read_text() and (lines[0], lines[-1]) == ("before", "after")
    monkeypatch.setattr(compare, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert compare.compare(given, Console(quiet=True)) == summary


BOUNDED = "ff-attention-replacement", "optimised-efficient-super-attention"
"""Papers with weights for each position."""


def test_all_causal_names_what_is_there():
    names = expand(["all-causal"])
    assert len(names) == len(set(names)) > 10 and {"softmax", "forgetting-transformer"} <= set(names)
    for name in names:
        model = LanguageModel(ModelOptions(features=16, layers=1, heads=2), mechanism(name, 16, 2))
        assert jax.eval_shape(model.nats, model.abstract, jax.ShapeDtypeStruct((2, 17), "int32")).shape == (2, 16) and model.state_bytes(16) > 0
        assert model.reads(64) == (name not in BOUNDED), name


@pytest.mark.parametrize("names, message", [(("fftnet",), "no causal attention"), (("yolov12",), "not here yet|unknown"), (("softmax",) * 2, "different names")])
def test_names_that_cannot_be_trained(names, message):
    with pytest.raises(UsageError, match=message):
        for name in compare._settle(Options(attention=names)).attention:
            mechanism(name, 16, 2)
