"""Numbers of few bits: formats, and their layouts in memory."""

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

__all__ = ["dequant_mxfp4", "dequant_nvfp4", "pack_fp4", "quant_mxfp4", "quant_nvfp4", "swizzle_scales", "unpack_fp4", "unswizzle_scales"]
