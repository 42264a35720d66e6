"""Codes with scales: tiles of activations, blocks of weights, MX and NV blocks, the latent cache in bytes."""

from .blocks import block_scales, dequantize_blocks, quantization_settings, quantize_blocks
from .cache import latent_bytes, pack_latent, unpack_latent
from .mx import quantize_mx, quantize_nvfp4
from .quantise import DIALECTS, Dialect, Quantized, quantize

__all__ = [
    "DIALECTS",
    "Dialect",
    "Quantized",
    "block_scales",
    "dequantize_blocks",
    "latent_bytes",
    "pack_latent",
    "quantization_settings",
    "quantize",
    "quantize_blocks",
    "quantize_mx",
    "quantize_nvfp4",
    "unpack_latent",
]
