"""The papers and their references."""

import dataclasses
import difflib
import functools
import json
import re
import unicodedata
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper of the catalogue."""

    number: int
    """Its number in the catalogue."""
    id: str
    """Its short name."""
    title: str
    """As published."""
    authors: tuple[str, ...]
    """The first eight; then 'others'."""
    year: int
    """Of its first version."""
    arxiv: str | None
    """Its arXiv id."""
    venue: str | None
    """Where it appeared."""
    code: str | None
    """The authors' code, owner/name on GitHub."""
    room: str
    """The part of the house where it lives: what it changes."""
    kind: str
    """What it is: operator, module, model, training, steering, analysis or system."""

    @property
    def module(self) -> str:
        """Its name as a Python module."""
        return self.id.replace("-", "_")

    @property
    def reference(self) -> str:
        """One line: authors, title, year and where to find it."""
        first = ", ".join(self.authors[:3]) + (" et al." if len(self.authors) > 3 else "")
        return f'{first}: "{self.title}" ({self.source})'

    @property
    def source(self) -> str:
        """Where it appeared, or when, and its arXiv id."""
        return ", ".join(filter(None, (self.venue or str(self.year), self.arxiv and f"arXiv {self.arxiv}")))

    @property
    def bibtex(self) -> str:
        """Its BibTeX entry.

        >>> print(paper("transformer").bibtex)
        @article{vaswani2017attention,
          title = {{Attention Is All You Need}},
          author = {Ashish Vaswani and Noam Shazeer and Niki Parmar and Jakob Uszkoreit and Llion Jones and Aidan N. Gomez and Łukasz Kaiser and Illia Polosukhin},
          year = {2017},
          journal = {NeurIPS 2017},
          eprint = {1706.03762},
          archivePrefix = {arXiv}
        }
        """
        fields = {"title": f"{{{self.title}}}", "author": " and ".join(self.authors), "year": str(self.year), "journal": self.venue}
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
        return f"@article{{{self._key},\n" + ",\n".join(lines) + "\n}"

    @property
    def _key(self):
        plain = unicodedata.normalize("NFKD", self.authors[0].split()[-1]).encode("ascii", "ignore").decode()
        words = [word for word in re.findall(r"[a-z]+", self.title.lower()) if word not in ("a", "an", "the", "on", "of")]
        return f"{re.sub('[^a-z]', '', plain.lower())}{self.year}{words[0]}"


@functools.cache
def papers() -> dict[str, Paper]:
    """All papers by id, in the order of their numbers.

    >>> len(papers())
    242
    """
    records = json.loads(resources.files("attnx.catalogue").joinpath("papers.json").read_text(encoding="utf-8"))
    return {record["id"]: Paper(**record | {"authors": tuple(record["authors"])}) for record in records}


def paper(id: str) -> Paper:
    """The paper of an id.

    Raises:
      KeyError: for an id that no paper has, with the nearest ones.

    >>> paper("softpick").arxiv
    '2504.20966'
    """
    known = papers()
    if id not in known:
        near = difflib.get_close_matches(str(id), known, n=3, cutoff=0.4)
        raise KeyError(f"id: no paper {id!r}; {'did you mean ' + ', '.join(near) + '?' if near else '`attnx list` shows all'}")
    return known[id]
