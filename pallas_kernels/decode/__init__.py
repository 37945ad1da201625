"""A few queries against a long cache, on the tile mathematics: the cache read once, where it lies, in equal shares; and plans that say what that gains."""

from pallas_kernels.decode import gpu, tpu
from pallas_kernels.decode.plans import SplitPlan, fixed_split_plan, flash_decoding_splits, no_split_plan, simulate_makespan, stream_k_plan

__all__ = ["SplitPlan", "fixed_split_plan", "flash_decoding_splits", "gpu", "no_split_plan", "simulate_makespan", "stream_k_plan", "tpu"]
