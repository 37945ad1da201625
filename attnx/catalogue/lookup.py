"""Finding entries, and citing what they are about."""

import functools
import importlib
import pkgutil
from typing import Any

from attnx.catalogue import rows
from attnx.catalogue.entry import Entry
from attnx.catalogue.papers import paper, papers


@functools.cache
def entries() -> dict[str, Entry]:
    """The finished rows by id, in the order of the catalogue. Imports all of them.

    >>> entries()["softpick"].objects[0].__name__
    'softpick'
    """
    found = {module.name: importlib.import_module(f"{rows.__name__}.{module.name}").entry for module in pkgutil.iter_modules(rows.__path__)}
    return {id: found[paper.module] for id, paper in papers().items() if paper.module in found}


def entry(id: str) -> Entry | None:
    """The finished row of a paper, or None; imports nothing else.

    Raises:
      KeyError: for an id that no paper has.
    """
    name = f"{rows.__name__}.{paper(id).module}"
    return importlib.import_module(name).entry if importlib.util.find_spec(name) else None


def cite(what: Any) -> str:
    """BibTeX of the papers behind something.

    Args:
      what: the id of a paper; or a function, class or instance of this library.

    Returns:
      One entry a paper.

    Raises:
      KeyError: for an id that no paper has.
      ValueError: for something that is no paper's.

    >>> import attnx
    >>> print(attnx.cite(attnx.weights.softpick))
    @article{zuhri2025softpick,
      title = {{Softpick: No Attention Sink, No Massive Activations with Rectified Softmax}},
      author = {Zayd M. K. Zuhri and Erland Hilman Fuadi and Alham Fikri Aji},
      year = {2025},
      eprint = {2504.20966},
      archivePrefix = {arXiv}
    }
    """
    if isinstance(what, str):
        return paper(what).bibtex
    found = [id for id, row in entries().items() if any(thing is what or thing is type(what) for thing in row.objects)]
    if not found:
        raise ValueError(f"what: expected the id of a paper or something that one introduced, got {what!r}; `attnx list` shows the papers")
    return "\n\n".join(papers()[id].bibtex for id in found)
