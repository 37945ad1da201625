"""attnx: attention mechanisms as pure JAX functions, on engines that make them fast and long."""

from attnx import masks, scores, weights
from attnx.core.attention import attention
from pallas_kernels.parts import At, Operand

__version__ = "0.1.0"
