"""English: docstrings of the running Python's standard library."""

import functools
import importlib
import inspect

import numpy as np

MODULES = ("argparse", "ast", "asyncio", "collections", "configparser", "csv", "datetime", "decimal", "difflib", "doctest", "email", "fractions", "functools", "heapq",
           "inspect", "itertools", "json", "logging", "multiprocessing", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "random", "re", "sched",
           "shutil", "smtplib", "socket", "sqlite3", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize",
           "typing", "unittest", "urllib.request", "uuid", "zipfile")


@functools.cache
def _docstrings() -> tuple[str, ...]:
    found = set()
    for name in MODULES:
        module = importlib.import_module(name)
        members = [thing for _, thing in inspect.getmembers(module, lambda thing: inspect.isroutine(thing) or inspect.isclass(thing))]
        found |= {inspect.getdoc(thing) or "" for thing in (module, *members)}
    return tuple(sorted(found))


def texts(seed: int, count: int, *, shortest: int = 60, longest: int = 400) -> list[str]:
    """Different docstrings of at least ``shortest`` characters, cut to ``longest``."""
    enough = [text[:longest] for text in _docstrings() if len(text) >= shortest]
    return [enough[index] for index in np.random.default_rng(seed).choice(len(enough), count, replace=False)]
