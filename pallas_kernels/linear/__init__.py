"""The recurrent engine on fused kernels: the mathematics of :mod:`pallas_kernels.linear_tile`, the state kept on chip."""

from pallas_kernels.linear.tpu import Plan, State, Tokens, attend, choose_plan

__all__ = ["Plan", "State", "Tokens", "attend", "choose_plan"]
