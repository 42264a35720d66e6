"""What every chapter's figures share: SVG, colours that colour-blind readers and grey prints keep apart, numbers for the text."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib_inline.backend_inline import set_matplotlib_formats
from myst_nb import glue

from refimpl.plotting import COLOURS, DASHES

HATCHES = ("", "//", "..", "xx", "\\\\", "oo")

set_matplotlib_formats("svg")
mpl.rcParams.update(
    {
        "axes.prop_cycle": mpl.cycler(color=COLOURS, linestyle=DASHES),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.figsize": (6.4, 3.2),
        "figure.constrained_layout.use": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "deepseek-v3-refimpl",
    }
)


def say(**numbers: Any) -> None:
    """Give numbers to the text: `say(load=3)` here, {glue:text}`load` there."""
    for name, number in numbers.items():
        glue(name, number.item() if hasattr(number, "item") else number, display=False)
