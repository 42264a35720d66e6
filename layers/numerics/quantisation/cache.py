"""The latent KV cache in one byte per latent channel: FlashMLA's FP8 layout, and the same layout with INT8.

A token is one row of bytes, for V3's 512 + 64 channels 656 of them instead of 1152 in bfloat16:

    512 codes | 4 float32 scales, one per 128 codes | 64 bfloat16 values of the rotated key, which is never quantised

All little-endian. The latent is cached after its norm, the key after RoPE (semantics of DeepSeek's inference/model.py).
"""

from __future__ import annotations

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.formats import BF16, E4M3, Format, decode, encode

from .quantise import Dialect, Quantized, quantize

TILE = (1, 128)


def latent_bytes(latent: int = 512, rope: int = 64) -> int:
    """Bytes of one token: latent + 4 ceil(latent / 128) + 2 rope.

    >>> latent_bytes()
    656
    """
    return latent + 4 * -(-latent // TILE[1]) + 2 * rope


def pack_latent(
    c_kv: Array, k_rope: Array, *, fmt: Format = E4M3, dialect: str | Dialect = "flashmla", name: str = "cache"
) -> Array:
    """Rows of bytes.  c_kv (..., C), k_rope (..., Dr) -> packed (..., C+4 ceil(C/128)+2 Dr) int

    fmt E4M3, with the power-of-two scales of FlashMLA's test quantiser, or INT8, for which the dialect "deepseek_v3"
    gives amax / 127; that is our own layout, no released engine of DeepSeek has it. The key is rounded to bfloat16.
    Raises SpecError naming `name` for other shapes, NaN and Inf.
    """
    ok = c_kv.shape[:-1] == k_rope.shape[:-1] and fmt.bits == 8
    require(ok, f"{name}: latent {c_kv.shape} and key {k_rope.shape} of different tokens, or {fmt.name} not 8 bits")
    q = quantize(c_kv, TILE, dialect=dialect, fmt=fmt, name=f"{name} latent")
    key = encode(k_rope, BF16, overflow="refuse", name=f"{name} key")
    parts = [q.codes, q.scales.astype("<f4", copy=False).view(np.uint8), key.astype("<u2", copy=False).view(np.uint8)]
    return np.concatenate(parts, axis=-1)


def unpack_latent(
    packed: Array, *, latent: int = 512, rope: int = 64, fmt: Format = E4M3, bf16: bool = True, name: str = "cache"
) -> tuple[Array, Array]:
    """The latent (..., C) and the key (..., Dr), float32, of rows of bytes.

    bf16: the latent is rounded to bfloat16 after the multiplication, as FlashMLA's kernels do. Raises SpecError naming
    `name` for rows of another length and, with the block, for scales that are not finite and positive.
    """
    wanted = latent_bytes(latent, rope)
    ok = packed.dtype == np.uint8 and packed.ndim >= 1 and packed.shape[-1] == wanted
    require(ok, f"{name} has shape {packed.shape} of {packed.dtype}; expected rows of {wanted} bytes (uint8)")
    codes, scales, key = np.split(packed, [latent, wanted - 2 * rope], axis=-1)
    scales, key = (part.astype(np.uint8, order="C") for part in (scales, key))  # contiguous, so that they can be viewed
    scales, key = scales.view("<f4").astype(np.float32, copy=False), key.view("<u2").astype(np.uint16, copy=False)
    c_kv = Quantized(codes, scales, TILE, fmt, f"{name} latent").dequantize(bf16=bf16)
    return c_kv, decode(key, BF16)
