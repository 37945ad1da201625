"""Text as arrays of tokens: reading files, holding some of them out, and batches of windows for training and evaluation."""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attnx.training.errors import DataError

SEPARATOR = 0
"""The token before each file: the byte that text does not use."""

_NOT_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_PARTS = 64  # into how many a single file is cut


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files, one after another in one array, each after a separator.

    Args:
      names: names of the files, in the order of the array.
      tokens: [N], integers: for each file the separator and its tokens.
      starts: [files + 1], where in ``tokens`` each file begins, and N.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, files: Sequence[tuple[str, np.ndarray]]) -> "Corpus":
        """The corpus of (name, tokens) pairs.

        Example:
          >>> corpus = Corpus.of([('a', np.array([7, 8])), ('b', np.array([9]))])
          >>> corpus.tokens, corpus.starts
          (array([0, 7, 8, 0, 9]), array([0, 3, 5]))
        """
        separator = np.full(1, SEPARATOR, files[0][1].dtype)
        return cls(names=tuple(name for name, _ in files),
                   tokens=np.concatenate([part for _, tokens in files for part in (separator, tokens)]),
                   starts=np.cumsum([0] + [len(tokens) + 1 for _, tokens in files]))

    def file(self, index: int) -> np.ndarray:
        """The tokens of a file, its separator first."""
        return self.tokens[self.starts[index]:self.starts[index + 1]]

    def split(self, fraction: float = 0.1) -> tuple["Corpus", "Corpus"]:
        """Holds out about ``fraction`` of the files, whole: ``(training, held_out)``.

        Which ones depends on their names alone, so the files of an older text stay on their side when others join. At least one is
        held out and at least one is not.

        Raises:
          DataError: for fewer than two files.
        """
        if len(self.names) < 2:
            raise DataError(f"needs two files or more, to train on some and hold out others; got {', '.join(self.names)}")
        order = sorted(range(len(self.names)), key=lambda i: _uniform(self.names[i]))
        count = sum(_uniform(name) < fraction for name in self.names)
        held = set(order[:min(max(count, 1), len(order) - 1)])
        return self._take([i for i in range(len(order)) if i not in held]), self._take(sorted(held))

    def _take(self, indices: list[int]) -> "Corpus":
        return Corpus.of([(self.names[i], self.file(i)[1:]) for i in indices])


def read(path: str | os.PathLike | None = None, encode: Callable[[bytes], Sequence[int]] | None = None) -> Corpus:
    """Reads text.

    Args:
      path: a folder, of which all files are read but hidden ones; or a file, whose 64 parts stand for files. By default the
        source of the running Python's standard library, without its tests and installed packages: some 12 MB that every Python has.
      encode: a tokenizer, bytes to token ids; by default tokens are bytes.

    Returns:
      A :class:`Corpus` with names relative to ``path``, in their order.

    Raises:
      DataError: for a path that does not exist, cannot be read or has no text.
    """
    root = Path(sysconfig.get_path("stdlib") if path is None else path).expanduser()
    try:
        if root.is_file():
            files = _parts(root.name, root.read_bytes())
        else:
            names = sorted(name.as_posix() for name in _names(root, library=path is None))
            files = [(name, (root / name).read_bytes()) for name in names]
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror}") from error
    files = [(name, content) for name, content in files if content]
    if not files:
        raise DataError(f"no text in {root}")
    return Corpus.of([(name, np.frombuffer(content, np.uint8) if encode is None else np.asarray(encode(content), np.int32))
                      for name, content in files])


def _names(root: Path, library: bool) -> Iterator[Path]:
    """Relative names of the text files below a folder."""
    def fail(error):
        raise error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and not (library and name in _NOT_TEXT)]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and (name.endswith(".py") or not library) and path.is_file():
                yield path.relative_to(root)


