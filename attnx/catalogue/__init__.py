"""A row a paper: what is here, where, whom to cite and how to try it.

:func:`papers` has all of them; :func:`entries` those whose mechanisms are finished, each described in a file of ``attnx/catalogue/rows``.
"""

from attnx.catalogue.entry import PATTERNS, SEEN, Case, Entry, Example, Input, stream
from attnx.catalogue.lookup import cite, entries, entry
from attnx.catalogue.papers import Paper, paper, papers

__all__ = ["PATTERNS", "SEEN", "Case", "Entry", "Example", "Input", "Paper", "cite", "entries", "entry", "paper", "papers", "stream"]
