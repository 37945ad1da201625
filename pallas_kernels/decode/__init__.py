"""A few queries against a long cache, on the tile mathematics: the cache read once, where it lies, in equal shares."""

from pallas_kernels.decode.tpu import LANES, Packed, Plan, fold_rows

__all__ = ["LANES", "Packed", "Plan", "fold_rows"]
