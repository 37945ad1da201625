"""The example of every docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import attnx
import pallas_kernels


def modules():
    """The names of all modules of the packages."""
    for package in (attnx, pallas_kernels):
        yield package.__name__
        yield from (module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))


@pytest.mark.parametrize("name", list(modules()))
def test_doctests(name):
    """All examples of one module; kernels in Triton itself import it."""
    if name.endswith(".triton_kernel"):
        pytest.importorskip("triton")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
