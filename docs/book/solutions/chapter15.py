"""Chapter 15: one way to do it."""

import json
import math

import numpy as np


def read(raw, name):
    """Offsets count from the end of the header."""
    n = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + n])[name]
    start, end = entry["data_offsets"]
    data = raw[8 + n + start : 8 + n + end]
    if entry["dtype"] == "BF16":
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        flat = np.frombuffer(data, {"F32": "<f4", "I64": "<i8"}[entry["dtype"]])
    return flat.reshape(entry["shape"])


def fp8(byte, exponent_bits):
    """Cut the byte in three."""
    m_bits = 7 - exponent_bits
    bias, top, ones = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1, 2**m_bits - 1
    sign, e, m = -1.0 if byte >> 7 else 1.0, (byte >> m_bits) & top, byte & ones
    if e == top and exponent_bits == 5:
        return math.nan if m else sign * math.inf
    if e == top and m == ones:
        return math.nan
    return sign * ((e > 0) + m / 2**m_bits) * 2.0 ** (max(e, 1) - bias)


def dequantise(codes, scales, block):
    """Look each element's scale up."""
    rows, columns = (np.arange(side) // block for side in codes.shape)
    return codes * scales[rows[:, None], columns]
