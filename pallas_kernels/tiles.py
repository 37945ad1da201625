"""Default sizes of what the kernels work on at a time: one table by kernel, kind of device, head size and bytes of a number."""

import contextlib
import contextvars
from typing import Any, NamedTuple

from pallas_kernels import tuned

_ANY = 1 << 30


class Tile(NamedTuple):
    """``bq`` queries by ``bk`` keys (powers of two), on a GPU worked on by ``warps`` of 32 threads with loads ``stages`` tiles ahead."""

    bq: int
    bk: int
    warps: int = 0
    stages: int = 0


class Slab(NamedTuple):
    """At the most ``chunks`` of ``chunk`` tokens each, whose arrays fit in ``memory`` bytes."""

    chunk: int
    chunks: int
    memory: int


class Columns(NamedTuple):
    """As many columns (a key of a key-value head each) as make ``pairs`` with the rows, from ``least`` to ``most``, whose keys fit in ``memory`` bytes."""

    least: int
    most: int
    pairs: int
    memory: int


class Windows(NamedTuple):
    """At the most ``windows`` small windows a program, ``abreast`` at a time, whose arrays fit in ``memory`` bytes; on a GPU worked on by ``warps`` of 32
    threads, products in steps of ``chunk`` features.
    """

    windows: int
    abreast: int = 1
    memory: int = 0
    warps: int = 0
    chunk: int = 0


class Languages(NamedTuple):
    """In what the forward kernel of the recurrent engine is written, "pallas" or "triton", by decay: none, one for the head, one for each channel."""

    none: str
    head: str
    channel: str


class Tiles(NamedTuple):
    """A tile for each kernel of the pairs engine on a GPU.

    Attributes:
      rows: the fold over the keys of each query block.
      queries: the gradient by queries, keys inside.
      keys: the gradient by keys and values, queries inside.
      pairs: the gradient of operands that vary over pairs or offsets.
    """

    rows: Tile
    queries: Tile
    keys: Tile
    pairs: Tile

    @property
    def largest(self) -> tuple[int, int]:
        """The block sizes to which arrays are padded for the gradient: multiples of every other, all being powers of two."""
        return max(tile.bq for tile in self[1:]), max(tile.bk for tile in self[1:])


class Fits(NamedTuple):
    """Which calls an entry serves: on devices whose kind begins with ``device``, of heads of at most ``size``, numbers of at most ``bytes``, from ``length`` on."""

    device: str = ""
    size: int = _ANY
    bytes: int = _ANY
    length: int = 0

    def serves(self, device: str, size: int, itemsize: int, length: int) -> bool:
        """Whether a call is such a one."""
        return device.startswith(self.device) and size <= self.size and itemsize <= self.bytes and length >= self.length


# For each kernel what fits (see Fits) and sizes; the first that fits counts.
#
# GPU: chosen by what the compiler for sm_90 makes of them: sums stay in the 255 registers of a thread (the gradient by keys holds two sums a key, and alone
# spills, from head size 256 on or float32 at 128), tiles of all stages in 227 KiB of shared memory, and at least 64 rows, the height of a warp group's
# matrix product.
#
# TPU: by the compiler's schedules (``python -m experiments tpu_schedule``). Tiles small enough for the 64 vector registers, which do not spill, leave the
# matrix unit waiting and take two to four times as many instructions a pair; spills cost nothing while it is what kernels wait for. Every step adds 200 to 400
# instructions, which larger tiles share among more pairs; on the other hand more of their pairs are not allowed where a mask has its edges.
TABLE: dict[str, tuple[tuple[tuple, Any], ...]] = {
    "flash, gpu": (
        (("", 64, 2), Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2))),
        (("", 128, 2), Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 4, 2))),
        (("", 256, 2), Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 1))),
        (("", 64, 4), Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 8, 1))),
        (("", 128, 4), Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 1))),
        (("", 256, 4), Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1))),
        (("", _ANY, 8), Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))),
    ),
    "flash, tpu": (
        (Fits("TPU v6", size=256, length=2048), Tile(1024, 1024)),
        (Fits(size=128, bytes=4, length=4096), Tile(1024, 1024)),
        (Fits(size=256, bytes=2, length=4096), Tile(1024, 1024)),
        (Fits(), Tile(512, 512)),
    ),
    "linear language, gpu": ((("", _ANY, _ANY), Languages("pallas", "pallas", "pallas")),),
    "linear, tpu": ((("", _ANY, _ANY), Slab(chunk=128, chunks=8, memory=2**24)),),
    "window, tpu": ((("", _ANY, _ANY), Windows(windows=64, abreast=4, memory=2**23)),),
    "window, gpu": ((("", _ANY, _ANY), Windows(windows=64, warps=4, chunk=16)),),
    "decode, tpu": ((("", _ANY, _ANY), Columns(least=512, most=2048, pairs=2**16, memory=2**20)),),
}


_using: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("using", default=None)


@contextlib.contextmanager
def using(**entries):
    """Within it these entries stand for all others: ``using(**{"flash, tpu": Tile(256, 512)})``. What jit has traced before stays as it is."""
    token = _using.set({**(_using.get() or {}), **entries})
    try:
        yield
    finally:
        _using.reset(token)


def look_up(kernel: str, device: str, size: int, itemsize: int, length: int = 0):
    """The entry for a kernel ("flash, tpu"), a kind of device ("NVIDIA H200"; "" where unknown), a head size, the bytes of a number and a length.

    What :func:`using` says comes first, then the user's own table (:mod:`pallas_kernels.tuned`), then the defaults. ``length``: that all tiles of which some pairs are
    allowed span but for a few; 0 where unknown.
    """
    if kernel in (chosen := _using.get() or {}):
        return chosen[kernel]
    return tuned.find(kernel, device, size, itemsize, length) or default(kernel, device, size, itemsize, length)


def default(kernel: str, device: str, size: int, itemsize: int, length: int = 0):
    """The entry that comes with the kernels, as for :func:`look_up`."""
    return next(entry for fits, entry in TABLE[kernel] if Fits(*fits).serves(device, size, itemsize, length))


def choose_tiles(tiles: Tiles, queries: int, keys: int, busy: bool = False, block_sizes=None, least=(1, 1)) -> Tiles:
    """The tiles of a call of the pairs engine on a GPU.

    Args:
      tiles: the table's.
      queries, keys: lengths, beyond which no tile need reach.
      busy: whether more is done to a score than a plain softmax does. That takes registers a pair, so gradients get half the inner blocks.
      block_sizes: (bq, bk) for every kernel instead of the table's.
      least: the smallest block sizes, powers of two.
    """
    if busy:
        tiles = tiles._replace(queries=tiles.queries._replace(bk=tiles.queries.bk // 2), keys=tiles.keys._replace(bq=tiles.keys.bq // 2))

    def fit(tile: Tile) -> Tile:
        bq, bk = (tile.bq, tile.bk) if block_sizes is None else block_sizes
        return tile._replace(bq=min(max(bq, least[0]), power(queries)), bk=min(max(bk, least[1]), power(keys)))

    return Tiles(*map(fit, tiles))


def power(n: int, least: int = 16) -> int:
    """The least power of two that is at least n and ``least``, by default the smallest side of a matrix product."""
    return max(least, 1 << (n - 1).bit_length())
