"""Fused attention on the tile mathematics: one kernel whose tile calls the parts, not one kernel a variant."""

from pallas_kernels.flash.launch import Plan
from pallas_kernels.flash.tpu import fold_keys, fold_rows

__all__ = ["Plan", "fold_keys", "fold_rows"]
