"""Codes narrower than their container, packed as the kernels keep them in memory. Shifts only: no byte order enters."""

from __future__ import annotations

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

from .codec import as_codes
from .formats import E2M1, E5M6, UE8M0


def pack_e5m6(codes: Array, *, name: str = "codes") -> Array:
    """Eight 12-bit codes in three 32-bit words, the first code highest.  codes (..., 8 N) int -> words (..., 3 N) int

    As DeepSeek's TileKernels (36d9e45) lays them out. Raises SpecError for a last axis that is no multiple of 8.
    """
    c = _grouped(as_codes(codes, E5M6, name).astype(np.uint32), 8, name)
    words = np.empty_like(c, shape=(*c.shape[:-1], 3))
    words[..., 0] = c[..., 0] << 20 | c[..., 1] << 8 | c[..., 2] >> 4
    words[..., 1] = c[..., 2] << 28 | c[..., 3] << 16 | c[..., 4] << 4 | c[..., 5] >> 8
    words[..., 2] = c[..., 5] << 24 | c[..., 6] << 12 | c[..., 7]
    return words.reshape(*codes.shape[:-1], words.shape[-2] * 3)


def unpack_e5m6(words: Array, *, name: str = "words") -> Array:
    """The inverse of pack_e5m6.  words (..., 3 N) int -> codes (..., 8 N) int"""
    require(words.dtype == np.uint32, f"{name} has dtype {words.dtype}; expected uint32")
    w = _grouped(words, 3, name)
    a, b, c = w[..., 0], w[..., 1], w[..., 2]
    parts = [a >> 20, a >> 8, a << 4 | b >> 28, b >> 16, b >> 4, b << 8 | c >> 24, c >> 12, c]
    codes = (np.stack(parts, axis=-1) & 0xFFF).astype(np.uint16)
    return codes.reshape(*words.shape[:-1], codes.shape[-2] * 8)


def pack_e2m1(codes: Array, *, name: str = "codes") -> Array:
    """Two 4-bit codes in a byte, the first in the low half.  codes (..., 2 N) int -> bytes (..., N) int"""
    c = _grouped(as_codes(codes, E2M1, name), 2, name)
    return c[..., 0] | c[..., 1] << 4


def unpack_e2m1(packed: Array, *, name: str = "packed") -> Array:
    """The inverse of pack_e2m1.  packed (..., N) int -> codes (..., 2 N) int"""
    require(
        packed.dtype.itemsize == 1 and packed.dtype.kind in "iu", f"{name} has dtype {packed.dtype}; expected bytes"
    )
    packed = packed.astype(np.uint8)
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_ue8m0(codes: Array, *, name: str = "scales") -> Array:
    """Four 8-bit scale codes in a 32-bit word, the first lowest.  codes (..., 4 N) int -> words (..., N) int

    What DeepGEMM takes on SM100. It takes codes: packing the float32 scales themselves would keep the wrong bits of
    every scale that is no power of two, so those are refused where they become codes (`scales.encode_scales`).
    """
    c = _grouped(as_codes(codes, UE8M0, name).astype(np.uint32), 4, name)
    return c[..., 0] | c[..., 1] << 8 | c[..., 2] << 16 | c[..., 3] << 24


def unpack_ue8m0(words: Array, *, name: str = "words") -> Array:
    """The inverse of pack_ue8m0.  words (..., N) int -> codes (..., 4 N) int"""
    ok = words.dtype.itemsize == 4 and words.dtype.kind in "iu"
    require(ok, f"{name} has dtype {words.dtype}; expected 32-bit words")
    words = words.astype(np.uint32)
    codes = np.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], axis=-1).astype(np.uint8)
    return codes.reshape(*words.shape[:-1], 4 * words.shape[-1])


def _grouped(a: Array, n: int, name: str) -> Array:
    """(..., N) -> (..., N/n, n)"""
    whole = a.ndim >= 1 and a.shape[-1] % n == 0
    require(whole, f"{name} has shape {a.shape}; expected a last axis that is a multiple of {n}")
    return a.reshape(*a.shape[:-1], a.shape[-1] // n, n)
