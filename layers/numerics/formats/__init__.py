"""Number formats as data, the codec between values and codes, rounding, and codes packed in words."""

from .codec import decode, encode, round_to
from .formats import BF16, E2M1, E4M3, E5M2, E5M6, FORMATS, FP16, INT8, UE8M0, Format
from .packing import pack_e2m1, pack_e5m6, pack_ue8m0, unpack_e2m1, unpack_e5m6, unpack_ue8m0
from .rounding import to_bf16

__all__ = [
    "BF16",
    "E2M1",
    "E4M3",
    "E5M2",
    "E5M6",
    "FORMATS",
    "FP16",
    "INT8",
    "UE8M0",
    "Format",
    "decode",
    "encode",
    "pack_e2m1",
    "pack_e5m6",
    "pack_ue8m0",
    "round_to",
    "to_bf16",
    "unpack_e2m1",
    "unpack_e5m6",
    "unpack_ue8m0",
]
