"""The user's own sizes of tiles, which ``attnx tune`` writes: a JSON file, read when a kernel is first traced.

The file is ``$ATTNX_TILES``, or ``tiles.json`` in the cache (``$ATTNX_CACHE``, or ``attnx`` in ``$XDG_CACHE_HOME`` or ~/.cache); with an empty ``ATTNX_TILES``
there is none. It holds::

    {"version": 1, "entries": [
        {"kernel": "flash, tpu", "device": "TPU v5 lite", "size": 128, "bytes": 2, "length": 0, "sizes": {"bq": 512, "bk": 1024}}, ...]}

An entry serves heads of its class of sizes and numbers of so many bytes, on devices of exactly this kind, in calls of at least its length; what else it says
is for its reader. Hosts of one job must have the same file, as they must compile the same program.
"""

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any, get_type_hints

VERSION = 1
_KEYS = {"kernel": str, "device": str, "size": int, "bytes": int, "length": int, "sizes": dict}
_POWERS = {"bq", "bk", "chunk", "chunks", "warps", "least", "most"}  # fields that are powers of two
_LANES = {"bq", "bk", "chunk", "least", "most"}  # of which those of a TPU fill whole vectors
_LANGUAGES = ("pallas", "triton")


class TableError(ValueError):
    """A file of tile sizes that cannot be used; the message names it."""


def location() -> Path | None:
    """Where the user's table is, or is to be; None for nowhere."""
    given = os.environ.get("ATTNX_TILES")
    if given is not None:
        return Path(given) if given else None
    own = os.environ.get("ATTNX_CACHE")
    return (Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnx") / "tiles.json"


def size_class(size: int) -> int:
    """The class of a head size, the least power of two from 64 that is no smaller."""
    return max(64, 1 << max(0, size - 1).bit_length())


@functools.cache
def table() -> dict[tuple[str, str, int, int], dict[int, Any]]:
    """The user's table as :func:`read` gives it, read once; where it cannot be used, nothing and a warning."""
    file = location()
    try:
        return {} if file is None else read(file)
    except TableError as error:
        warnings.warn(f"{error}; the default tile sizes serve", stacklevel=2)
        return {}


def find(kernel: str, device: str, size: int, itemsize: int, length: int):
    """The sizes that the user's table has for a call, or None."""
    known = table().get((kernel, device, size_class(size), itemsize), {})
    return known[max(fitting)] if (fitting := [least for least in known if least <= length]) else None


def read(file: Path) -> dict[tuple[str, str, int, int], dict[int, Any]]:
    """The sizes that a file holds, by (kernel, kind of device, class of head size, bytes of a number) and least length; none if it is not there.

    Raises:
      TableError: for a file that cannot be read, is no such table, or has an entry that no kernel can use.
    """
    found: dict[tuple[str, str, int, int], dict[int, Any]] = {}
    for entry in entries(file):
        found.setdefault((entry["kernel"], entry["device"], entry["size"], entry["bytes"]), {})[entry["length"]] = check(entry["kernel"], entry["sizes"])
    return found


def entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a file as they stand in it, checked; errors as of :func:`read`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"cannot read the tile sizes in {file}: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("entries"), list):
        raise TableError(f"{file} is no table of tile sizes: expected an object with version {VERSION} and a list of entries")
    for n, entry in enumerate(content["entries"]):
        try:
            _check_entry(entry)
        except ValueError as error:
            raise TableError(f"{file}, entry {n + 1}: {error}") from error
    return content["entries"]


def _check_entry(entry):
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {json.dumps(entry)[:100]}")
    for name, kind in _KEYS.items():
        if type(entry.get(name)) is not kind:
            raise ValueError(f"{name}: expected a {kind.__name__}, got {json.dumps(entry.get(name))[:100]}")
    if entry["size"] != size_class(entry["size"]):
        raise ValueError(f"size: expected a power of two from 64, got {entry['size']}")
    if entry["length"] < 0:
        raise ValueError(f"length: expected 0 or more, got {entry['length']}")
    check(entry["kernel"], entry["sizes"])


def check(kernel: str, sizes: dict[str, Any]):
    """A kernel's sizes from JSON, in the type that the table of defaults has for it.

    Raises:
      ValueError: for an unknown kernel, or numbers that it cannot use.

    >>> check("flash, tpu", {"bq": 512, "bk": 256})
    Tile(bq=512, bk=256, warps=0, stages=0)
    """
    from pallas_kernels.tiles import TABLE

    if kernel not in TABLE:
        raise ValueError(f"kernel: expected one of {'; '.join(TABLE)}, got {kernel!r}")
    return _build(type(TABLE[kernel][0][1]), sizes, 128 if kernel.endswith("tpu") else 16)


def _build(kind, sizes, least):
    """A named tuple ``kind`` of positive numbers, languages, the defaults of its fields, or such named tuples."""
    hints = get_type_hints(kind)
    unknown = [name for name in sizes if name not in hints] if isinstance(sizes, dict) else None
    missing = [name for name in hints if name not in sizes and name not in kind._field_defaults] if isinstance(sizes, dict) else None
    if unknown or missing or unknown is None:
        raise ValueError(f"sizes: expected {', '.join(hints)}, got {json.dumps(sizes)[:200]}")
    given = {name: x for name, x in sizes.items() if name not in kind._field_defaults or json.dumps(x) != json.dumps(kind._field_defaults[name])}
    return kind(**{name: _field(name, hints[name], x, least) for name, x in given.items()})


def _field(name, kind, x, least):
    if kind is int:
        return _number(name, x, least)
    if kind is not str:
        return _build(kind, x, least)
    if x not in _LANGUAGES:
        raise ValueError(f"{name}: expected one of {', '.join(_LANGUAGES)}, got {json.dumps(x)[:100]}")
    return x


def _number(name, x, least):
    least = least if name in _LANES else 1
    if type(x) is not int or x < least or (name in _POWERS and x & (x - 1)):
        raise ValueError(f"{name}: expected a {'power of two' if name in _POWERS else 'whole number'} and at least {least}, got {json.dumps(x)[:100]}")
    return x
