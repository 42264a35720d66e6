"""Number formats, block quantisation and tensor-core arithmetic: bits in, bits out, no gradients."""

from .formats import FORMATS, Format, decode, encode, round_to
from .quantisation import DIALECTS, Dialect, Quantized, block_scales, dequantize_blocks, quantize, quantize_blocks
from .tensor_cores import MODES, mxf4, mxf8f6f4, nvf4, scaled_gemm, scaled_gemm_bound, tensor_core_matmul, why

__all__ = [
    "DIALECTS",
    "FORMATS",
    "MODES",
    "Dialect",
    "Format",
    "Quantized",
    "block_scales",
    "decode",
    "dequantize_blocks",
    "encode",
    "mxf4",
    "mxf8f6f4",
    "nvf4",
    "quantize",
    "quantize_blocks",
    "round_to",
    "scaled_gemm",
    "scaled_gemm_bound",
    "tensor_core_matmul",
    "why",
]