def _parts(name: str, content: bytes) -> list[tuple[str, bytes]]:
    """A file in parts of about equal size, as if they were files."""
    size = -(-len(content) // _PARTS) or 1
    return [(f"{name}:{start}", content[start:start + size]) for start in range(0, len(content), size)]


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


class Windows:
    """A corpus cut into windows of ``length`` tokens and the token after each: the random-access source of :func:`batches`.

    Window i is a dict of ``tokens`` int32 [length + 1] and ``segment_ids`` int32 [length + 1], which number the files in the window.

    Raises:
      DataError: for a corpus that does not fill one window.

    Example:
      >>> windows = Windows(Corpus.of([('a', np.arange(1, 4)), ('b', np.arange(5, 9))]), 4)
      >>> len(windows), windows[1]['tokens'], windows[0]['segment_ids']
      (2, array([0, 5, 6, 7, 8], dtype=int32), array([0, 0, 0, 0, 1], dtype=int32))
    """

    def __init__(self, corpus: Corpus, length: int):
        self.corpus, self.length = corpus, length
        if len(self) == 0:
            raise DataError(f"needs {length + 1} tokens or more to fill a window, got {len(corpus.tokens)}")

    def __len__(self):
        return (len(self.corpus.tokens) - 1) // self.length

    def __getitem__(self, index):
        first = index * self.length
        positions = np.arange(first, first + self.length + 1)
        files = np.searchsorted(self.corpus.starts, positions, side="right")
        return {"tokens": self.corpus.tokens[positions].astype(np.int32), "segment_ids": (files - files[0]).astype(np.int32)}


def batches(corpus: Corpus, *, length: int, batch_size: int, seed: int = 0, process_index: int = 0, process_count: int = 1):
    """An endless iterator over batches of shuffled windows.

    Epoch after epoch, in an order that depends on ``seed`` and the epoch. Batch b holds the same windows whatever the number of processes: each
    gets an equal share. ``get_state()`` and ``set_state(state)`` of the iterator, with a JSON-able state that is the same in all
    processes, resume it anywhere in an epoch.

    Args:
      corpus: the text.
      length: T, tokens that a model reads; windows have one more, to predict.
      batch_size: B, windows in a batch, of all processes together.
      seed: of the shuffle.
      process_index, process_count: which share of each batch to yield.

    Returns:
      A grain iterator over dicts of the arrays of :class:`Windows`, [B / process_count, length + 1].

    Raises:
      DataError: for a corpus that does not fill a window.
      ValueError: for a batch that does not divide among the processes.
    """
    import grain  # of the extra `experiments`; the rest of this module does without

    if batch_size % process_count:
        raise ValueError(f"batch_size: expected a multiple of process_count = {process_count}, got {batch_size}")
    dataset = grain.MapDataset.source(Windows(corpus, length)).seed(seed).shuffle().repeat()
    dataset = dataset[process_index::process_count].batch(batch_size // process_count)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


class Spans(NamedTuple):
    """Windows of a corpus to evaluate a model on, each within one file.

    Attributes:
      tokens: int32 [n, length + 1]; a model reads all but the last and predicts all but the first.
      valid: bool [n, length], which predictions count (the last window of a file may be short).
      positions: int64 [n, length], where in the corpus each predicted token is.
      file: int64 [n], the index of the file.
    """

    tokens: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    file: np.ndarray


def spans(corpus: Corpus, length: int, per_file: int) -> Spans:
    """Evaluation windows: up to ``per_file`` a file, evenly spread over it; files share no window and no token is predicted twice.

    Example:
      >>> spans(Corpus.of([('a', np.arange(1, 7))]), length=4, per_file=2).tokens
      array([[0, 1, 2, 3, 4],
             [4, 5, 6, 0, 0]], dtype=int32)
    """
    starts, ends, file = [], [], []
    for index, (first, end) in enumerate(zip(corpus.starts[:-1], corpus.starts[1:])):
        count = -(-(end - first - 1) // length)
        chosen = np.unique(np.linspace(0, count - 1, min(count, per_file)).astype(int))
        starts.extend(first + chosen * length)
        ends.extend([end] * len(chosen))
        file.extend([index] * len(chosen))
    reads = np.array(starts)[:, None] + np.arange(length + 1)
    inside = reads < np.array(ends)[:, None]
    reads = np.where(inside, reads, 0)
    tokens = np.where(inside, corpus.tokens[reads], SEPARATOR).astype(np.int32)
    return Spans(tokens, inside[:, 1:], reads[:, 1:], np.array(file))

