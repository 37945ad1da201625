"""Tile sizes of the GPU kernels: one table by device, head size and bytes of a number."""

from typing import NamedTuple

from pallas_kernels.triton import power


class Tile(NamedTuple):
    """``bq`` queries by ``bk`` keys (powers of two), worked on by ``warps`` of 32 threads with loads ``stages`` tiles ahead."""

    bq: int
    bk: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """A tile for each kernel.

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
        return tuple(max(tile[axis] for tile in self[1:]) for axis in (0, 1))


# (device kind begins with, head size at most, bytes of a number at most): the first entry that fits. Chosen by what the compiler for sm_90 makes of them:
# sums stay in the 255 registers of a thread (the gradient by keys holds two sums a key, and alone spills, from head size 256 on or float32 at 128),
# tiles of all stages in 227 KiB of shared memory, and at least 64 rows, the height of a warp group's matrix product.
TABLE = (
    (("", 64, 2), Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2))),
    (("", 128, 2), Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 4, 2))),
    (("", 256, 2), Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 1))),
    (("", 64, 4), Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 8, 1))),
    (("", 128, 4), Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 1))),
    (("", 256, 4), Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1))),
    (("", 1 << 30, 8), Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))),
)


def choose_tiles(device: str, size: int, itemsize: int, queries: int, keys: int, busy: bool = False, block_sizes=None) -> Tiles:
    """The tiles of a call.

    Args:
      device: the kind of device, such as "NVIDIA H200".
      size: the larger of head size and value size.
      itemsize: bytes of a number.
      queries, keys: lengths, beyond which no tile need reach.
      busy: whether more is done to a score than a plain softmax does. That takes registers a pair, so gradients get half the inner blocks.
      block_sizes: (bq, bk) for every kernel instead of the table's.
    """
    tiles = next(tiles for (kind, most, bytes_), tiles in TABLE if device.startswith(kind) and size <= most and itemsize <= bytes_)

    if busy:
        tiles = tiles._replace(queries=tiles.queries._replace(bk=tiles.queries.bk // 2), keys=tiles.keys._replace(bq=tiles.keys.bq // 2))

    def fit(tile: Tile) -> Tile:
        bq, bk = (tile.bq, tile.bk) if block_sizes is None else block_sizes
        return tile._replace(bq=min(bq, power(queries)), bk=min(bk, power(keys)))

    return Tiles(*map(fit, tiles))
