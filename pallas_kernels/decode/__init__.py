"""A few queries against a long cache, on the tile mathematics: the cache read once, where it lies, in equal shares."""

from pallas_kernels.decode import gpu, tpu

__all__ = ["gpu", "tpu"]
