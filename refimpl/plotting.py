"""Figures as SVG through matplotlib (extra `plot`), the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from refimpl.autograd.errors import SpecError


def drawn(draw: Callable[[Any], None], *, size: tuple[float, float], salt: str) -> bytes:
    """What `draw` puts on a Figure of that size in inches, as SVG; `salt` makes its ids. SpecError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpecError('drawing needs matplotlib: pip install "deepseek-v3-refimpl[plot]"') from error

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
