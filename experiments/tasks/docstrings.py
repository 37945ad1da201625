"""Prose or code: 64 bytes of a docstring, or of a function's code without it, of the running Python's standard library; whole files held out."""

import ast
import functools
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

CLASSES, VOCABULARY, LENGTH = 2, 256, 64
_SMALL = 100_000  # bytes of the largest file that is read


def _pieces(source: str) -> tuple[list[str], list[str]]:
    """Docstrings, and bodies of functions after theirs."""
    prose, code, lines = [], [], source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first, text = node.body[0], ast.get_docstring(node, clean=False)
        if text:
            prose.append(text)
        body = node.body[1:] if text else [first]
        if body:
            code.append("".join(lines[body[0].lineno - 1:node.end_lineno]))
    return prose, code


def _windows(texts):
    """Successive windows of each, their indentation left out; int32 [n, LENGTH]."""
    windows = []
    for text in texts:
        data = " ".join(text.split()).encode()
        windows += [np.frombuffer(data[start:start + LENGTH], np.uint8) for start in range(0, len(data) - LENGTH + 1, LENGTH)]
    return np.array(windows, np.int32).reshape(-1, LENGTH)


@functools.cache
def split() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(windows int32 [n, 64], labels int32 [n]) to train on and those held out, as many of docstrings (1) as of code (0)."""
    sides: dict[bool, tuple[list[str], list[str]]] = {True: ([], []), False: ([], [])}
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if file.stat().st_size < _SMALL:
            pieces = _pieces(file.read_text(encoding="utf-8"))
            for found, new in zip(sides[zlib.crc32(file.name.encode()) % 5 == 0], pieces):
                found += new
    data = []
    for held in (False, True):
        prose, code = map(_windows, sides[held])
        count = min(len(prose), len(code))
        rng = np.random.default_rng(0)
        chosen = [x[rng.permutation(len(x))[:count]] for x in (code, prose)]
        data.append((np.concatenate(chosen), np.repeat(np.arange(2, dtype=np.int32), count)))
    return tuple(data)


def sampler(batch: int) -> Callable:
    """``sample(key) -> (windows int32 [batch, 64], labels)``, with replacement."""
    windows, labels = map(jnp.asarray, split()[0])

    def sample(key):
        chosen = jax.random.randint(key, (batch,), 0, len(labels))
        return windows[chosen], labels[chosen]

    return sample
