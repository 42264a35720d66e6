"""Figures as SVG or PNG through matplotlib (extra `plot`), the same bytes every time, told apart without colours."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from refimpl.autograd.errors import SpecError, require

FORMATS: Mapping[str, Mapping[str, None]] = {"svg": {"Date": None}, "png": {"Software": None}}
"""Format -> what matplotlib would write into it of its own day and version."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers keep apart; in grey some are alike."""
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
"""So the n-th line of a panel has the n-th dashes too."""


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

    out, lines = io.BytesIO(), matplotlib.cycler(color=COLOURS, linestyle=DASHES)
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "axes.prop_cycle": lines}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(out, format=form, metadata=dict(FORMATS[form]))
    return out.getvalue()
