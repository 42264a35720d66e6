"""Policies side by side as a figure (matplotlib, extra `plot`): which part of the requests waited at most so long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refimpl.plotting import drawn

from .simulate import Served

PANELS = {"ttft": "time to the first token (s)", "tpot": "time per output token (s)"}


def curve(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The distribution function: sorted values, and which part is at most each."""
    n = len(values)
    return sorted(values), [(i + 1) / n for i in range(n)]


def svg(results: Mapping[str, Mapping[str, Sequence[Served]]]) -> bytes:
    """trace -> policy -> served, a row of panels a trace; the same bytes for the same results. SpecError without matplotlib."""
    return drawn(lambda figure: _draw(figure, results), size=(10, 3.5 * len(results)), salt="policies")


def _draw(figure: Any, results: Mapping[str, Mapping[str, Sequence[Served]]]) -> None:
    panels = figure.subplots(len(results), len(PANELS), squeeze=False)
    for row, (trace, by_policy) in zip(panels, results.items(), strict=True):
        for axes, (name, title) in zip(row, PANELS.items(), strict=True):
            for policy, served in by_policy.items():
                axes.step(*curve([getattr(s, name) for s in served]), where="post", label=policy)
            axes.set(title=trace, xlabel=title, ylabel="part of the requests", ylim=(0, 1), xscale="log")
            axes.grid(alpha=0.3)
    panels[0][0].legend()
