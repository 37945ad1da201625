"""The command line: what a user sees of right and wrong lines."""

import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from attnx import cli

ROOT = Path(__file__).parents[1]


def commands(*modules):
    return [EntryPoint(name, f"{module}:main", cli.GROUP) for name, module in modules]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes modules of commands."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, body, docstring="Does a thing."):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(f'"""{docstring}\n\nMore."""\n{body}\n')
        return commands((name, name))

    return make


def one_line(capsys):
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out
    return err


def test_help_names_and_describes_the_commands_without_importing_them(command, capsys):
    found = command("spin", "import nowhere") + commands(("absent", "no_such_module"))
    assert cli.run("attnx", found, ["--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"spin +Does a thing\.", out) and re.search(r"absent +\(not installed\)", out)


def test_runs_a_command_with_the_rest_of_the_line(command, capsys):
    found = command("echo", "def main(program, arguments):\n    print(program, arguments)\n    return 3")
    assert cli.run("attnx", found, ["echo", "a", "--b"]) == 3
    assert capsys.readouterr().out == "attnx echo ['a', '--b']\n"


def test_unknown_command(command, capsys):
    found = command("compare", "")
    assert cli.run("attnx", found, ["compre"]) == 2
    assert "did you mean 'compare'" in one_line(capsys)
    assert cli.run("attnx", found, ["zzz"]) == 2
    assert "expected one of: compare" in one_line(capsys)


@pytest.mark.parametrize("body, code, message", [
    ("import a_missing_package", 2, 'attnx fail: needs a_missing_package, which is not installed: pip install "attnx[experiments]"'),
    ("def main(*_):\n    import a_missing_package.part", 2, "needs a_missing_package"),
    ("from attnx.cli import UsageError\ndef main(*_):\n    raise UsageError('a\\nb')", 2, "attnx fail: a b"),
    ("from attnx.training import TrainingError\ndef main(*_):\n    raise TrainingError('disk')", 1, "attnx fail: disk"),
    ("def main(*_):\n    raise KeyboardInterrupt", 130, "attnx fail: interrupted"),
])
def test_expected_failures_are_one_line(command, capsys, body, code, message):
    assert cli.run("attnx", command("fail", body), ["fail"]) == code
    assert message in one_line(capsys)


@pytest.mark.parametrize("body", ["def main(*_):\n    raise RuntimeError('bug')", "import attnx.no_such_part\n"])
def test_bugs_show_where_they_are(command, body):
    with pytest.raises((RuntimeError, ModuleNotFoundError)):
        cli.run("attnx", command("fail", body), ["fail"])


def test_the_commands_of_this_project_can_be_found():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, value in project["entry-points"][cli.GROUP].items():
        assert callable(EntryPoint(name, value, cli.GROUP).load())
    assert EntryPoint("attnx", project["scripts"]["attnx"], "").load() is cli.main


@pytest.mark.parametrize("line, message", [
    ("compare --stpes 3", "Unrecognized options: --stpes"),
    ("compare --steps many", "--steps"),
    ("compare --steps 0", "--steps: expected 1 or more, got 0"),
    ("compare --attention softmax softmax", "--attention: expected one or more different names"),
    ("compare --attention nothing", "unknown mechanism 'nothing'; expected one of: softmax"),
    ("compare --attention no_such:thing", "no_such"),
    ("compare --data /no/such/text", "cannot read /no/such/text: No such file or directory"),
    ("compare --batch 3 --accumulate 2", "--batch: expected a multiple of --accumulate 2, got 3"),
    ("train --heads 3", "num_heads"),
    ("train --mesh-data 5", "mesh: expected sizes whose product is the number of devices"),
    ("generate /no/such/run", "no run in /no/such/run"),
    ("generate no.gguf", "no model in 'no.gguf': expected a .gguf file"),
    ("fetch smollm", "unknown model 'smollm'; expected one of: minilm-l6, smollm2-135m"),
    ("generate . --temperature -1", "--temperature: expected 0 or more"),
    ("generate . --top-k 0", "--top-k: expected 1 to 256, got 0"),
])
def test_wrong_lines_of_this_project(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *arguments = line.split()
    assert cli.run("attnx", commands((name, f"experiments.{name}")), [name, *arguments]) == 2
    err = one_line(capsys)
    assert err.startswith(f"attnx {name}: ") and message in err
    assert not list(tmp_path.iterdir())


def test_help_of_a_command_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run("attnx", commands(("compare", "experiments.compare")), ["compare", "--help"])
    out = capsys.readouterr().out
    assert not stop.value.code and "--attention" in out and "held out" in out
