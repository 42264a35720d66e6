"""Chapter 15, checkpoints: three exercises. `pytest docs/book -k chapter15` says how far you are."""


def read(raw, name):
    """The tensor `name` out of the bytes of a safetensors file, as a NumPy array.

    raw: bytes. dtypes that occur: "F32" -> float32, "I64" -> int64, "BF16" -> float32 of the same values. Use json and numpy alone.
    """
    raise NotImplementedError("exercise 15.1")


def fp8(byte, exponent_bits):
    """The number that a byte of FP8 holds: 1 bit sign, then the exponent, then the mantissa. -> float

    exponent_bits 4 (E4M3: bias 7, exponent and mantissa all ones is NaN, no infinity) or 5 (E5M2: bias 15, exponent all ones is
    infinity with mantissa 0 and else NaN, as in IEEE 754). Exponent 0: no leading one, and the exponent counts as 1.
    """
    raise NotImplementedError("exercise 15.2")


def dequantise(codes, scales, block):
    """w[o, i] = codes[o, i] * scales[o // block, i // block].

    codes (O, I) float32, the numbers that the bytes hold; scales (ceil(O / block), ceil(I / block)) float32 -> (O, I) float32
    """
    raise NotImplementedError("exercise 15.3")
