"""Means, spreads, and what a difference between two variants says, from few seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Runs -> Student's t that |mean| / (deviation / sqrt n) exceeds by chance in 5 of 100 cases (two-sided, n - 1 degrees)."""


def spread(xs: Sequence[float], digits: int = 3) -> str:
    """ "mean ± standard deviation", of one run the number alone."""
    return f"{fmean(xs):.{digits}f} ± {stdev(xs):.{digits}f}" if len(xs) > 1 else f"{xs[0]:.{digits}f}"


def verdict(xs: Sequence[float], base: Sequence[float], digits: int = 3) -> str:
    """What x - base says, seed by seed: "higher" or "lower" if the 95 % interval of the mean leaves out 0, else nothing."""
    ds = [x - b for x, b in zip(xs, base, strict=True)]
    if len(ds) < 2:
        return f"{ds[0]:+.{digits}f}: one run, nothing can be said"
    half = T95[len(ds)] * stdev(ds) / len(ds) ** 0.5
    said = "cannot be told apart" if abs(fmean(ds)) <= half else "higher" if fmean(ds) > 0 else "lower"
    return f"{fmean(ds):+.{digits}f} ± {half:.{digits}f}: {said}"
