"""Number formats in exact rational arithmetic: the oracle of the codecs, written from bit strings and without NumPy."""

from bisect import bisect_left
from fractions import Fraction
from functools import cache

# name -> sign bits, exponent bits, fraction bits, bias, what the largest exponent field holds
LAYOUT = {
    "e4m3fn": (1, 4, 3, 7, "one nan"),
    "e5m2": (1, 5, 2, 15, "inf and nan"),
    "e5m6": (1, 5, 6, 15, "inf and nan"),
    "e2m1fn": (1, 2, 1, 1, "numbers"),
    "bf16": (1, 8, 7, 127, "inf and nan"),
    "fp16": (1, 5, 10, 15, "inf and nan"),
}


def width(name):
    return sum(LAYOUT[name][:3])


def value(code, name):
    """A Fraction, or "inf", "-inf", "nan"; -0 is 0."""
    _, e, m, bias, top = LAYOUT[name]
    digits = format(code, f"0{width(name)}b")
    sign, exponent, fraction = digits[0], digits[1 : 1 + e], digits[1 + e :]
    if "0" not in exponent and top == "inf and nan":
        return "nan" if "1" in fraction else "-inf" if sign == "1" else "inf"
    if "0" not in digits[1:] and top == "one nan":
        return "nan"
    hidden, field = (1, int(exponent, 2)) if "1" in exponent else (0, 1)
    size = (hidden + Fraction(int(fraction, 2), 2**m)) * Fraction(2) ** (field - bias)
    return -size if sign == "1" else size


@cache
def ladder(name):
    """The non-negative finite values in the order of their codes, which is ascending."""
    values = [value(code, name) for code in range(2 ** (width(name) - 1))]
    return [v for v in values if not isinstance(v, str)]


@cache
def steps(name):
    """The ladder and one step above it: what the format would hold had it one more code."""
    values = ladder(name)
    return [*values, 2 * values[-1] - values[-2]]


def nearest(x, name):
    """(code of |x| rounded to nearest even, whether that is the step above the largest). x is a Fraction."""
    values, size = steps(name), abs(x)
    above = bisect_left(values, size)
    if above == len(values):
        above -= 1
    elif above:
        low, high = size - values[above - 1], values[above] - size
        above -= low < high or (low == high and above % 2 == 1)
    return above, above == len(values) - 1
