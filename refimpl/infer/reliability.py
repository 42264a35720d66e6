"""A reliability diagram (matplotlib, extra `plot`): of the answers given with some confidence, the part that is right."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.layers.variants.calibration import Curve
from refimpl.plotting import drawn


def svg(curve: Curve) -> bytes:
    """Bars of accuracy over the diagonal, and below how many answers each bin holds. SpecError without matplotlib."""
    return drawn(lambda figure: _draw(figure, curve), size=(5, 6), salt="reliability")


def _draw(figure: Any, curve: Curve) -> None:
    bins = len(curve.count)
    left, width = np.arange(bins) / bins, 1 / bins
    share = curve.count / curve.count.sum()
    error = float((np.abs(curve.accuracy - curve.confidence) * share).sum())
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(left, curve.accuracy, width, align="edge", edgecolor="white", label="right")
    filled = curve.count > 0
    upper.plot([0, 1], [0, 1], color="grey", linestyle="--", label="as confident as right")
    upper.plot(curve.confidence[filled], curve.accuracy[filled], "o", color="black", label="mean of the bin")
    upper.set(title=f"expected calibration error {error:.3f}", ylabel="part that is right", ylim=(0, 1), xlim=(0, 1))
    upper.legend(loc="upper left")
    lower.bar(left, share, width, align="edge", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="part of the answers")
