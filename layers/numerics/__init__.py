"""Number formats, block quantisation and tensor-core arithmetic: bits in, bits out, no gradients."""

from .block_scaled import mxf4, nvf4
from .blocks import block_scales, dequantize_blocks, quantize_blocks
from .codec import decode, encode, round_to
from .error_bound import scaled_gemm_bound
from .formats import FORMATS, Format
from .quantise import DIALECTS, Dialect, Quantized, quantize
from .scaled_gemm import MODES, scaled_gemm
from .tensor_core_fast import mxf8f6f4, tensor_core_matmul
from .tensor_core_why import why

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
