"""Plans of decoding, made on the host: who reads which tiles of whose cache, and how long that takes.

The keys of every (batch element, key head), an *output*, are cut into tiles. A plan lists *segments*, runs of tiles of one output that one worker reads into one partial
state, ordered by output. Three ways of making the list:

    no_split_plan       each output is a worker's (FlashAttention-2)
    fixed_split_plan    each output is cut into equally many pieces (Flash-Decoding); a second kernel merges them
    stream_k_plan       the tiles of all outputs one after another are cut into equal shares, across outputs (Lean Attention); who reads an output's
                        first tile, its host, merges the others' states

The kernels of this package build the third at run time, from lengths that only the device knows (:mod:`pallas_kernels.decode.schedule`), with the heads of a
batch element in one tile; plans say what it gains.

Sanovar, Bharadwaj, St. Amant, Ruehle, Rajmohan: "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers" (2024,
arXiv 2405.10480).
"""

import heapq
from typing import NamedTuple

import numpy as np


class SplitPlan(NamedTuple):
    """A list of segments, int32 or bool [segments] each, and where those of an output are.

    Attributes:
      worker: who reads it; a worker's segments follow each other.
      batch, head: whose keys.
      begin, end: which tiles: begin to end - 1.
      is_host: whether tile 0 is among them.
      is_last: whether the output's last tile is.
      slot: where its partial state goes, [segments] in the order of the list.
      first, count: int32 [B, heads], the slot of each output's first partial state and how many there are; none for an empty sequence.
      tile: keys of a tile.
      waits: whether hosts merge (rather than a second kernel).
    """

    worker: np.ndarray
    batch: np.ndarray
    head: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    is_host: np.ndarray
    is_last: np.ndarray
    slot: np.ndarray
    first: np.ndarray
    count: np.ndarray
    tile: int
    waits: bool = False


