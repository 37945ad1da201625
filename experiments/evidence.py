"""Claims, and the one rule by which evidence decides about them.

A claim is put to the test by running an experiment with several seeds. Its criteria are margins: numbers that a seed's measurements yield and that are
positive where that seed speaks for the claim (a difference to a baseline, less what was promised). Of each margin the interval

    mean +- t * standard error,        t the 97.5% quantile of Student's distribution with (seeds - 1) degrees of freedom

is taken over the seeds. A criterion is *held* if the interval has nothing below zero, *refuted* if it lies wholly below zero, and *inconclusive* otherwise. A claim
is refuted if one of its criteria is, held if all of them are, and inconclusive otherwise.
"""

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from attnx import catalogue
from attnx.cli import UsageError
from experiments import claims

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("held", "refuted", "inconclusive")


class Criterion(NamedTuple):
    """One thing that a claim says.

    Attributes:
      text: it, in words, with its unit.
      margin: of a seed's measurements, at least zero where they agree with it.
    """

    text: str
    margin: Callable[[Mapping[str, Any]], float]


class Trial(NamedTuple):
    """What an experiment is run with.

    Attributes:
      seed: of all randomness.
      smoke: whether it is to end in seconds, and what it measures means nothing.
      report: ``report(share, text)``: how far it is, 0 to 1, and with what.
    """

    seed: int
    smoke: bool = False
    report: Callable[[float, str], None] = lambda share, text: None

    def scaled(self, count: int, smoke: int = 3) -> int:
        """``count``, of steps or samples; few of them in a smoke."""
        return min(count, smoke) if self.smoke else count

    def part(self, begin: float, end: float) -> "Trial":
        """A trial whose progress is a part of this one's."""
        return self._replace(report=lambda share, text: self.report(begin + share * (end - begin), text))


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's claim and its test on a laptop.

    Attributes:
      id: of the paper.
      run: ``run(trial) -> measurements``: by name, numbers or lists of numbers that JSON can hold.
      criteria: what is claimed of them.
      table: ``(column titles, {row title: names of measurements})`` of what is shown, mean and standard deviation over seeds.
      draw: ``draw(figure, [measurements of each seed])`` fills a matplotlib figure.
      seeds: how many are run.
    """

    id: str
    run: Callable[[Trial], Mapping[str, Any]]
    criteria: tuple[Criterion, ...]
    table: tuple[Sequence[str], Mapping[str, Sequence[str]]]
    draw: Callable[[Any, Sequence[Mapping[str, Any]]], None]
    seeds: int = 3

    @property
    def statement(self) -> str:
        """What is tested and how: the docstring of the claim's file."""
        return inspect.getdoc(inspect.getmodule(self.run)) or ""


class Finding(NamedTuple):
    """What seeds say of a criterion: the mean of its margin, the ends of its interval and the verdict."""

    text: str
    mean: float
    low: float
    high: float
    verdict: str


def judge(margins: Sequence[float], text: str = "") -> Finding:
    """The rule, for one criterion.

    >>> judge([0.3, 0.4, 0.35]).verdict, judge([-1.0, -1.2, -1.1]).verdict, judge([0.5, -0.4, 0.2]).verdict
    ('held', 'refuted', 'inconclusive')
    """
    margins = np.asarray(margins, np.float64)
    if len(margins) < 2:
        return Finding(text, float(margins.mean()), -math.inf, math.inf, "inconclusive")
    mean, error = margins.mean(), margins.std(ddof=1) / math.sqrt(len(margins))
    reach = stats.t.ppf(0.975, len(margins) - 1) * error
    low, high = mean - reach, mean + reach
    verdict = "inconclusive" if not np.isfinite([low, high]).all() else "held" if low >= 0 else "refuted" if high < 0 else "inconclusive"
    return Finding(text, float(mean), float(low), float(high), verdict)


def findings(claim: Claim, seeds: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Of all criteria."""
    return [judge([criterion.margin(seed) for seed in seeds], criterion.text) for criterion in claim.criteria]


def verdict(found: Sequence[Finding]) -> str:
    """Of the claim.

    >>> verdict([judge([1.0, 1.0]), judge([-1.0, -1.0])])
    'refuted'
    """
    verdicts = {finding.verdict for finding in found}
    return "refuted" if "refuted" in verdicts else "held" if verdicts == {"held"} else "inconclusive"


def known() -> dict[str, str]:
    """The modules of all claims by id of their papers, in the order of the catalogue."""
    files = {module.name for module in pkgutil.iter_modules(claims.__path__)}
    return {paper.id: f"{claims.__name__}.{paper.module}" for paper in catalogue.papers().values() if paper.module in files}


def load(id: str) -> Claim:
    """The claim of a paper.

    Raises:
      UsageError: for a paper that does not exist or whose claim is not tested here.
    """
    try:
        paper = catalogue.paper(id)
    except KeyError as error:
        raise UsageError(error.args[0]) from error
    if id not in known():
        raise UsageError(f"the claim of {paper.id} is not tested here yet; `python -m experiments report --list` shows those that are")
    return importlib.import_module(known()[id]).claim


def fingerprint(claim: Claim) -> str:
    """A hash of the code that the result depends on, without comments and docstrings: the claim's file and what it imports of the experiments, and the files of the
    paper's mechanisms."""
    entry = catalogue.entry(claim.id)
    files = {inspect.getsourcefile(inspect.unwrap(thing)) for thing in (entry.objects if entry else ())}
    modules, seen = [inspect.getmodule(claim.run).__name__], set()
    while modules:
        name = modules.pop()
        if name in seen or not name.startswith("experiments.") or name == __name__:
            continue
        seen.add(name)
        spec = importlib.util.find_spec(name)
        files.add(spec.origin)
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names
                                           if node.module == "experiments.tasks")]
    digest = hashlib.sha256()
    for code in sorted(_code(Path(file)) for file in files):
        digest.update(code.encode())
    return digest.hexdigest()[:16]


def _code(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[:1] = [ast.Pass()]
    return ast.dump(tree)


def read(id: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """What is recorded of a claim, or None."""
    file = folder / f"{id}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write(id: str, record: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Records it, all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{id}.tmp"
    draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(folder / f"{id}.json")
