"""Products: in what precision queries meet keys, weights values, and gradients both."""

from attnx import lazy
from pallas_kernels.products import Products, Rounded
from pallas_kernels.quantised import (
    dequant_mxfp4,
    dequant_nvfp4,
    pack_fp4,
    quant_mxfp4,
    quant_nvfp4,
    swizzle_scales,
    unpack_fp4,
    unswizzle_scales,
)
from pallas_kernels.quantised.formats import smooth_k

_LAZY = {"eight_bits": ("Cast", "Format", "Quantised", "Scaled", "UpToOne", "float8", "int8"),
         "four_bits": ("FP4", "mxfp4", "nvfp4"),
         "sage": ("SAGE_VARIANTS", "choose_kernel_per_layer", "sage_attention"),
         "sage3": ("sage3_attention", "smooth_q"),
         "sagebwd": ("sagebwd_attention", "sagebwd_products"),
         "smoothing": ("delta_scores", "residual_correction")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Products", "Rounded", "dequant_mxfp4", "dequant_nvfp4", "pack_fp4", "quant_mxfp4", "quant_nvfp4", "smooth_k", "swizzle_scales", "unpack_fp4",
           "unswizzle_scales", *(name for names in _LAZY.values() for name in names)]
