"""Products: in what precision queries meet keys, weights values, and gradients both."""

from attnx import lazy
from pallas_kernels.products import Products, Rounded

_LAZY = {"eight_bits": ("Cast", "Format", "Quantised", "Scaled", "UpToOne", "float8", "int8"),
         "sage": ("SAGE_VARIANTS", "choose_kernel_per_layer", "sage_attention")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Products", "Rounded", *(name for names in _LAZY.values() for name in names)]
