"""Chapter 3: one way to do it."""

import math

import numpy as np


def turn(x, position, freq):
    """A pair is a complex number, turning is a product."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * position * freq)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def half_order(dim):
    """First members, then second members."""
    return np.r_[0:dim:2, 1:dim:2]


def interleaved_order(dim):
    """The inverse of a permutation is its argsort."""
    return np.argsort(half_order(dim))


def slowed(freq, factor, original, fast, slow):
    """A ramp between two pairs."""

    def corr(turns):
        return math.log(original / (2 * math.pi * turns)) / math.log(freq[0] / freq[1])

    low, high = math.floor(corr(fast)), math.ceil(corr(slow))
    ramp = np.clip((np.arange(len(freq)) - low) / (high - low), 0, 1)
    return freq * (1 - ramp) + freq / factor * ramp
