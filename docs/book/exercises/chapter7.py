"""Chapter 7, FP8: three exercises. `pytest docs/book -k chapter7` says how far you are."""


def value(code):
    """The number of an E4M3 code. code int from 0 to 255 -> float; 0x7f and 0xff are NaN, 0x80 is -0.0.

    Bits from the top: sign, four of exponent (bias 7), three of fraction. Exponent field 0 is subnormal.
    """
    raise NotImplementedError("exercise 7.1")


def quantise_tile(x):
    """(s, y): the scale max(|x|, 1e-4) / 448 of one tile, and every x / s rounded to the nearest E4M3 value, ties to even.

    x (n,) float32 -> s float32, y (n,) float32. Both divisions are float32.
    """
    raise NotImplementedError("exercise 7.2")


def hopper_step(products, exponents, c):
    """One step of Hopper's FP8 tensor core. products: Fractions; exponents: the e_p of each, int; c: a Fraction or 0 -> Fraction.

    E is the largest of the exponents of products that are not 0 and of c's own (2^e <= |c| < 2^(e+1)). Every addend is cut
    toward zero to a multiple of 2^(E - 13), the multiples are added exactly, and the sum is cut toward zero to 13 bits behind
    its leading one. Sizes are those of everyday numbers: no overflow, no subnormal results.
    """
    raise NotImplementedError("exercise 7.3")
