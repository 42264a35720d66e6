"""A report for a person who watches: as wide as the screen, and coloured unless NO_COLOR is set. Elsewhere the text as it is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

COLOURS = (
    r"(?m)^\w+ +(?:(?P<red>FAIL)|(?P<green>ok)|(?P<yellow>\?)) ",
    r"(?m)^(?P<yellow>cause|next|unknown) ",
    r"(?m)(?:^|: )(?:(?P<red>DIVERGES)|(?P<green>CONFORMS\w*)|(?P<yellow>CONTESTED|INCONCLUSIVE)) ",
    r"(?P<red><-- .*|: beyond$)",
)
"""What is coloured how, by the name of its group."""


def screen(make: Callable[[int], str], most: int) -> str:
    """`make(n)` wrapped to the screen's width, n from `most` down until all of it fits, at least 1; `make(most)` for no person."""
    from refimpl.diff.report import wrapped

    if not sys.stdout.isatty():
        return make(most)
    width, height = shutil.get_terminal_size()
    fits = (text for n in range(most, 1, -1) if (text := wrapped(make(n), width)).count("\n") + 2 <= height)
    return next(fits, "") or wrapped(make(1), width)


def show(text: str) -> None:
    """Print it, coloured if a person watches and did not ask for none (NO_COLOR)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    coloured = Text(text)
    for pattern in COLOURS:
        coloured.highlight_regex(pattern, style_prefix="bold ")
    Console(highlight=False).print(coloured, soft_wrap=True)
