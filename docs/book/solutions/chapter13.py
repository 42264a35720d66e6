"""Chapter 13: one way to do it."""

import math


def yarn(dim, theta, factor, original, fast, slow):
    """Fast pairs stay, slow ones are slowed down."""

    def corr(turns):
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(corr(fast)), 0), min(math.ceil(corr(slow)), dim - 1)
    high += 0.001 if low == high else 0
    found = []
    for i in range(dim // 2):
        freq, ramp = theta ** (-2 * i / dim), min(max((i - low) / (high - low), 0), 1)
        found.append(freq * (1 - ramp) + freq / factor * ramp)
    return found


def rotate(x, position, freqs):
    """A complex number times e^(i angle)."""
    out = []
    for i, freq in enumerate(freqs):
        a, b, angle = x[2 * i], x[2 * i + 1], position * freq
        out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return out


def scores(tokens, length):
    """1 + 2 + ... + length pairs each."""
    n = tokens // length
    return n, n * length * (length + 1) // 2
