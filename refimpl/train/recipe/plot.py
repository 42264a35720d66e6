"""Every schedule of a run as a figure (matplotlib, extra `plot`): one panel a schedule, over tokens."""

from __future__ import annotations

from typing import Any

from refimpl.plotting import drawn

from .run import SCHEDULES, Phase, Run

PANELS = {
    "lr": "learning rate",
    "batch": "batch (sequences)",
    "gamma": "bias speed γ",
    "mtp_weight": "MTP weight λ",
    "aux_weight": "balance weight α",
    "sequence": "sequence (tokens)",
}
POINTS = 50


def points(run: Run, n: int = POINTS) -> dict[str, list[float]]:
    """`tokens` and every panel's values: in n steps of every piece that is not constant, and on both sides of every corner."""
    found: dict[str, list[float]] = {name: [] for name in ("tokens", *PANELS)}
    first = 0
    for phase in run.phases:
        for k in sorted(_steps(phase, n)):
            s = run.at(first + k)
            values = {"tokens": s.tokens, "batch": s.batch, "sequence": s.sequence} | {
                x: s.values[x] for x in SCHEDULES
            }
            for name, value in values.items():
                found[name].append(value)
        first += len(phase.steps)
    return found


def _steps(phase: Phase, n: int) -> set[int]:
    last, chosen = len(phase.steps) - 1, set[int]()
    for piece in [p for s in (phase.batch, *phase.schedules.values()) for p in s.pieces]:
        a, b = phase.steps.step(piece.first), phase.steps.step(piece.last)
        chosen |= {a, b - 1, b}
        if piece.start != piece.end:
            chosen |= {a + round(i * (b - a) / n) for i in range(n)}
    return {min(k, last) for k in chosen}


def svg(run: Run) -> bytes:
    """The figure as SVG, the same bytes for the same run. SpecError without matplotlib."""
    return drawn(lambda figure: _draw(figure, run), size=(10, 8), salt=run.name)


def _draw(figure: Any, run: Run) -> None:
    found = points(run)
    figure.suptitle(run.name)
    for i, (name, title) in enumerate(PANELS.items()):
        axes = figure.add_subplot(3, 2, i + 1)
        style = "steps-post" if name in ("batch", "sequence") else "default"
        axes.plot(found["tokens"], found[name], drawstyle=style)
        axes.set(title=title, xlabel="tokens", ylim=(0, None))
        axes.grid(alpha=0.3)