def _tiles(lengths, heads, tile):
    """Tiles of each output, in the order of outputs."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or (lengths < 0).any():
        raise ValueError(f"lengths: expected integers [B], at least 0, got {lengths!r}")
    for name, value in (("heads", heads), ("tile", tile)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    return np.repeat(-(-lengths // tile), heads)


def _plan(tiles, heads, tile, cuts, worker_of, waits=False):
    """The plan whose segments end at ``cuts``, sorted positions in the list of all tiles, besides the ends of outputs."""
    ends = np.cumsum(tiles)
    bounds = np.unique(np.concatenate([[0], ends, cuts]).astype(np.int64))
    start, stop = bounds[:-1], bounds[1:]
    output = np.searchsorted(ends, start, side="right")
    begin = start - (ends - tiles)[output] if len(start) else start
    end = begin + stop - start
    count = np.bincount(output, minlength=len(tiles))
    grid = lambda x: x.reshape(-1, heads).astype(np.int32)
    whole = lambda x: np.asarray(x).astype(np.int32)
    return SplitPlan(whole(worker_of(start)), whole(output // heads), whole(output % heads), whole(begin), whole(end), begin == 0, end == tiles[output],
                     np.arange(len(start), dtype=np.int32), grid(np.cumsum(count) - count), grid(count), tile, waits)


def stream_k_plan(lengths, heads: int, tile: int, workers: int) -> SplitPlan:
    """Equal shares of all tiles, across heads and sequences: any two workers read as many, give or take one.

    Args:
      lengths: integers [B], keys of each sequence.
      heads: key heads; the query heads of a group are rows of one tile.
      tile: keys of a tile.
      workers: G, how many work at once; no more than there are tiles do.

    Returns:
      A :class:`SplitPlan` of at most B heads + G - 1 segments.

    >>> plan = stream_k_plan([5, 3], heads=1, tile=1, workers=3)
    >>> [*zip(plan.worker.tolist(), plan.batch.tolist(), plan.begin.tolist(), plan.end.tolist())]
    [(0, 0, 0, 3), (1, 0, 3, 5), (1, 1, 0, 1), (2, 1, 1, 3)]
    """
    tiles = _tiles(lengths, heads, tile)
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    total = int(tiles.sum())
    share, more = divmod(total, max(min(workers, total), 1))
    workers = min(workers, total)
    cuts = np.cumsum(np.full(workers, share) + (np.arange(workers) < more))
    return _plan(tiles, heads, tile, cuts, lambda start: np.searchsorted(cuts, start, side="right"), waits=True)


def fixed_split_plan(lengths, heads: int, tile: int, splits: int) -> SplitPlan:
    """Every output in ``splits`` pieces of equally many tiles, or as many as it has tiles for; each piece is a worker's.

    Args:
      lengths, heads, tile: as in :func:`stream_k_plan`.
      splits: pieces; see :func:`flash_decoding_splits`.

    >>> plan = fixed_split_plan([5, 3], heads=1, tile=1, splits=2)
    >>> [*zip(plan.batch.tolist(), plan.begin.tolist(), plan.end.tolist())]
    [(0, 0, 3), (0, 3, 5), (1, 0, 2), (1, 2, 3)]
    """
    tiles = _tiles(lengths, heads, tile)
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    piece = np.maximum(-(-tiles // splits), 1)
    cuts = [start + piece * np.arange(-(-count // piece)) for start, count, piece in zip(np.cumsum(tiles) - tiles, tiles, piece)]
    return _plan(tiles, heads, tile, np.concatenate([[0], *cuts]), lambda start: np.arange(len(start)))


def no_split_plan(lengths, heads: int, tile: int) -> SplitPlan:
    """Every output a worker's: :func:`fixed_split_plan` with one piece.

    >>> no_split_plan([5, 0, 3], heads=1, tile=2).count.tolist()
    [[1], [0], [1]]
    """
    return fixed_split_plan(lengths, heads, tile, 1)


def flash_decoding_splits(outputs: int, tiles: int, workers: int, most: int = 128) -> int:
    """Into how many pieces Flash-Decoding cuts: the fewest whose last wave of workers is as busy as the best number's is, to 85%.

    Args:
      outputs: batch size times key heads.
      tiles: of the longest output.
      workers: how many work at once.
      most: pieces at the most.

    >>> flash_decoding_splits(8, 512, 216), flash_decoding_splits(200, 512, 216)
    (23, 1)
    """
    if outputs >= 0.8 * workers or not tiles:
        return 1
    numbers = np.arange(1, min(most, workers, tiles) + 1)
    pieces = -(-tiles // numbers)
    useful = np.concatenate([[True], pieces[1:] != pieces[:-1]])
    waves = outputs * numbers / workers
    busy = np.where(useful, waves / np.ceil(waves), 0)
    return int(numbers[np.argmax(busy >= 0.85 * busy.max())])


def simulate_makespan(plan: SplitPlan, workers: int, cost_tile: float = 1.0, cost_reduce: float = 0.5) -> tuple[float, float]:
    """How long a plan takes.

    Workers start in order, each where one before has ended if there are more than run at once. A host waits for the states of its output, then merges; without waiting a
    second kernel merges all outputs that are in pieces, when the first has ended.

    Args:
      plan: what is done.
      workers: how many run at once.
      cost_tile: time of a tile.
      cost_reduce: time of merging a partial state.

    Returns:
      ``(makespan, occupancy)``: the time, in units of the costs, and the share of it that workers spend on tiles on average.

    >>> simulate_makespan(no_split_plan([8, 2], heads=1, tile=1), workers=2)
    (8.0, 0.625)
    >>> simulate_makespan(stream_k_plan([8, 2], heads=1, tile=1, workers=2), workers=2)
    (5.5, 0.9090909090909091)
    """
    sizes = (plan.end - plan.begin) * float(cost_tile)
    merged = plan.count[plan.batch, plan.head]
    ends = np.zeros(len(sizes))
    free = [0.0] * workers
    for worker in range(int(plan.worker.max(initial=-1)) + 1):  # in the order in which they start
        mine = np.flatnonzero(plan.worker == worker)
        ends[mine] = heapq.heappop(free) + np.cumsum(sizes[mine])
        heapq.heappush(free, ends[mine].max(initial=0))
    finish = ends.max(initial=0)
    if plan.waits:  # an output that another worker goes on with is its host's last
        for host in np.flatnonzero(plan.is_host & (merged > 1)):
            finish = max(finish, ends[host:host + merged[host]].max() + cost_reduce * (merged[host] - 1))
    else:
        free = [finish] * workers
        for count in plan.count[plan.count > 1].ravel():
            heapq.heappush(free, heapq.heappop(free) + cost_reduce * count)
        finish = max(free)
    return float(finish), float(sizes.sum() / (finish * workers)) if finish else 1.0
