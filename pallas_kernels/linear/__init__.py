"""The recurrent engine on fused kernels: the mathematics of :mod:`pallas_kernels.linear_tile`, the state kept on chip."""

from pallas_kernels.linear import gpu, tpu
from pallas_kernels.linear.arrays import State, Tokens

__all__ = ["State", "Tokens", "gpu", "tpu"]
