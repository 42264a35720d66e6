"""Figures as SVG or PNG through matplotlib (extra `plot`), the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from refimpl.autograd.errors import SpecError, require

FORMATS: Mapping[str, Mapping[str, None]] = {"svg": {"Date": None}, "png": {"Software": None}}
"""Format -> what matplotlib would write into it of its own day and version."""


def drawn(draw: Callable[[Any], None], *, size: tuple[float, float], salt: str, form: str = "svg") -> bytes:
    """What `draw` puts on a Figure of that size in inches, in one of FORMATS; `salt` makes an SVG's ids. SpecError without
    matplotlib.
    """
    require(form in FORMATS, f"a figure as {form!r}; known: {', '.join(FORMATS)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpecError('drawing needs matplotlib: pip install "deepseek-v3-refimpl[plot]"') from error

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(out, format=form, metadata=dict(FORMATS[form]))
    return out.getvalue()
