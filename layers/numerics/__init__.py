"""Number formats and block quantisation: bits in, bits out, no gradients."""

from .blocks import block_scales, dequantize_blocks, quantize_blocks

__all__ = ["block_scales", "dequantize_blocks", "quantize_blocks"]
