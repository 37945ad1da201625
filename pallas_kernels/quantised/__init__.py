"""Numbers of few bits: formats, and their layouts in memory."""

from pallas_kernels.quantised.formats import dequantise, error_metrics, quant_int8, smooth_k
from pallas_kernels.quantised.microscaling import (
    dequant_mxfp4,
    dequant_nvfp4,
    pack_fp4,
    quant_mxfp4,
    quant_nvfp4,
    swizzle_scales,
    unpack_fp4,
    unswizzle_scales,
)

__all__ = ["dequant_mxfp4", "dequant_nvfp4", "dequantise", "error_metrics", "pack_fp4", "quant_int8", "quant_mxfp4", "quant_nvfp4", "smooth_k", "swizzle_scales",
           "unpack_fp4", "unswizzle_scales"]
