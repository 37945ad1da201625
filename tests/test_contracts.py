"""The contracts, over all examples of the catalogue; and that they reject mechanisms that are broken."""

import contracts
import pytest

from attnx.catalogue import entries

ENTRIES = entries()


@pytest.mark.parametrize(("id", "index", "pattern"), contracts.cases(ENTRIES.values()))
def test_contracts(id, index, pattern):
    """An example in one of its patterns satisfies them all."""
    contracts.check(ENTRIES[id].examples[index], pattern)
