"""The catalogue: its references, its entries and what is generated from it."""

import importlib
import pkgutil

import pytest

import attnx
from attnx import catalogue
from attnx.catalogue import rows
from experiments import evidence, papers, report

ROOMS = [room for room in papers.ROOMS if room != "kernels"]


def test_references():
    """Each of 242 papers has a number, a reference and a room of its own."""
    found = catalogue.papers()
    assert [paper.number for paper in found.values()] == list(range(1, 243))
    assert len({paper.module for paper in found.values()}) == 242
    assert len({paper.bibtex.partition(",")[0] for paper in found.values()}) > 235  # keys: surname, year and first word may coincide
    for paper in found.values():
        assert paper.authors and 1990 < paper.year < 2030 and paper.title and paper.room in papers.ROOMS, paper.id


@pytest.mark.parametrize("module", [module.name for module in pkgutil.iter_modules(rows.__path__)])
def test_entries(module):
    """A row is named by its paper; its objects are exported, documented and cited; its examples are complete; its claim has a test."""
    entry = importlib.import_module(f"{rows.__name__}.{module}").entry
    paper = catalogue.paper(entry.id)
    assert paper.module == module
    assert entry.objects and entry.equation.strip() and entry.claim.strip()
    for thing in entry.objects:
        assert (thing.__doc__ or "").strip(), thing
        assert paper.bibtex in attnx.cite(thing)
        package = importlib.import_module(thing.__module__.rpartition(".")[0])
        assert getattr(package, thing.__name__) is thing, f"{thing.__name__} is not exported by {package.__name__}"
    for example in entry.examples:
        assert example.mask is None or example.mask in example.inputs
        assert set(example.patterns) <= set(catalogue.PATTERNS)
    assert entry.id in evidence.known(), "no claim"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms(room):
    """No export has the name of a module, which Python would put in its place."""
    package = importlib.import_module(f"attnx.{room}")
    lazy = getattr(package, "_LAZY", {})
    for module, names in lazy.items():
        assert module not in package.__all__
        for name in names:
            thing = getattr(package, name)
            assert getattr(thing, "__module__", f"attnx.{room}.{module}") == f"attnx.{room}.{module}", name


def test_cite():
    """By id, by object and by instance; errors say what would work."""
    assert attnx.cite("softpick") == attnx.cite(attnx.weights.softpick)
    with pytest.raises(KeyError, match="did you mean .*softpick"):
        attnx.cite("softpik")
    with pytest.raises(ValueError, match="what: expected"):
        attnx.cite(len)


def test_pages():
    """docs/PAPERS.md and experiments/RESULTS.md are what would be generated."""
    assert papers.PAGE.read_text(encoding="utf-8") == papers.page()
    assert (evidence.RESULTS.parent / "RESULTS.md").read_text(encoding="utf-8") == report.results()


def test_records():
    """Every record is of a whole run of a claim, not of a smoke, and its verdict follows by the rule from its numbers."""
    for id in evidence.known():
        record = evidence.read(id)
        if record is None:
            continue
        claim = evidence.load(id)
        assert not record["smoke"] and len(record["seeds"]) >= 3, id
        found = evidence.findings(claim, record["seeds"])
        assert evidence.verdict(found) == record["verdict"], id
        assert (evidence.RESULTS / f"{id}.png").exists(), id
