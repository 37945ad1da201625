"""A few queries against a long cache, on the tile mathematics: the cache read once, where it lies, in equal shares; and plans that say what that gains."""

from pallas_kernels.decode.plans import SplitPlan, fixed_split_plan, flash_decoding_splits, no_split_plan, simulate_makespan, stream_k_plan
from pallas_kernels.decode.tpu import LANES, Packed, Plan, fold_rows

__all__ = ["LANES", "Packed", "Plan", "SplitPlan", "fixed_split_plan", "flash_decoding_splits", "fold_rows", "no_split_plan", "simulate_makespan", "stream_k_plan"]
