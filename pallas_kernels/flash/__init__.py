"""Fused attention on the tile mathematics: one kernel whose tile calls the parts, not one kernel a variant."""

from pallas_kernels.flash import gpu, tpu
from pallas_kernels.flash.launch import Plan

__all__ = ["Plan", "gpu", "tpu"]
